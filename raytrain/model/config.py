"""Settings of a Canary model; the defaults are canary-180m-flash."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from raytrain.settings import Range, Setting, refuse, setting_problems

Width = Annotated[int, Range(1, 65_536)]
Layers = Annotated[int, Range(1, 512)]


Checkpointing = Literal["none", "selective", "full"]  # see `checkpointing`


@dataclass(frozen=True)
class SpecAugmentSettings:
    """SpecAugment: bands of mel bins and spans of time that training blanks out."""

    __pydantic_config__ = {"extra": "forbid"}

    freq_masks: Annotated[int, Range(0, 1000), Setting("Bands of mel bins to mask.", unit="bands")] = 2
    freq_width: Annotated[int, Range(0, 65_536), Setting("Greatest width of a band.", unit="mel bins")] = 27
    time_masks: Annotated[int, Range(0, 1000), Setting("Spans of time to mask.", unit="spans")] = 10
    time_width: Annotated[float, Range(0, 1), Setting("Greatest length of a span, as a fraction of the utterance.")] = (
        0.05
    )

    def __post_init__(self) -> None:
        refuse(setting_problems(self))


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a Canary model: FastConformer encoder, Transformer decoder, tied head."""

    __pydantic_config__ = {"extra": "forbid"}

    encoder_layers: Annotated[Layers, Setting("FastConformer layers of the encoder.", unit="layers")] = 17
    encoder_width: Annotated[
        Width, Setting("Width of the encoder, an even multiple of its heads.", unit="channels")
    ] = 512
    encoder_heads: Annotated[Width, Setting("Attention heads of an encoder layer.", unit="heads")] = 8
    encoder_ff_factor: Annotated[
        int, Range(1, 64), Setting("Width of the encoder's feed-forward layers, as a multiple of its width.")
    ] = 4
    subsampling_channels: Annotated[
        Width, Setting("Channels of the subsampling convolutions, which turn eight frames into one.", unit="channels")
    ] = 256
    conv_kernel: Annotated[
        int, Range(1, 1023), Setting("Kernel of the encoder's depthwise convolutions, an odd number.", unit="frames")
    ] = 9
    decoder_layers: Annotated[Layers, Setting("Transformer layers of the decoder.", unit="layers")] = 4
    decoder_width: Annotated[
        Width, Setting("Width of the decoder, an even multiple of its heads.", unit="channels")
    ] = 1024
    decoder_heads: Annotated[Width, Setting("Attention heads of a decoder layer.", unit="heads")] = 8
    decoder_ff_factor: Annotated[
        int, Range(1, 64), Setting("Width of the decoder's feed-forward layers, as a multiple of its width.")
    ] = 4
    max_positions: Annotated[
        int, Range(1, 1 << 20), Setting("Maximum number of decoder tokens, including the prompt.", unit="tokens")
    ] = 1024
    dropout: Annotated[float, Range(0, 1, below=True), Setting("Dropout of all layers in training.")] = 0.1
    vocab_size: Annotated[
        int,
        Range(1, 1 << 24),
        Setting(
            "Ids of the tokenizer; embedding and head are padded to a multiple of 8. A run takes the number from its "
            "tokenizer.",
            unit="tokens",
            lineage=False,
        ),
    ] = 5248
    prompt_format: Annotated[
        Literal["canary", "canary2"], Setting("The prompt that tells the decoder languages and task.")
    ] = "canary2"
    label_smoothing: Annotated[
        float, Range(0, 1, below=True), Setting("Share of the probability that the loss spreads over all tokens.")
    ] = 0.0
    sample_rate: Annotated[int, Range(4000, 192_000), Setting("Audio is resampled to this.", unit="Hz")] = 16000
    mel_bins: Annotated[int, Range(8, 1024), Setting("Mel bins of a frame, a multiple of 8.", unit="mel bins")] = 128
    spec_augment: Annotated[
        SpecAugmentSettings, Setting("Bands of mel bins and spans of time that training blanks out (SpecAugment).")
    ] = field(default_factory=SpecAugmentSettings)
    ctc_head: Annotated[
        bool,
        Setting(
            "Give the encoder a linear CTC output, which helps training start and is left out of exported models. A "
            "run sets it where train.ctc_weight is above 0.",
            lineage=False,
        ),
    ] = False

    def __post_init__(self) -> None:
        refuse(setting_problems(self))
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
        refuse(problems)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of embedding and head: `vocab_size` rounded up to a multiple of 8."""
        return -(-self.vocab_size // 8) * 8
