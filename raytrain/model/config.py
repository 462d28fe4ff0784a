"""Settings of a Canary model; the defaults are canary-180m-flash."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from raytrain.ranges import Range, range_problems, refuse

Width = Annotated[int, Range(1, 65_536)]
Layers = Annotated[int, Range(1, 512)]


@dataclass(frozen=True)
class SpecAugmentSettings:
    """SpecAugment: `freq_masks` bands of up to `freq_width` mel bins, `time_masks` spans of up to
    `time_width` of the utterance."""

    __pydantic_config__ = {"extra": "forbid"}

    freq_masks: Annotated[int, Range(0, 1000)] = 2
    freq_width: Annotated[int, Range(0, 65_536)] = 27
    time_masks: Annotated[int, Range(0, 1000)] = 10
    time_width: Annotated[float, Range(0, 1)] = 0.05

    def __post_init__(self) -> None:
        refuse(range_problems(self))


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Canary model: FastConformer encoder, Transformer decoder, tied head.

    `vocab_size` counts the tokenizer's ids; embedding and head are padded to a multiple of 8. With `ctc_head`
    the encoder gets a linear CTC output, which helps training start and is left out of exported models.
    """

    __pydantic_config__ = {"extra": "forbid"}

    encoder_layers: Layers = 17
    encoder_width: Width = 512
    encoder_heads: Width = 8
    encoder_ff_factor: Annotated[int, Range(1, 64)] = 4
    subsampling_channels: Width = 256
    conv_kernel: Annotated[int, Range(1, 1023)] = 9
    decoder_layers: Layers = 4
    decoder_width: Width = 1024
    decoder_heads: Width = 8
    decoder_ff_factor: Annotated[int, Range(1, 64)] = 4
    max_positions: Annotated[int, Range(1, 1 << 20)] = 1024
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.1
    vocab_size: Annotated[int, Range(1, 1 << 24)] = 5248
    prompt_format: str = "canary2"
    label_smoothing: Annotated[float, Range(0, 1, below=True)] = 0.0
    sample_rate: Annotated[int, Range(4000, 192_000)] = 16000
    mel_bins: Annotated[int, Range(8, 1024)] = 128
    spec_augment: SpecAugmentSettings = field(default_factory=SpecAugmentSettings)
    ctc_head: bool = False

    def __post_init__(self) -> None:
        refuse(range_problems(self))
        problems = []
        for side in ("encoder", "decoder"):
            width, heads = getattr(self, f"{side}_width"), getattr(self, f"{side}_heads")
            if width % heads:
                problems.append(f"{side}_width {width} must be a multiple of {side}_heads {heads}")
            if width % 2:
                problems.append(f"{side}_width {width} must be even")
        if self.conv_kernel % 2 == 0:
            problems.append(f"conv_kernel must be odd, got {self.conv_kernel}")
        if self.mel_bins % 8:
            problems.append(f"mel_bins must be a multiple of 8, got {self.mel_bins}")
        if self.prompt_format not in ("canary", "canary2"):
            problems.append(f"prompt_format must be canary or canary2, got {self.prompt_format!r}")
        refuse(problems)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of embedding and head: `vocab_size` rounded up to a multiple of 8."""
        return -(-self.vocab_size // 8) * 8
