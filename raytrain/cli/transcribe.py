"""The command `transcribe`: a few recordings on this machine, or the rows of manifests on Ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raytrain.cli import stopping
from raytrain.cli.options import MODEL_HELP, bytes_of, check_needs, json_option, print_json

if TYPE_CHECKING:
    from raytrain.console import Console
    from raytrain.data.corpora.types import Corpus
    from raytrain.decoding.settings import DecodeSettings
    from raytrain.operations.transcript_parts import Summary
    from raytrain.operations.transcription import TranscriptionSpec

_MANIFESTS = "Many recordings (on Ray)"


def _option(help: str, **more: Any) -> Any:
    return typer.Option(rich_help_panel=_MANIFESTS, help=help, **more)


Checkpoint = Annotated[Path, typer.Option("--checkpoint", "-m", help=MODEL_HELP)]
Files = Annotated[list[Path] | None, typer.Argument(help="Recordings that libsndfile reads (WAV, FLAC, OGG, MP3).")]
Language = Annotated[
    str | None,
    typer.Option(
        help="Spoken language; not needed if the model has just one. A manifest row's own language overrides it."
    ),
]
TargetLanguage = Annotated[str | None, typer.Option(help="Translate into this language.")]
Punctuation = Annotated[bool, typer.Option(help="Ask for punctuation and capitals.")]
BeamSize = Annotated[int, typer.Option(min=1, help="1 is greedy.")]
LengthPenalty = Annotated[float, typer.Option(min=0, help="Above 0 favors longer texts of a beam.")]
NBest = Annotated[int, typer.Option(min=1, help="Number of hypotheses to print with --json (FILES only).")]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Recordings or windows per batch: by default 8 for FILES, as many as fit (at most 256) for manifests.",
    ),
]
Window = Annotated[float, typer.Option(help="Maximum seconds of a piece of a recording, at most 40.")]
Overlap = Annotated[
    float | None,
    typer.Option(help="Seconds of overlap between pieces; by default 4, or a quarter of a piece if that is less."),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Precision = Annotated[str, typer.Option(help="Precision of linear layers: fp32, bf16, or int8 (CPU only).")]
Json = Annotated[
    bool, json_option("One JSON object per line, with times and confidence. For manifests: row counts and speed.")
]
Manifest = Annotated[
    list[str] | None,
    _option(
        "Instead of FILES: a NeMo manifest (JSON lines with audio_filepath), Lhotse cuts, Shar, Parquet or an audio "
        "folder; {0..7} and * match several. May be repeated.",
        metavar="PATH",
    ),
]
Output = Annotated[
    Path | None,
    _option(
        "Output file: rows in manifest order, with pred_text and confidence, or error. Finished parts are kept "
        "in OUT.jsonl.parts; the same command resumes from them after an interruption.",
        metavar="OUT.jsonl",
    ),
]
Audio = Annotated[
    list[str] | None,
    _option(
        "The tars of a tarred manifest, or the base folder of relative audio paths (by default the manifest's "
        "folder); once per --manifest.",
        metavar="PATH",
    ),
]
Root = Annotated[str, _option("The base folder of relative --manifest and --audio paths.", metavar="PATH")]
Workers = Annotated[
    int | None, _option("Number of models to run in parallel; by default one per GPU, or one on CPUs.", min=1)
]
DeviceMemory = Annotated[
    str | None,
    _option(
        "Memory per worker, such as 16GiB; batches are as large as it allows. By default 0.9 of a GPU's, or half "
        "of the host's shared by all.",
        metavar="SIZE",
    ),
]
Overwrite = Annotated[bool, _option("Replace OUT.jsonl if it exists.")]
PartRows = Annotated[int | None, _option("Rows per part, by default 2000. Each part is written when done.", min=1)]


@dataclass(frozen=True)
class _Decoding:
    """What both ways take: named as the parameters of `Transcriber` and the fields of `TranscriptionSpec`."""

    language: str | None
    target_language: str | None
    pnc: bool
    settings: DecodeSettings
    window_s: float
    overlap_s: float | None
    device: str
    precision: str


@dataclass(frozen=True)
class _OnRay:
    """Options that require --manifest."""

    output: Path | None
    audio: list[str] | None
    root: str
    workers: int | None
    device_memory: str | None
    part_rows: int | None
    overwrite: bool


def transcribe(
    checkpoint: Checkpoint,
    files: Files = None,
    language: Language = None,
    target_language: TargetLanguage = None,
    pnc: Punctuation = True,
    beam_size: BeamSize = 1,
    length_penalty: LengthPenalty = 0.0,
    n_best: NBest = 1,
    batch_size: BatchSize = None,
    window_seconds: Window = 40.0,
    overlap_seconds: Overlap = None,
    device: Device = "auto",
    precision: Precision = "fp32",
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
    search = _search(beam_size, length_penalty, n_best)
    decoding = _Decoding(language, target_language, pnc, search, window_seconds, overlap_seconds, device, precision)
    on_ray = _OnRay(output, audio, root, workers, device_memory, part_rows, overwrite)
    if bool(files) == bool(manifest):
        raise typer.BadParameter("pass recordings or --manifest, not both", param_hint="FILES")
    if files:
        failed = _files(files, checkpoint, decoding, on_ray, batch_size or 8, json)
    else:
        failed = _manifests(manifest or [], checkpoint, decoding, on_ray, batch_size, json)
    if failed:
        raise typer.Exit(1)


def _search(beam_size: int, length_penalty: float, n_best: int) -> DecodeSettings:
    from raytrain.decoding.settings import DecodeSettings

    try:
        return DecodeSettings(beam_size, length_penalty, n_best)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


# --- recordings


def _files(
    files: list[Path], checkpoint: Path, decoding: _Decoding, on_ray: _OnRay, batch_size: int, json: bool
) -> bool:
    """Print texts; returns whether any recording could not be read."""
    for name, value in vars(on_ray).items():
        check_needs(bool(value), f"--{name.replace('_', '-')}", "--manifest")

    from raytrain.decoding.transcriber import Transcriber
    from raytrain.training.conversion import load_model

    transcriber = Transcriber(load_model(checkpoint), times=json, batch_size=batch_size, **vars(decoding))
    failed = False
    for result in transcriber.run([str(file) for file in files]):
        failed = failed or result.error is not None
        if json:
            print_json(result.to_dict())
        elif result.error is not None:
            typer.echo(f"error: {result.error}", err=True)
        else:
            typer.echo(result.text if len(files) == 1 else f"{result.path}\t{result.text}")
    return failed


# --- manifests


def _manifests(
    manifests: list[str],
    checkpoint: Path,
    decoding: _Decoding,
    on_ray: _OnRay,
    max_batch: int | None,
    json: bool,
) -> bool:
    """Write the output; returns whether any row has an error."""
    from raytrain.console import Console
    from raytrain.operations.transcription import transcribe_manifests

    if decoding.settings.n_best > 1:
        raise typer.BadParameter("requires FILES: a manifest row gets one text", param_hint="--n-best")
    stopping.say_at_stop(stopping.RESUMABLE)
    spec = _spec(manifests, checkpoint, decoding, on_ray, max_batch)
    console = Console()
    summary = transcribe_manifests(spec, console)
    if json:
        print_json(summary.to_dict())
    elif summary.audio_s:
        console.table(("part", "worker seconds", "RTFx"), _speeds(summary))
    _say(console, summary, on_ray.output)
    return summary.failed > 0


def _spec(
    manifests: list[str], checkpoint: Path, decoding: _Decoding, on_ray: _OnRay, max_batch: int | None
) -> TranscriptionSpec:
    from raytrain.operations.transcription import TranscriptionSpec

    if on_ray.output is None:
        raise typer.BadParameter("requires --manifest, for example --output texts.jsonl", param_hint="--output")
    if str(on_ray.output) == "-":
        raise typer.BadParameter("manifests need an output file", param_hint="--output")
    corpora = _corpora(manifests, on_ray.audio, on_ray.root)
    memory = on_ray.device_memory
    return TranscriptionSpec(
        corpora,
        on_ray.output.expanduser(),
        checkpoint,
        workers=on_ray.workers,
        device_memory=None if memory is None else bytes_of(memory, "--device-memory"),
        max_batch=max_batch or TranscriptionSpec.max_batch,
        part_rows=on_ray.part_rows or TranscriptionSpec.part_rows,
        overwrite=on_ray.overwrite,
        **vars(decoding),
    )


def _corpora(manifests: list[str], audio: list[str] | None, root: str) -> tuple[Corpus, ...]:
    from raytrain.data.corpora.types import Corpus
    from raytrain.redaction import holds_credentials

    if any(map(holds_credentials, [*manifests, *(audio or []), root])):
        raise typer.BadParameter("holds credentials; set them in the environment", param_hint="--manifest")
    if audio and len(audio) != len(manifests):
        raise typer.BadParameter(f"given {len(audio)} times for {len(manifests)} manifests", param_hint="--audio")
    audio_of = dict(enumerate(audio or []))
    return tuple(Corpus(path, path, audio=audio_of.get(number)).below(root) for number, path in enumerate(manifests))


def _speeds(summary: Summary) -> list[tuple[str, str, str]]:
    """Each part's and the whole's seconds and speed."""
    figures = summary.to_dict()
    names = [name for name in summary.part_seconds if name in figures["part_rtfx"]]
    rows = [(name, f"{summary.part_seconds[name]:.1f}", f"{figures['part_rtfx'][name]:.1f}") for name in names]
    return [*rows, ("all, wall time", f"{summary.seconds:.1f}", f"{figures['rtfx']:.1f}")]


def _say(console: Console, summary: Summary, output: Path | None) -> None:
    resumed, parts = summary.parts_from_before, summary.parts
    before = f", {resumed} of {parts} parts were already done" if resumed else ""
    console.say(f"{output}: {summary.rows} rows, {summary.audio_s / 3600:.2f} h of audio transcribed now{before}")
    if summary.failed:
        console.warn(f"{summary.failed} of {summary.rows} rows have no text; their field error says why")
