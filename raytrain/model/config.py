"""Settings of a Canary model; the defaults are canary-180m-flash."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SpecAugmentSettings:
    """SpecAugment: `freq_masks` bands of up to `freq_width` mel bins, `time_masks` spans of up to
    `time_width` of the utterance."""

    __pydantic_config__ = {"extra": "forbid"}

    freq_masks: int = 2
    freq_width: int = 27
    time_masks: int = 10
    time_width: float = 0.05


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Canary model: FastConformer encoder, Transformer decoder, tied head.

    `vocab_size` counts the tokenizer's ids; embedding and head are padded to a multiple of 8. With `ctc_head`
    the encoder gets a linear CTC output, which helps training start and is left out of exported models.
    """

    __pydantic_config__ = {"extra": "forbid"}

    encoder_layers: int = 17
    encoder_width: int = 512
    encoder_heads: int = 8
    encoder_ff_factor: int = 4
    subsampling_channels: int = 256
    conv_kernel: int = 9
    decoder_layers: int = 4
    decoder_width: int = 1024
    decoder_heads: int = 8
    decoder_ff_factor: int = 4
    max_positions: int = 1024
    dropout: float = 0.1
    vocab_size: int = 5248
    prompt_format: str = "canary2"
    label_smoothing: float = 0.0
    sample_rate: int = 16000
    mel_bins: int = 128
    spec_augment: SpecAugmentSettings = field(default_factory=SpecAugmentSettings)
    ctc_head: bool = False

    def __post_init__(self) -> None:
        problems = []
        for side in ("encoder", "decoder"):
            width, heads = getattr(self, f"{side}_width"), getattr(self, f"{side}_heads")
            if heads < 1 or width % heads:
                problems.append(f"{side}_width {width} must be a multiple of {side}_heads {heads}")
            if width % 2:
                problems.append(f"{side}_width {width} must be even")
        if self.conv_kernel % 2 == 0:
            problems.append(f"conv_kernel must be odd, got {self.conv_kernel}")
        if self.mel_bins % 8:
            problems.append(f"mel_bins must be a multiple of 8, got {self.mel_bins}")
        if self.prompt_format not in ("canary", "canary2"):
            problems.append(f"prompt_format must be canary or canary2, got {self.prompt_format!r}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be in [0, 1), got {self.dropout}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def padded_vocab_size(self) -> int:
        """Rows of embedding and head: `vocab_size` rounded up to a multiple of 8."""
        return -(-self.vocab_size // 8) * 8
