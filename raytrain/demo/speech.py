"""Synthesize a small corpus of spoken digits in four languages with eSpeak NG, a library that comes in a wheel.

Utterances are strings of one to five digit words with random speed and pitch. Word strings of the held-out splits do
not occur in training. The same seed produces the same files.

    manifests = make_corpus(Path("corpus"), {"train": 800, "test": 80}, seed=1)
"""

from __future__ import annotations

import ctypes
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson

from raytrain.errors import DataError, last_line
from raytrain.storage.artifacts import atomic_write_bytes, canonical_json, make_folder

DIGITS = {
    "en": "zero one two three four five six seven eight nine",
    "de": "null eins zwei drei vier fünf sechs sieben acht neun",
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve",
    "fr": "zéro un deux trois quatre cinq six sept huit neuf",
}
MAX_WORDS = 5
_SYNCHRONOUS, _UTF8, _RATE, _PITCH = 2, 1, 1, 3
_SILENCE = 300  # samples kept around the speech, of full scale 2¹⁵
_COMPLETE = "corpus.json"


class Synthesizer:
    """eSpeak NG in this process: one instance at a time, since the library keeps global state."""

    def __init__(self) -> None:
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._library.espeak_Initialize.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int]
        self.sample_rate = self._library.espeak_Initialize(
            _SYNCHRONOUS, 0, str(Path(espeakng_loader.get_data_path())).encode(), 0
        )
        if self.sample_rate <= 0:
            raise DataError("eSpeak NG can't start", got=self.sample_rate, remedy="reinstall espeakng-loader")
        self._blocks: list[np.ndarray] = []
        # Kept as an attribute: the library calls it for as long as the instance lives.
        signature = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = signature(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: ctypes._Pointer[ctypes.c_short], number: int, events: int) -> int:
        if samples and number > 0:
            self._blocks.append(np.ctypeslib.as_array(samples, (number,)).copy())
        return 0

    def speak(self, text: str, language: str, *, words_per_minute: int = 160, pitch: int = 50) -> np.ndarray:
        """(num_samples,) int16 at `sample_rate` Hz. `pitch` is 0 to 100."""
        self._blocks = []
        if self._library.espeak_SetVoiceByName(language.encode()) != 0:
            raise DataError(
                "eSpeak NG has no such voice", got=language, remedy="choose a language from `espeak-ng --voices`"
            )
        self._library.espeak_SetParameter(_RATE, words_per_minute, 0)
        self._library.espeak_SetParameter(_PITCH, pitch, 0)
        data = text.encode() + b"\0"
        self._library.espeak_Synth(data, len(data), 0, 1, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        return _trim(np.concatenate(self._blocks)) if self._blocks else np.zeros(0, np.int16)


def _trim(samples: np.ndarray, margin: int = 1500) -> np.ndarray:
    loud = np.flatnonzero(np.abs(samples) > _SILENCE)
    return samples[max(0, loud[0] - margin) : loud[-1] + margin] if len(loud) else samples


def make_corpus(
    folder: Path,
    utterances: dict[str, int],
    *,
    seed: int,
    languages: tuple[str, ...] = tuple(DIGITS),
    on_utterance: Callable[[], None] | None = None,
) -> dict[str, Path]:
    """Write `<split>.jsonl` NeMo manifests with FLAC audio for `utterances` (split → number); returns their paths.

    A folder that is already complete for the same arguments is not written again. Raises `DataError` for an unknown
    language.
    """
    unknown = set(languages) - set(DIGITS)
    if unknown:
        raise DataError(
            "unknown demo language", got=sorted(unknown), allowed=", ".join(DIGITS), remedy="remove the language"
        )
    manifests = {split: folder / f"{split}.jsonl" for split in utterances}
    made_of = canonical_json({"utterances": utterances, "seed": seed, "languages": languages, "version": 1})
    marker = folder / _COMPLETE
    files = (marker, *manifests.values())
    if all(path.exists() for path in files) and marker.read_bytes() == made_of:
        return manifests
    make_folder(folder / "audio")
    arguments = {"folder": str(folder), "utterances": utterances, "seed": seed, "languages": languages}
    # The library's output depends on what it synthesized before in the same process, hence a separate process.
    command = [sys.executable, "-m", "raytrain.demo.speech", json.dumps(arguments)]
    _call(command, on_utterance)
    atomic_write_bytes(marker, made_of)
    return manifests


def _call(command: list[str], on_line: Callable[[], None] | None) -> None:
    """Run the command, calling `on_line` for each line it prints. Raises `DataError` if it fails."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for _ in process.stdout or ():
            if on_line is not None:
                on_line()
        problem = last_line(process.stderr.read().decode()) if process.stderr else ""
    if process.returncode:
        raise DataError(
            "the demo's speech can't be made",
            why=problem or "the process died",
            remedy="pip install --force-reinstall espeakng-loader, and check that the folder can be written",
        )


def _synthesize(folder: Path, utterances: dict[str, int], seed: int, languages: tuple[str, ...]) -> None:
    """Write manifests and audio; one line of output per utterance."""
    voice = Synthesizer()
    for split, rows in _draw_texts(utterances, languages, random.Random(seed)).items():
        lines = []
        for number, (language, text) in enumerate(rows):
            lines.append(_make_utterance(voice, folder, split, number, language, text, seed))
            print(flush=True)
        atomic_write_bytes(folder / f"{split}.jsonl", b"".join(orjson.dumps(line) + b"\n" for line in lines))


def _draw_texts(
    utterances: dict[str, int], languages: tuple[str, ...], rng: random.Random
) -> dict[str, list[tuple[str, str]]]:
    """(language, text) per split, small splits first, so that their texts are kept out of the large one."""
    held_out: set[tuple[str, str]] = set()
    drawn: dict[str, list[tuple[str, str]]] = {}
    for split in sorted(utterances, key=lambda name: (utterances[name], name)):
        is_largest = utterances[split] == max(utterances.values())
        rows: list[tuple[str, str]] = []
        while len(rows) < utterances[split]:
            language = languages[len(rows) % len(languages)]
            # Single words occur in every split; only strings can be held out.
            length = rng.randint(1 if is_largest else 2, MAX_WORDS)
            row = (language, " ".join(rng.choices(DIGITS[language].split(), k=length)))
            if is_largest and row in held_out:
                continue
            rows.append(row)
        held_out.update(rows)
        drawn[split] = rows
    return drawn


def _make_utterance(
    voice: Synthesizer, folder: Path, split: str, number: int, language: str, text: str, seed: int
) -> dict[str, str | float]:
    import soundfile

    rng = random.Random(f"{seed} {split} {number}")
    samples = voice.speak(text, language, words_per_minute=rng.randint(130, 200), pitch=rng.randint(25, 75))
    name = f"audio/{split}-{number:05d}.flac"
    soundfile.write(folder / name, samples, voice.sample_rate, subtype="PCM_16")
    return {
        "audio_filepath": name,
        "duration": round(len(samples) / voice.sample_rate, 4),
        "text": text,
        "source_lang": language,
        "target_lang": language,
        "taskname": "asr",
        "pnc": "no",
    }


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    _synthesize(Path(given["folder"]), given["utterances"], given["seed"], tuple(given["languages"]))
