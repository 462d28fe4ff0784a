"""The command `transcribe`: some recordings at once on this machine, or the rows of manifests on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from raytrain.cli import stopping

_MANIFESTS = "Many recordings (on Ray)"


def _option(help: str, **more: Any) -> Any:
    return typer.Option(rich_help_panel=_MANIFESTS, help=help, **more)


Checkpoint = Annotated[
    Path, typer.Option("--checkpoint", "-m", help="A .nemo file, run folder, checkpoint or Hugging Face folder.")
]
Files = Annotated[list[Path] | None, typer.Argument(help="Recordings that libsndfile reads (WAV, FLAC, OGG, MP3).")]
Language = Annotated[
    str | None,
    typer.Option(help="Spoken language; not needed if the model knows one. In a manifest, rows that name one win."),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Recordings or windows decoded together: 8 of FILES; of a manifest as many as fit, at most 256."
    ),
]
Overlap = Annotated[
    float | None, typer.Option(help="What neighbouring pieces share; 4, or a quarter of a piece if that is less.")
]
Json = Annotated[
    bool,
    typer.Option("--json", help="One JSON object a line, with times and confidence. Of a manifest: rows and speed."),
]
Manifest = Annotated[
    list[str] | None,
    _option(
        "Instead of FILES: a NeMo manifest (JSON lines with audio_filepath), Lhotse cuts, Shar, Parquet or an audio "
        "folder; {0..7} and * stand for several. May be repeated.",
        metavar="PATH",
    ),
]
Output = Annotated[
    Path | None,
    _option(
        "Where the rows go, in the manifests' order, with pred_text and confidence, or error. Finished parts are kept "
        "in OUT.jsonl.parts: the same command goes on after a stop.",
        metavar="OUT.jsonl",
    ),
]
Audio = Annotated[
    list[str] | None,
    _option(
        "The tars of a tarred manifest, or the folder that relative audio paths are in (if left out, the manifest's "
        "own); once for each --manifest.",
        metavar="PATH",
    ),
]
Root = Annotated[str, _option("The folder that relative --manifest and --audio are in.", metavar="PATH")]
Workers = Annotated[int | None, _option("Models at work: one for each GPU, or one on CPUs, if left out.", min=1)]
DeviceMemory = Annotated[
    str | None,
    _option(
        "Memory of a worker, as 16GiB; batches are as large as it allows. If left out, 0.9 of a GPU's, or half of the "
        "host's for all.",
        metavar="SIZE",
    ),
]
Overwrite = Annotated[bool, _option("Replace OUT.jsonl where it is there already.")]
PartRows = Annotated[int | None, _option("Rows of a part, 2000 if left out. Parts are written when done.", min=1)]


def transcribe(
    checkpoint: Checkpoint,
    files: Files = None,
    language: Language = None,
    target_language: Annotated[str | None, typer.Option(help="Translate into this language.")] = None,
    pnc: Annotated[bool, typer.Option(help="Ask for punctuation and capitals.")] = True,
    beam_size: Annotated[int, typer.Option(min=1, help="1 is greedy.")] = 1,
    length_penalty: Annotated[float, typer.Option(min=0, help="Above 0 favours longer texts of a beam.")] = 0.0,
    n_best: Annotated[int, typer.Option(min=1, help="Texts to give with --json (FILES only).")] = 1,
    batch_size: BatchSize = None,
    window_seconds: Annotated[float, typer.Option(help="Longest piece of a recording, at most 40.")] = 40.0,
    overlap_seconds: Overlap = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="Of linear layers: fp32, bf16, or int8 on a CPU.")] = "fp32",
    json: Json = False,
    manifest: Manifest = None,
    output: Output = None,
    audio: Audio = None,
    root: Root = "",
    workers: Workers = None,
    device_memory: DeviceMemory = None,
    part_rows: PartRows = None,
    overwrite: Overwrite = False,
) -> None:
    """Print the text of each recording, or write the texts of whole manifests to a file.

    Exit code 1 if a recording could not be read.
    """
    from raytrain.decoding.settings import DecodeSettings

    try:
        settings = DecodeSettings(beam_size, length_penalty, n_best)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    shared = {
        "language": language,
        "target_language": target_language,
        "pnc": pnc,
        "settings": settings,
        "window_s": window_seconds,
        "overlap_s": overlap_seconds,
        "device": device,
        "precision": precision,
    }
    on_ray = {
        "output": output,
        "audio": audio,
        "root": root,
        "workers": workers,
        "device_memory": device_memory,
        "part_rows": part_rows,
        "overwrite": overwrite,
    }
    if bool(files) == bool(manifest):
        raise typer.BadParameter("name recordings, or lists of them with --manifest; not both", param_hint="FILES")
    if files:
        given = [name for name, value in on_ray.items() if value]
        if given:
            raise typer.BadParameter("goes with --manifest", param_hint=f"--{given[0].replace('_', '-')}")
        failed = _files(files, checkpoint, json, batch_size=batch_size or 8, **shared)
    else:
        if n_best > 1:
            raise typer.BadParameter("goes with FILES: a row of a manifest gets one text", param_hint="--n-best")
        failed = _manifests(manifest, json, checkpoint=checkpoint, max_batch=batch_size, **on_ray, **shared)
    if failed:
        raise typer.Exit(1)


def _files(files: list[Path], checkpoint: Path, json: bool, **options: Any) -> bool:
    """Print texts; returns whether a recording could not be read."""
    import orjson

    from raytrain.decoding.transcriber import Transcriber
    from raytrain.training.conversion import load_model

    failed = False
    for result in Transcriber(load_model(checkpoint), times=json, **options).run([str(file) for file in files]):
        failed = failed or result.error is not None
        if json:
            typer.echo(orjson.dumps(result.to_dict()).decode())
        elif result.error is not None:
            typer.echo(f"error: {result.error}", err=True)
        else:
            typer.echo(result.text if len(files) == 1 else f"{result.path}\t{result.text}")
    return failed


def _manifests(
    manifests: list[str],
    json: bool,
    *,
    output: Path | None,
    audio: list[str] | None,
    root: str,
    device_memory: str | None,
    **options: Any,
) -> bool:
    """Write the output; returns whether a row has an error."""
    import orjson

    from raytrain.config import parse_bytes
    from raytrain.console import Console
    from raytrain.data.corpora.types import Corpus
    from raytrain.operations.transcription import TranscriptionSpec, transcribe_manifests
    from raytrain.redaction import holds_credentials

    stopping.say_at_stop(stopping.GOES_ON)
    if output is None:
        raise typer.BadParameter("goes with --manifest, for example --output texts.jsonl", param_hint="--output")
    if str(output) == "-":
        raise typer.BadParameter("texts go to a file; name it", param_hint="--output")
    if any(map(holds_credentials, [*manifests, *(audio or []), root])):
        raise typer.BadParameter("holds credentials; give them to the environment", param_hint="--manifest")
    if audio and len(audio) != len(manifests):
        raise typer.BadParameter(f"{len(audio)} for {len(manifests)} manifests", param_hint="--audio")
    try:
        options["device_memory"] = None if device_memory is None else parse_bytes(device_memory)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device-memory") from None
    places = zip(manifests, audio or [None] * len(manifests), strict=True)
    corpora = tuple(Corpus(path, path, audio=own).below(root) for path, own in places)
    chosen = {name: value for name, value in options.items() if value is not None}
    console = Console()
    done = transcribe_manifests(TranscriptionSpec(corpora, output.expanduser(), **chosen), console)
    found = done.to_dict()
    if json:
        typer.echo(orjson.dumps(found).decode())
    elif done.audio_s:
        names = [name for name in done.part_seconds if name in found["part_rtfx"]]
        rows = [(name, f"{done.part_seconds[name]:.1f}", f"{found['part_rtfx'][name]:.1f}") for name in names]
        wall = ("all, by the clock", f"{done.seconds:.1f}", f"{found['rtfx']:.1f}")
        console.table(("part", "seconds of workers", "RTFx"), [*rows, wall])
    before = f", {done.parts_from_before} of {done.parts} parts from before" if done.parts_from_before else ""
    console.say(f"{output}: {done.rows} rows, {done.audio_s / 3600:.2f} h of audio transcribed now{before}")
    if done.failed:
        console.warn(f"{done.failed} of {done.rows} rows have no text; their field error says why")
    return done.failed > 0
