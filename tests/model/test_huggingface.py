"""Hugging Face folders: equal results in transformers, bit-equal round trips, and rejected models."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raytrain.data.text.tokenizer import CanaryTokenizer, train_tokenizer
from raytrain.errors import CheckpointError, StorageError
from raytrain.model.canary import Canary
from raytrain.model.config import ModelConfig, SpecAugmentSettings
from raytrain.model.formats.huggingface import read_huggingface, write_huggingface
from raytrain.model.formats.portable import ModelParts

safetensors = pytest.importorskip("safetensors.torch")
TINY = ModelConfig(
    encoder_layers=2,
    encoder_width=64,
    encoder_heads=4,
    subsampling_channels=8,
    decoder_layers=2,
    decoder_width=64,
    decoder_heads=2,
    decoder_ff_factor=3,
    max_positions=96,
    vocab_size=61,
    dropout=0.2,
    label_smoothing=0.1,
    spec_augment=SpecAugmentSettings(time_masks=3),
)


@pytest.fixture(scope="module")
def tokenizer() -> CanaryTokenizer:
    return train_tokenizer({"en": ["one two three"], "de": ["eins zwei drei"]}, vocab_size=16)


def random_parts(config: ModelConfig = TINY, tokenizer: CanaryTokenizer | None = None) -> ModelParts:
    """A model whose every weight and statistic is random."""
    torch.manual_seed(0)
    model = Canary(config)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.is_floating_point() and "preprocessor" not in name and "pos_enc" not in name:
            value.add_(torch.randn_like(value), alpha=0.1)
    return ModelParts.of(model, tokenizer.models if tokenizer else {})


def assert_equal(left: ModelParts, right: ModelParts) -> None:
    assert left.config == right.config
    assert list(left.tokenizers.items()) == list(right.tokenizers.items())
    assert left.state.keys() == right.state.keys()
    assert all(torch.equal(left.state[name], right.state[name]) for name in left.state)


@torch.no_grad()
def largest_difference(parts: ModelParts, theirs) -> float:
    """Of encoder states and of log-probabilities at all positions, for two utterances of different length."""
    ours, theirs = parts.build(), theirs.eval()
    torch.manual_seed(1)
    ids = torch.randint(parts.config.vocab_size, (2, parts.config.max_positions))
    mel, frames = ours.preprocessor(torch.randn(2, 16000), torch.tensor([16000, 9000]))
    states, lengths = ours.encoder(mel, frames)
    mine = ours.decode_logits(ids, states, lengths).log_softmax(-1)
    valid = torch.arange(mel.shape[2]) < frames[:, None]
    output = theirs(input_features=mel.transpose(1, 2), attention_mask=valid.long(), decoder_input_ids=ids)
    in_time = torch.arange(states.shape[1]) < lengths[:, None]
    encoder = (states - output.encoder_last_hidden_state)[in_time].abs().max()
    return max(encoder.item(), (mine - output.logits.log_softmax(-1)).abs().max().item())


def edit(path: Path, **changes) -> None:
    """Change settings of a JSON file; `a__b` is b within a."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *section, key = name.split("__")
        (content[section[0]] if section else content)[key] = value
    path.write_text(json.dumps(content))


def test_what_is_written_reads_back_bit_equal(tmp_path, tokenizer):
    parts = random_parts(replace(TINY, vocab_size=tokenizer.vocab_size), tokenizer)
    parts.state["preprocessor.featurizer.fb"] += 1e-9  # NeMo's differs from ours in the last bits
    write_huggingface(parts, tmp_path / "new" / "model")
    assert_equal(parts, read_huggingface(tmp_path / "new" / "model"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_transformers_computes_the_same(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    parts = random_parts(replace(TINY, vocab_size=tokenizer.vocab_size), tokenizer)
    write_huggingface(parts, tmp_path)
    theirs, report = transformers.CanaryForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert largest_difference(parts, theirs) < 1e-4
    assert theirs.config.eos_token_id == tokenizer.eos_id and theirs.config.pad_token_id == tokenizer.pad_id
    assert theirs.config.decoder_start_token_id == tokenizer.special("<|startofcontext|>")

    features = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    audio = torch.randn(16000)
    mel, _ = parts.build().preprocessor(audio[None], torch.tensor([16000]))
    mel_bins = features(audio.numpy(), sampling_rate=16000).input_features
    torch.testing.assert_close(mel_bins.transpose(1, 2), mel, atol=1e-3, rtol=0)

    # Saved there and read here: in a new folder, and over ours, whose settings and tokenizers are then kept.
    theirs.save_pretrained(tmp_path / "saved", max_shard_size="100KB")
    again = read_huggingface(tmp_path / "saved")
    assert all(torch.equal(parts.state[name], again.state[name]) for name in parts.state) and not again.tokenizers
    theirs.save_pretrained(tmp_path)
    assert_equal(parts, read_huggingface(tmp_path))


def random_theirs(transformers, **encoder):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = {"model_type": "parakeet_encoder", "scale_input": False, "layerdrop": 0.0, **sizes, **encoder}
    decoder = {**sizes, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 64}
    config = transformers.CanaryConfig(
        vocab_size=64,
        encoder_config={"subsampling_conv_channels": 8, "num_mel_bins": 80, **encoder},
        decoder_config=decoder | {"max_position_embeddings": 96},
    )
    model = transformers.CanaryForConditionalGeneration(config)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 2) if name.endswith("running_var") else value.add_(0.1 * torch.randn_like(value))
    return model


def test_a_model_of_transformers_computes_the_same_here(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = random_theirs(transformers)
    theirs.save_pretrained(tmp_path)
    parts = read_huggingface(tmp_path)
    assert (parts.config.mel_bins, parts.config.encoder_ff_factor, parts.config.dropout) == (80, 2, 0.1)
    assert largest_difference(parts, theirs) < 1e-4


def test_a_model_of_transformers_that_ours_cannot_compute(tmp_path):
    transformers = pytest.importorskip("transformers")
    random_theirs(transformers, scale_input=True, layerdrop=0.1, convolution_bias=False).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="convolution_bias is.*scale_input is True.*layerdrop is 0.1.*to do"):
        read_huggingface(tmp_path)


def test_all_that_cannot_be_written_is_named(tmp_path):
    parts = random_parts(replace(TINY, encoder_width=32))
    parts.state["log_softmax.mlp.layer0.weight"] = parts.state["log_softmax.mlp.layer0.weight"].half()
    parts.state["transf_decoder._embedding.position_embedding.pos_enc"][0] += 1
    with pytest.raises(
        CheckpointError, match=r"no projection.*head's weight.*float16.*pos_enc.*plain tokenizer name"
    ) as caught:
        write_huggingface(replace(parts, tokenizers={"../en": b""}), tmp_path / "model")
    assert "32 differs from decoder_width 64" in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("config.json", {"encoder_config__hidden_act": "gelu", "tie_word_embeddings": False}, "tie_.*gelu"),
        ("config.json", {"encoder_config__hidden_size": 32, "vocab_size": None}, "vocab_size is None.*is 32 instead"),
        ("config.json", {"decoder_config__num_attention_heads": 1 << 40}, "1099511627776 instead of a whole number"),
        ("config.json", {"encoder_config": 3, "decoder_config": []}, "encoder_config.num_hidden_layers is None"),
        ("config.json", {"encoder_config__num_attention_heads": 2}, "encoder_heads is 4 and 2"),
        ("preprocessor_config.json", {"n_fft": 400, "feature_size": 80}, "n_fft is 400.*feature_size is 80"),
        ("raytrain.json", {"tokenizers": ["../../secret"]}, "plain names"),
        ("raytrain.json", {"config__encoder_layers": "2"}, "encoder_layers must be int"),
        ("raytrain.json", {"config__flash": True}, "flash"),
        ("raytrain.json", {"format": "raytrain.huggingface/9"}, "huggingface/9"),
    ],
)
def test_other_settings_are_refused(tmp_path, file, changes, message):
    write_huggingface(random_parts(), tmp_path)
    edit(tmp_path / file, **changes)
    with pytest.raises(CheckpointError, match=message):
        read_huggingface(tmp_path)


def test_other_weights_are_refused(tmp_path):
    write_huggingface(random_parts(), tmp_path)
    path = tmp_path / "model.safetensors"
    weights = safetensors.load_file(path)
    tensors = {name: value.clone() for name, value in weights.items()}
    tensors["adapter"] = tensors.pop("model.decoder.norm.bias")
    tensors["model.decoder.norm.weight"] = torch.ones(7)
    safetensors.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"norm.weight.*norm.bias.*1 unknown \['adapter'\]"):
        read_huggingface(tmp_path)
    tensors = {name: value.clone() for name, value in weights.items()}
    safetensors.save_file(tensors | {"proj_out.weight": torch.ones(64, 64)}, path)
    with pytest.raises(CheckpointError, match="tied"):
        read_huggingface(tmp_path)
    path.write_bytes(b"\x80\x04 a pickle")
    with pytest.raises(CheckpointError, match="model.safetensors can't be read"):
        read_huggingface(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(CheckpointError, match="outside"):
        read_huggingface(tmp_path)


def test_a_nonempty_folder_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(StorageError, match="new or empty"):
        write_huggingface(random_parts(), tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        write_huggingface(random_parts(), tmp_path)
