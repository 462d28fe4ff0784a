"""Largest differences between our Canary and recorded outputs of NeMo: MODEL.nemo EXPECTED.npz.

The recording holds `wave` (N, samples) zero-padded and `wave_len`; `mel` (N, bins, frames), `mel_len`; `enc`
(N, frames, width), `enc_len`; `ids` (N, tokens), `ids_len`; `logp` (N, tokens, vocabulary). Valid frames and
tokens are compared, all utterances in one batch and each alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from raytrain.model.canary import Canary
from raytrain.model.formats.nemo import read_nemo


@torch.no_grad()
def differences(model: Canary, expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference of `mel`, `encoder`, `log_probs` over valid frames and tokens."""
    wave, wave_len, ids = expected["wave"].float(), expected["wave_len"].long(), expected["ids"].long()
    found: dict[str, list[Tensor]] = {"mel": [], "encoder": [], "log_probs": []}
    number = len(wave)
    for rows in [list(range(number)), *([row] for row in range(number))]:
        samples = int(wave_len[rows].max())
        audio, lengths = wave[rows, :samples], wave_len[rows]
        mel, frames = model.preprocessor(audio, lengths)
        states, sizes = model.encode(audio, lengths)
        tokens = int(expected["ids_len"][rows].max())
        log_probs = model.decode_logits(ids[rows, :tokens], states, sizes).log_softmax(-1)
        for place, row in enumerate(rows):
            for name, key, value, size, axis in (
                ("mel", "mel", mel[place].T, frames[place], 1),
                ("encoder", "enc", states[place], sizes[place], 0),
                ("log_probs", "logp", log_probs[place], expected["ids_len"][row], 0),
            ):
                if key + "_len" in expected and int(expected[key + "_len"][row]) != int(size):
                    raise SystemExit(f"{name} of utterance {row} has {int(size)} frames, the recording another number")
                wanted = expected[key][row].movedim(axis, 0)[: int(size)].float()
                found[name].append((value[: int(size)] - wanted).abs().max())
    # A tensor's maximum is NaN where there is one, which Python's is not.
    return {name: float(torch.stack(values).max()) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a .nemo archive")
    parser.add_argument("expected", type=Path, help="the .npz with NeMo's outputs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with np.load(arguments.expected, allow_pickle=False) as file:
        expected = {name: torch.from_numpy(file[name]) for name in file.files}
    found = differences(read_nemo(arguments.model).build(), expected)
    print(json.dumps(found) if arguments.json else "\n".join(f"{key}: {value:.2e}" for key, value in found.items()))


if __name__ == "__main__":
    main()
