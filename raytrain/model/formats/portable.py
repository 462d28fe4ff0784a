"""A model independent of its source: the common content of `.nemo` files, Hugging Face folders and our checkpoints.

parts = read_nemo(Path("canary.nemo"))
parts.config.decoder_layers, list(parts.tokenizers)      # 4, ['spl_tokens', 'en', 'de']
model = parts.build()
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from raytrain.errors import CheckpointError
from raytrain.model.canary import Canary, exported_state
from raytrain.model.config import ModelConfig

EMBEDDING, HEAD = "transf_decoder._embedding.token_embedding.weight", "log_softmax.mlp.layer0.weight"


@dataclass(frozen=True)
class ModelParts:
    """Settings, weights under NeMo's names without the CTC head, and the tokenizer.

    `tokenizers` maps `spl_tokens`, then each language, to a serialized SentencePiece model, in id order.
    """

    config: ModelConfig
    state: dict[str, Tensor]
    tokenizers: dict[str, bytes]

    @classmethod
    def of(cls, model: Canary, tokenizers: dict[str, bytes]) -> ModelParts:
        """The parts of a live model."""
        return cls(replace(model.config, ctc_head=False), exported_state(model), dict(tokenizers))

    @classmethod
    def of_state(cls, config: ModelConfig, state: dict[str, Tensor], tokenizers: dict[str, bytes]) -> ModelParts:
        """The parts of a state dict that `check_state` accepts; a CTC head is dropped."""
        kept = {name: value for name, value in state.items() if not name.startswith("ctc_head.")}
        return cls(replace(config, ctc_head=False), kept, dict(tokenizers))

    def build(self) -> Canary:
        """The model in eval mode, its weights those of `state` (not copied). Raises `CheckpointError`."""
        with torch.device("meta"):
            model = Canary(replace(self.config, ctc_head=False))
        check_state(self.config, self.state)
        model.load_state_dict(self.state, assign=True)
        model.tie_head()
        return model.requires_grad_(True).eval()


def state_shapes(config: ModelConfig) -> dict[str, Tensor]:
    """The state of such a model on meta: names, shapes and dtypes without values."""
    with torch.device("meta"):
        return exported_state(Canary(replace(config, ctc_head=False)))


def float32_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with its floats as float32: half-precision files load in the precision that the model computes in."""
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def check_state(config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Raises `CheckpointError` that lists missing, unknown, misshapen and non-finite weights, and an untied head."""
    _check_shapes(state_shapes(config), state)
    _check_finite(state)
    if not torch.equal(state[HEAD], state[EMBEDDING]):
        raise CheckpointError(
            "the head's weight differs from the token embedding",
            allowed="models whose head is tied to the embedding, as all published Canary models are",
            remedy="train the model with a tied head; two matrices can't become one",
        )


def _check_shapes(expected: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    problems = [f"missing {name}" for name in missing[:3]] + [f"unknown {name}" for name in unknown[:3]]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ][:3]
    problems += [
        f"{name} is not a plain tensor of numbers ({value.dtype}, {value.layout}, {value.device})"
        for name, value in state.items()
        if name in expected and not _is_plain(value, expected[name])
    ][:3]
    if problems:
        raise CheckpointError(
            "the weights do not fit the model's settings",
            got="; ".join(problems),
            why=f"{len(missing)} names are missing and {len(unknown)} unknown",
            remedy="take weights and settings from the same model; if they are, download or save it again",
        )


def _is_plain(value: Tensor, expected: Tensor) -> bool:
    """Dense, not an expanded view, and floating-point if a float is expected."""
    return (
        value.layout is torch.strided
        and not value.is_meta
        and value.is_floating_point() == expected.is_floating_point()
        and not value.is_complex()
        and value.dtype != torch.bool
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )


def _check_finite(state: dict[str, Tensor]) -> None:
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            "the weights have non-finite values",
            got=", ".join(broken[:3]),
            why="training went wrong before they were saved, or the file is damaged",
            remedy="name an earlier checkpoint, or download the model again",
        )
