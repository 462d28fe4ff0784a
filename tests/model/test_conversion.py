"""Archives and conversion: bit-equal round trips, hostile and foreign files, the commands."""

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import SHARED
from typer.testing import CliRunner

from raytrain.cli.app import app
from raytrain.data.text.tokenizer import CanaryTokenizer, train_tokenizer
from raytrain.decoding.transcriber import Transcriber
from raytrain.errors import CheckpointError, RaytrainError
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig, SpecAugmentSettings
from raytrain.model.formats.nemo import read_nemo, write_nemo
from raytrain.model.formats.portable import ModelParts
from raytrain.training.conversion import Format, load_model, save_model


@pytest.fixture(scope="module")
def parts() -> ModelParts:
    """A tiny model with unequal widths and a tokenizer of two languages."""
    tokenizer = train_tokenizer({"en": ["one two three four"] * 9, "de": ["eins zwei drei vier"] * 9}, 24)
    torch.manual_seed(0)
    config = ModelConfig(
        encoder_layers=1,
        encoder_width=16,
        encoder_heads=2,
        subsampling_channels=8,
        decoder_layers=1,
        decoder_width=24,
        decoder_heads=2,
        max_positions=40,
        vocab_size=tokenizer.vocab_size,
        conv_kernel=5,
        dropout=0.2,
        label_smoothing=0.05,
        spec_augment=SpecAugmentSettings(time_masks=3),
        ctc_head=True,
    )
    return ModelParts.of(Canary(config), tokenizer.models)


def same(first: ModelParts, second: ModelParts) -> bool:
    return (
        first.config == second.config
        and first.tokenizers == second.tokenizers
        and list(first.tokenizers) == list(second.tokenizers)
        and first.state.keys() == second.state.keys()
        and all(torch.equal(value, second.state[name]) for name, value in first.state.items())
    )


def test_round_trips_are_bit_equal(parts, tmp_path):
    square = replace(parts.config, encoder_width=24)
    equal = ModelParts.of(Canary(square), parts.tokenizers)
    for model, formats in ((parts, (Format.nemo, Format.raytrain)), (equal, tuple(Format))):
        for format in formats:
            path = tmp_path / f"{model.config.encoder_width}.{format}"
            save_model(model, path, format)
            assert same(load_model(path), model), format
    with pytest.raises(CheckpointError, match="width"):
        save_model(parts, tmp_path / "unequal", Format.huggingface)


def test_an_archive_may_be_compressed(parts, tmp_path):
    write_nemo(tmp_path / "a.nemo", parts)
    (tmp_path / "b.nemo").write_bytes(gzip.compress((tmp_path / "a.nemo").read_bytes()))
    assert same(read_nemo(tmp_path / "b.nemo"), parts)


@pytest.mark.parametrize("name", ["tiny-canary", "tiny-canary2"])
def test_nemos_own_archives(name, tmp_path):
    source = SHARED / "reference" / name / "model.nemo"
    if not source.exists():
        pytest.skip("the archives that NeMo wrote are not available")
    parts = read_nemo(source)
    assert parts.config.prompt_format == json.loads((source.parent / "info.json").read_text())["prompt_format"]
    for target, format in ((tmp_path / "a.nemo", Format.nemo), (tmp_path / "b", Format.raytrain)):
        save_model(parts, target, format)
        assert same(load_model(target), parts)


def members_of(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def pack(path: Path, members: dict[str, bytes], *extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as archive:
        for member in extra:
            archive.addfile(member)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def test_hostile_archives_are_refused(parts, tmp_path):
    write_nemo(tmp_path / "good.nemo", parts)
    good = members_of(tmp_path / "good.nemo")
    victim, bad = tmp_path / "victim", tmp_path / "bad.nemo"
    weights = "./model_weights.ckpt"

    def refused(match: str, path: Path = bad, **options) -> None:
        with pytest.raises(CheckpointError, match=match):
            read_nemo(path, **options)
        assert not victim.exists() and not (tmp_path.parent / "victim").exists()

    for name in ("../victim", str(victim), "a/../../victim", "..\\victim"):
        pack(bad, {**good, name: b"x"})
        refused("escapes its folder")
    for info in (
        special("l", tarfile.SYMTYPE, "/etc/passwd"),
        special(weights, tarfile.LNKTYPE, "/etc/passwd"),
        special("d", tarfile.CHRTYPE),
        special("f", tarfile.FIFOTYPE),
    ):
        pack(bad, good, info)
        refused("link, device")
    pack(bad, {**good, "model_config.yaml": b"a: 1"})
    refused("two files with the same name")

    code = io.BytesIO()
    torch.save({"x": Evil(victim)}, code)
    pack(bad, {**good, weights: code.getvalue()})
    refused("can't be loaded")
    pack(bad, {**good, weights: pickle.dumps(Evil(victim))})
    refused("can't be read")
    bomb = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(good[weights])) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as out:
        for entry in source.infolist():
            out.writestr(entry.filename, source.read(entry))
    pack(bad, {**good, weights: bomb.getvalue()})
    refused("compressed")

    refused("too large", tmp_path / "good.nemo", max_bytes=10_000)
    bad.write_bytes(gzip.compress(bytes(50_000_000)))
    refused("too large", max_bytes=1_000_000)
    huge = {**yaml.safe_load(good["./model_config.yaml"])}
    huge["encoder"] = {**huge["encoder"], "n_layers": 10**9}
    pack(bad, {**good, "./model_config.yaml": yaml.safe_dump(huge, sort_keys=False).encode()})
    refused("encoder.n_layers is 1000000000")
    for text, match in (
        (b"a: [", "not valid YAML"),
        (b"!!python/object/apply:os.system [id]", "not valid YAML"),
        (b"[]", "no settings"),
        (b"x: 1", "no aggregate tokenizer"),
    ):
        pack(bad, {**good, "./model_config.yaml": text})
        refused(match)
    changed = yaml.safe_load(good["./model_config.yaml"])
    changed["tokenizer"]["langs"]["../../victim"] = changed["tokenizer"]["langs"].pop("en")
    pack(bad, {**good, "./model_config.yaml": yaml.safe_dump(changed, sort_keys=False).encode()})
    refused("plain name")


def test_weights_that_lie_about_their_size_or_kind_are_refused(parts, tmp_path):
    name = "encoder.layers.0.norm_out.weight"
    good = parts.state[name]
    for value, match in (
        (torch.ones(1).expand(good.shape), "plain tensor"),
        (good.to_sparse(), "plain tensor"),
        (good.to(torch.int64), "plain tensor"),
        (good.bool(), "plain tensor"),
        (good.to("meta"), "plain tensor"),
        (good.to(torch.complex64), "plain tensor"),
        (good * float("nan"), "non-finite"),
    ):
        with pytest.raises(CheckpointError, match=match):
            replace(parts, state={**parts.state, name: value}).build()
    write_nemo(tmp_path / "good.nemo", parts)
    members = members_of(tmp_path / "good.nemo")
    weights = io.BytesIO()
    torch.save({**parts.state, "bomb": torch.zeros(1, dtype=torch.float16).expand(1 << 40)}, weights)
    pack(tmp_path / "bad.nemo", {**members, "./model_weights.ckpt": weights.getvalue()})
    with pytest.raises(CheckpointError, match="unknown bomb"):
        read_nemo(tmp_path / "bad.nemo")


def test_small_files_that_decompress_to_large_ones_are_refused(parts, tmp_path):
    write_nemo(tmp_path / "good.nemo", parts)
    members, bad = members_of(tmp_path / "good.nemo"), tmp_path / "bad.nemo"
    levels = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 10)}]\n" for i in range(1, 40))
    pack(bad, {**members, "./model_config.yaml": ("b0: &b0 [x]\n" + levels).encode()})
    with pytest.raises(CheckpointError, match="aliases"):
        read_nemo(bad)
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        header = special("x", kind)
        header.size = 1 << 31
        bad.write_bytes(gzip.compress(header.tobuf() + bytes(4 << 20)))
        with pytest.raises(CheckpointError, match="header of 2147483648 bytes"):
            read_nemo(bad)
    pack(bad, members, *(special(f"d{i}", tarfile.DIRTYPE) for i in range(10_002)))
    with pytest.raises(CheckpointError, match="too large"):
        read_nemo(bad)


def test_a_checkpoint_next_to_another_tokenizer_is_refused(parts, tmp_path):
    save_model(parts, tmp_path / "own", Format.raytrain)
    train_tokenizer({"en": ["five six seven"] * 9}, 24, tmp_path / "own" / "tokenizer")
    with pytest.raises(CheckpointError, match="another tokenizer"):
        load_model(tmp_path / "own")
    sizes = {parts.config.padded_vocab_size, parts.config.padded_vocab_size - 1} - {parts.config.vocab_size}
    with pytest.raises(CheckpointError, match="tokenizer and model differ"):
        write_nemo(tmp_path / "x.nemo", replace(parts, config=replace(parts.config, vocab_size=sizes.pop())))


def test_damaged_archives_are_refused(parts, tmp_path):
    write_nemo(tmp_path / "good.nemo", parts)
    data, bad = (tmp_path / "good.nemo").read_bytes(), tmp_path / "bad.nemo"
    random = np.random.default_rng(0)
    for size in (0, 100, 700, len(data) // 2, len(data) - 20_000):
        bad.write_bytes(data[:size])
        with pytest.raises(CheckpointError):
            read_nemo(bad)
    for size in (10, 5000):
        bad.write_bytes(random.bytes(size))
        with pytest.raises(CheckpointError):
            read_nemo(bad)
    bad.write_bytes(gzip.compress(data)[: len(data) // 8])
    with pytest.raises(CheckpointError):
        read_nemo(bad)


def test_other_architectures_are_refused_with_every_difference(parts, tmp_path):
    write_nemo(tmp_path / "good.nemo", parts)
    members = members_of(tmp_path / "good.nemo")
    config = yaml.safe_load(members["./model_config.yaml"])
    config["encoder"].update(xscaling=True, conv_norm_type="layer_norm", att_context_size=[70, 1])
    config["transf_decoder"]["config_dict"]["learn_positional_encodings"] = True
    config["head"]["num_classes"] = 5
    pack(tmp_path / "x.nemo", {**members, "./model_config.yaml": yaml.safe_dump(config, sort_keys=False).encode()})
    with pytest.raises(CheckpointError) as caught:
        read_nemo(tmp_path / "x.nemo")
    for word in ("xscaling", "conv_norm_type", "att_context_size", "learn_positional_encodings", "num_classes"):
        assert word in str(caught.value)


def test_weights_that_do_not_fit_are_named(parts, tmp_path):
    state = dict(parts.state)
    state["extra"] = state.pop("encoder.pre_encode.out.bias")
    with pytest.raises(CheckpointError, match=r"missing encoder.pre_encode.out.bias.*unknown extra"):
        write_nemo(tmp_path / "x.nemo", replace(parts, state=state))
    head = {"log_softmax.mlp.layer0.weight": parts.state["log_softmax.mlp.layer0.weight"] + 1}
    with pytest.raises(CheckpointError, match="differs from the token embedding"):
        replace(parts, state={**parts.state, **head}).build()
    assert list(tmp_path.iterdir()) == []


def test_paths_without_a_model(parts, tmp_path):
    with pytest.raises(CheckpointError, match="there is no model"):
        load_model(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no model"):
        load_model(tmp_path)
    save_model(parts, tmp_path / "own", Format.raytrain)
    with pytest.raises(CheckpointError, match="exists already"):
        save_model(parts, tmp_path / "own", Format.raytrain)
    (tmp_path / "own" / "model.pt").write_bytes(b"damaged")
    with pytest.raises(RaytrainError):
        load_model(tmp_path / "own")


def test_the_commands(parts, corpus, tmp_path):
    save_model(parts, tmp_path / "own", Format.raytrain)
    run = CliRunner().invoke
    done = run(app, ["convert", str(tmp_path / "own"), str(tmp_path / "x.nemo")], catch_exceptions=False)
    assert done.exit_code == 0 and '"prompt_format": "canary2"' in done.output
    assert same(load_model(tmp_path / "x.nemo"), parts)
    row = json.loads((corpus / "test.jsonl").read_text().splitlines()[0])
    audio = str(corpus / row["audio_filepath"])
    base = ["transcribe", "--checkpoint", str(tmp_path / "x.nemo"), "--language", "en"]
    for precision in ("fp32", "bf16", "int8"):
        done = run(app, [*base, "--precision", precision, audio], catch_exceptions=False)
        assert done.exit_code == 0
    # The second recording is longer than a window; the third does not exist.
    done = run(
        app,
        [
            *base,
            "--json",
            "--beam-size",
            "2",
            "--n-best",
            "2",
            "--window-seconds",
            "1",
            "--overlap-seconds",
            "0.25",
            audio,
            audio,
            str(tmp_path / "none.wav"),
        ],
        catch_exceptions=False,
    )
    assert done.exit_code == 1
    first, second, third = (json.loads(line) for line in done.output.splitlines())
    assert {**first, "path": ""} == {**second, "path": ""} and third["error"] and third["text"] is None
    assert 0 <= first["confidence"] <= 1 and first["duration_s"] == pytest.approx(row["duration"], abs=0.01)
    for word in first["words"]:
        assert 0 <= word["start_s"] < word["end_s"] <= first["duration_s"] + 0.1 and 0 <= word["confidence"] <= 1
    assert "".join(word["text"] for word in first["words"]).replace(" ", "") == first["text"].replace(" ", "")


def test_commands_refuse_with_a_reason(parts, tmp_path):
    save_model(parts, tmp_path / "own", Format.raytrain)
    run = CliRunner().invoke
    with pytest.raises(RaytrainError, match=r"several languages.*de, en.*--language"):
        run(app, ["transcribe", "-m", str(tmp_path / "own"), "x.wav"], catch_exceptions=False)
    with pytest.raises(RaytrainError, match=r"unknown language.*fr"):
        run(app, ["transcribe", "-m", str(tmp_path / "own"), "--language", "fr", "x.wav"], catch_exceptions=False)
    with pytest.raises(RaytrainError, match="unknown precision; got fp8; allowed: fp32, bf16, int8"):
        run(
            app,
            ["transcribe", "-m", str(tmp_path / "own"), "--language", "en", "--precision", "fp8", "x.wav"],
            catch_exceptions=False,
        )
    done = run(app, ["convert", str(tmp_path / "own"), "x", "--to", "onnx"])
    assert done.exit_code == 2 and "nemo, raytrain, huggingface" in done.output
    done = run(app, ["transcribe", "-m", "x", "--n-best", "3", "x.wav"])
    assert done.exit_code == 2 and "n_best" in done.output


def test_silence_may_have_no_text_and_tiny_recordings_are_read(parts, tmp_path):
    state = {name: value.clone() for name, value in parts.state.items()}
    tokenizer = CanaryTokenizer(parts.tokenizers)
    state["log_softmax.mlp.layer0.bias"][tokenizer.eos_id] = 100.0
    paths = []
    for size in (1, 100, 700, 16_000 * 3):
        paths.append(str(tmp_path / f"{size}.wav"))
        soundfile.write(paths[-1], np.zeros(size, np.float32), 16_000)
    quiet = Transcriber(replace(parts, state=state), language="en", window_s=1, times=True)
    for path, found in zip(paths, quiet.run(paths), strict=True):
        assert (found.path, found.text, found.words, found.confidence, found.error) == (path, "", [], None, None)
    assert [found.error for found in Transcriber(parts, language="de").run(paths)] == [None] * 4
