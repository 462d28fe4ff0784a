"""Manifests, tokenizer, prompt, batch, audio, demo speech."""

import json
import pickle
import string

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.data.audio import AudioError, read_audio
from raytrain.data.batch import SpeechBatch
from raytrain.data.manifest import BadRow, Utterance, read_chunk, split_manifests
from raytrain.data.prompt import encode_utterance, prompt_ids
from raytrain.data.tokenizer import CanaryTokenizer, train_tokenizer
from raytrain.errors import ArtifactError, ManifestError, TokenizerError

GOOD = {"audio_filepath": "a.flac", "duration": 1.2345, "text": "one two", "lang": "en"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer({"en": ["one two three", string.ascii_lowercase], "de": ["eins zwei drei"]}, 64)


def write_manifest(path, rows) -> None:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


@given(
    lines=st.lists(st.integers(0, 60), min_size=1, max_size=30),
    chunk=st.integers(1, 200),
    newline=st.booleans(),
)
@settings(max_examples=60)
def test_chunks_hold_every_line_once(tmp_path_factory, lines, chunk, newline):
    path = tmp_path_factory.mktemp("m") / "m.jsonl"
    texts = [f"t{number} {'x' * size}" for number, size in enumerate(lines)]
    body = "\n".join(json.dumps({**GOOD, "text": text}) for text in texts) + "\n" * newline
    path.write_text(body)
    found = [row.text for part in split_manifests([path], chunk) for row in read_chunk(part, None)]
    assert found == [text.strip() for text in texts]


def test_rows_become_utterances(tmp_path):
    path = tmp_path / "m.jsonl"
    write_manifest(path, [GOOD, {**GOOD, "source_lang": "en", "target_lang": "de", "pnc": "no", "offset": 0.5}])
    first, second = read_chunk(split_manifests([path])[0], {"en", "de"})
    assert first == Utterance(str(tmp_path / "a.flac"), 0, 1235, "one two", "en", "en", True)
    assert (second.target_lang, second.pnc, second.offset_ms) == ("de", False, 500)


def test_bad_rows_are_named_by_file_line_and_reason(tmp_path):
    path = tmp_path / "m.jsonl"
    rows = [
        GOOD, "{broken", "", {**GOOD, "duration": 0}, {**GOOD, "duration": -1}, {**GOOD, "duration": "x"},
        {**GOOD, "text": "  "}, {"duration": 1}, {**GOOD, "lang": "xx"}, {**GOOD, "_skipme": True}, "[1]",
        {**GOOD, "offset": -2}, {**GOOD, "duration": float("inf")}, GOOD,
    ]  # fmt: skip
    write_manifest(path, rows)
    found = [row for part in split_manifests([path], 100) for row in read_chunk(part, {"en"})]
    bad = [(row.line, row.reason) for row in found if isinstance(row, BadRow)]
    assert bad == [
        (2, "bad_json"), (4, "bad_duration"), (5, "bad_duration"), (6, "bad_duration"), (7, "empty_text"),
        (8, "missing_field"), (9, "unknown_language"), (10, "skipme"), (11, "bad_json"), (12, "bad_duration"),
        (13, "bad_json"),
    ]  # fmt: skip
    assert all(row.file == str(path) for row in found if isinstance(row, BadRow))
    assert sum(isinstance(row, Utterance) for row in found) == 2


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(ManifestError, match="none.jsonl can't be read; because no such file.*RAYTRAIN_DATA_ROOT"):
        split_manifests([tmp_path / "none.jsonl"])


@given(st.text(alphabet=string.ascii_lowercase + " ", min_size=1))
def test_decoding_an_encoded_text_gives_it_back(tokenizer, text):
    text = " ".join(text.split())
    assert tokenizer.decode(tokenizer.encode_text(text, "en")) == text


def test_ids_are_concatenated_in_order_and_specials_are_dropped(tokenizer):
    assert tokenizer.languages == ("de", "en")
    english, german = tokenizer.encode_text("one", "en"), tokenizer.encode_text("eins", "de")
    assert min(english) > max(german) > tokenizer.special("<|en|>")
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (2, 3, 4)
    assert tokenizer.decode([tokenizer.bos_id, *english, tokenizer.eos_id, tokenizer.vocab_size + 3]) == "one"


def test_tokenizer_on_disk_and_across_processes(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for copy in (CanaryTokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.id == tokenizer.id and copy.encode_text("two", "en") == tokenizer.encode_text("two", "en")
    (tmp_path / "en.model").write_bytes((tmp_path / "de.model").read_bytes())
    with pytest.raises(ArtifactError, match="changed after"):
        CanaryTokenizer.load(tmp_path)


def test_training_a_tokenizer_twice_gives_equal_bytes():
    texts = {"en": ["one two three four"] * 5}
    assert train_tokenizer(texts, 40).id == train_tokenizer(texts, 40).id


def test_unknown_languages_list_what_is_allowed(tokenizer):
    with pytest.raises(TokenizerError, match="got fr; allowed: de, en"):
        tokenizer.encode_text("un", "fr")
    with pytest.raises(TokenizerError, match="unknown language; got fr"):
        prompt_ids(tokenizer, "fr", "en")


def test_an_utterance_is_prompt_text_and_end(tokenizer):
    encoded = encode_utterance(tokenizer, Utterance("a", 0, 1000, "one two", "en", "en", False))
    pieces = [tokenizer.special(token) for token in (
        "<|startofcontext|>", "<|startoftranscript|>", "<|emo:undefined|>", "<|en|>", "<|en|>", "<|nopnc|>",
        "<|noitn|>", "<|notimestamp|>", "<|nodiarize|>")]  # fmt: skip
    assert encoded.ids == [*pieces, *tokenizer.encode_text("one two", "en"), tokenizer.eos_id]
    assert encoded.prompt_length == 9


def test_collate_pads_and_separates_the_text():
    audios = [np.ones(5, np.float32), np.ones(3, np.float32)]
    batch = SpeechBatch.collate(audios, [[7, 8, 20, 21, 3], [7, 8, 22, 3]], [2, 2], pad_id=2)
    assert batch.audio.tolist()[1] == [1, 1, 1, 0, 0]
    assert batch.tokens.tolist()[1] == [7, 8, 22, 3, 2]
    assert batch.ctc_target_lengths().tolist() == [2, 1]
    assert batch.ctc_targets()[0, :2].tolist() == [20, 21] and batch.ctc_targets()[1, :1].tolist() == [22]
    assert batch.input_lengths.tolist() == [4, 3]


def test_synthetic_batches_have_the_shapes_of_real_ones():
    for device in ("cpu", "meta"):
        batch = SpeechBatch.synthetic(3, 1500, 20, vocab=50, device=device)
        assert batch.audio.shape == (3, 24000) and batch.tokens.shape == (3, 20)
        assert batch.audio.dtype == torch.float32 and len(batch) == 3


def test_audio_is_cut_resampled_and_mixed_down(tmp_path):
    tone = np.sin(np.arange(16000) / 16000 * 2 * np.pi * 200).astype(np.float32) * 0.5
    soundfile.write(tmp_path / "a.flac", np.stack((tone[::2], tone[::2]), 1), 8000)
    whole = read_audio(str(tmp_path / "a.flac"), sample_rate=16000)
    assert whole.shape == (16000,) and whole.dtype == np.float32
    np.testing.assert_allclose(whole[2000:14000], tone[2000:14000], atol=0.01)
    part = read_audio(str(tmp_path / "a.flac"), offset_ms=250, duration_ms=500, sample_rate=8000)
    assert len(part) == 4000


def test_broken_and_missing_audio_is_an_error_with_its_path(tmp_path):
    (tmp_path / "b.flac").write_bytes(b"not audio")
    for name in ("b.flac", "none.flac"):
        with pytest.raises(AudioError, match=name):
            read_audio(str(tmp_path / name), sample_rate=16000)


def test_demo_speech_is_real_reproducible_and_holds_out_strings(corpus, tmp_path):
    from raytrain.demo.speech import make_corpus

    again = make_corpus(tmp_path, {"train": 96, "dev": 8, "test": 10}, seed=3, languages=("en", "de"))
    texts = {}
    for split, path in again.items():
        assert path.read_bytes() == (corpus / f"{split}.jsonl").read_bytes()
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        texts[split] = {(row["source_lang"], row["text"]) for row in rows}
    assert not texts["train"] & (texts["dev"] | texts["test"])
    name = "audio/train-00000.flac"
    samples, _ = soundfile.read(corpus / name)
    assert np.abs(samples).max() > 0.05
    assert (tmp_path / name).read_bytes() == (corpus / name).read_bytes()
