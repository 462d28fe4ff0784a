"""Canary: log-mel features, FastConformer encoder, Transformer decoder, head tied to the token embedding.

Parameter names are those of NeMo's `EncDecMultiTaskModel`, so its state dicts load unchanged.

    model = Canary(ModelConfig())
    out = model(audio, audio_lengths, input_ids, input_lengths)      # out.logits: (B, U, V)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from raytrain.model.checkpointing import eager_part
from raytrain.model.config import Checkpointing, ModelConfig
from raytrain.model.decoder import TransformerDecoder, initialize
from raytrain.model.encoder import FastConformer
from raytrain.model.features import LogMelFeatures, SpecAugment, mask_until
from raytrain.model.linear import Linear, affine_of
from raytrain.model.mixed import MixedLinear


class CanaryOutput(NamedTuple):
    """Training outputs: logits (B, U, V), encoder states (B, T, D) with lengths (B,), CTC logits (B, T, V+1)."""

    logits: Tensor
    encoder_states: Tensor
    encoder_lengths: Tensor
    ctc_logits: Tensor | None


class _Head(nn.Module):
    """Holds the output layer under NeMo's names (`mlp.layer0`)."""

    def __init__(self, width: int, vocab: int) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"layer0": MixedLinear(width, vocab)})

    @property
    def linear(self) -> nn.Linear:
        """The output layer of a model that is not prepared for inference."""
        layer = self.mlp["layer0"]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp["layer0"](x)


class Canary(nn.Module):
    """The model; `encode` and `decode_logits` are the two halves, `forward` is both for training."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        vocab, width = config.padded_vocab_size, config.decoder_width
        self.preprocessor = LogMelFeatures(config.mel_bins, config.sample_rate)
        self.spec_augment = SpecAugment(config.spec_augment)
        self.encoder = FastConformer(config)
        if config.encoder_width != width:
            self.encoder_decoder_proj = MixedLinear(config.encoder_width, width)
        self.transf_decoder = TransformerDecoder(config)
        self.log_softmax = _Head(width, vocab)
        if config.ctc_head:
            self.ctc_head = MixedLinear(config.encoder_width, vocab + 1)
        if not self.preprocessor.featurizer.fb.is_meta:
            initialize(self.transf_decoder)
            nn.init.zeros_(self.log_softmax.linear.bias)
        self.tie_head()

    def _encode(
        self, audio_BS: Tensor, lengths_B: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mel, frames = self.preprocessor(audio_BS, lengths_B)
        raw, lengths = self.encoder(self.spec_augment(mel, frames).to(dtype or mel.dtype), frames)
        states = raw
        if self.config.encoder_width != self.config.decoder_width:
            states = self.encoder_decoder_proj(raw)
        return raw, states, lengths

    def encode(self, audio_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """audio (B, S) in samples → encoder states (B, T, decoder width), lengths (B,) in 80 ms frames."""
        _, states, lengths = self._encode(audio_BS, lengths_B)
        return states, lengths

    def encode_with_ctc(self, audio_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `encode`, and the CTC head's log-probabilities (B, T, V + 1), the blank last."""
        raw, states, lengths = self._encode(audio_BS, lengths_B)
        return states, lengths, self.ctc_head(raw).float().log_softmax(-1)

    def cross_mask(self, states_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """(B, 1, 1, T) bool: the frames that cross-attention may attend to."""
        return mask_until(lengths_B.clamp_min(1), states_BTD.shape[1])[:, None, None]

    def decode_logits(self, input_ids: Tensor, states: Tensor, state_lengths: Tensor) -> Tensor:
        """ids (B, U) → next-token logits (B, U, V). Padding at the end of `input_ids` needs no mask."""
        hidden = self.transf_decoder(input_ids, states, self.cross_mask(states, state_lengths))
        return self.log_softmax(hidden)

    def forward(
        self,
        audio: Tensor,
        audio_lengths: Tensor,
        input_ids: Tensor,
        input_lengths: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> CanaryOutput:
        """Training outputs, computed from the features on in `dtype` (by default theirs, float32); see `mixed`."""
        raw, states, lengths = self._encode(audio, audio_lengths, dtype)
        logits = self.decode_logits(input_ids, states, lengths)
        ctc = self.ctc_head(raw) if self.config.ctc_head else None
        return CanaryOutput(logits, states, lengths, ctc)

    def head(self) -> Linear:
        """The output layer as a linear map for inference: hidden (…, D) → logits (…, V)."""
        return affine_of(self.log_softmax.mlp["layer0"])

    def tie_head(self) -> None:
        """Tie the head's weight to the token embedding's."""
        self.log_softmax.linear.weight = self.transf_decoder._embedding.token_embedding.weight

    def set_checkpointing(self, mode: Checkpointing, *, compiled: bool = False) -> None:
        """What training keeps of the encoder's blocks, and with `selective` of the decoder's; `compiled` if they are
        compiled with `checkpointing.compile_options(mode)`."""
        self.encoder.checkpointing = eager_part(mode, compiled=compiled)
        self.transf_decoder.checkpointing = "none" if mode == "full" else self.encoder.checkpointing

    def fuse_attention(self, fused: bool) -> None:
        """Whether training computes the encoder's attention by `relative_attention`, which keeps no scores."""
        for block in self.encoder.layers:
            block.self_attn.fused = fused

    def reset_constants(self) -> None:
        """Refill filterbank, window and position table after `to_empty` of a model created on meta."""
        self.preprocessor.featurizer.reset()
        self.transf_decoder._embedding.position_embedding.reset()


def exported_state(model: Canary) -> dict[str, Tensor]:
    """The state dict without the auxiliary CTC head."""
    with torch.no_grad():
        return {name: value for name, value in model.state_dict().items() if not name.startswith("ctc_head.")}
