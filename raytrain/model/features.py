"""Log-mel features and SpecAugment, computed on the model's device in float32, without gradient.

Shapes: B utterances, S samples, T frames of 10 ms, M mel bins.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from raytrain.model.config import SpecAugmentSettings

HOP = 160
_N_FFT, _WINDOW = 512, 400
_PREEMPHASIS, _DITHER, _GUARD, _EPSILON = 0.97, 1e-5, 2.0**-24, 1e-5


def mel_filterbank(num_bins: int, sample_rate: int = 16000, n_fft: int = _N_FFT) -> Tensor:
    """(num_bins, n_fft/2+1) triangular filters on Slaney's mel scale with Slaney's area normalization."""

    def to_mel(hertz: float) -> float:
        return hertz / (200 / 3) if hertz < 1000 else 15 + math.log(hertz / 1000) / (math.log(6.4) / 27)

    def to_hertz(mel: Tensor) -> Tensor:
        return torch.where(mel < 15, mel * (200 / 3), 1000 * torch.exp((mel - 15) * (math.log(6.4) / 27)))

    top = to_mel(sample_rate / 2)
    with torch.device("cpu"):
        edges = to_hertz(torch.linspace(0, top, num_bins + 2, dtype=torch.float64))
        bins = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1, dtype=torch.float64)
        widths = edges.diff()
        slopes = edges[:, None] - bins[None]
        lower, upper = -slopes[:-2] / widths[:-1, None], slopes[2:] / widths[1:, None]
        weights = torch.minimum(lower, upper).clamp_min(0)
        weights = weights * (2 / (edges[2:] - edges[:-2]))[:, None]
    return weights.float()


class _Featurizer(nn.Module):
    """Holds the two constants under their names in NeMo's state dict."""

    window: Tensor
    fb: Tensor

    def __init__(self, mel_bins: int, sample_rate: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.empty(_WINDOW))
        self.register_buffer("fb", torch.empty(1, mel_bins, _N_FFT // 2 + 1))
        self._sample_rate = sample_rate
        self.reset()

    def reset(self) -> None:
        """Fill the constants; they are the same in every model."""
        if self.window.is_meta:
            return
        self.window.copy_(torch.hann_window(_WINDOW, periodic=False, device="cpu"))
        self.fb.copy_(mel_filterbank(self.fb.shape[1], self._sample_rate)[None])


class LogMelFeatures(nn.Module):
    """audio (B, S) float, lengths (B,) → mel (B, M, T), frames (B,). Frames past an utterance's end are 0."""

    def __init__(self, mel_bins: int = 128, sample_rate: int = 16000) -> None:
        super().__init__()
        self.featurizer = _Featurizer(mel_bins, sample_rate)

    @torch.no_grad()
    def forward(self, audio_BS: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        if audio_BS.is_meta:  # meta has no autocast to turn off
            return self._features(audio_BS.float(), lengths_B)
        with torch.autocast(audio_BS.device.type, enabled=False):
            return self._features(audio_BS.float(), lengths_B)

    def _features(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            audio = audio + _DITHER * torch.randn_like(audio)
        audio = torch.cat((audio[:, :1], audio[:, 1:] - _PREEMPHASIS * audio[:, :-1]), dim=1)
        audio = audio * mask_until(lengths, audio.shape[1])
        spectrum = torch.stft(
            audio,
            _N_FFT,
            HOP,
            _WINDOW,
            self.featurizer.window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        real, imaginary = torch.view_as_real(spectrum).unbind(-1)
        power = real.square() + imaginary.square()
        mel = torch.log(torch.matmul(self.featurizer.fb, power) + _GUARD)
        frames = lengths // HOP
        valid = mask_until(frames, mel.shape[2])[:, None]
        count = frames.clamp_min(1).to(mel.dtype)[:, None, None]
        mean = (mel * valid).sum(2, keepdim=True) / count
        centered = (mel - mean) * valid
        variance = centered.square().sum(2, keepdim=True) / (count - 1).clamp_min(1)
        return centered / (variance.sqrt() + _EPSILON), frames


class SpecAugment(nn.Module):
    """Masks spans of time and of mel bins with 0, in training only; vectorized over the batch."""

    def __init__(self, settings: SpecAugmentSettings) -> None:
        super().__init__()
        self.settings = settings

    @torch.no_grad()
    def forward(self, mel_BMT: Tensor, frames_B: Tensor) -> Tensor:
        if not self.training:
            return mel_BMT
        batch, num_bins, num_frames = mel_BMT.shape
        s, device = self.settings, mel_BMT.device
        keep = torch.ones(batch, 1, num_frames, dtype=torch.bool, device=device)
        if s.time_masks:
            length = frames_B[:, None].float()
            widest = (s.time_width * length).clamp_max(num_frames)
            hit = _spans(batch, s.time_masks, widest, length, num_frames, device)
            keep = ~hit[:, None]
        if s.freq_masks:
            widest = torch.full((batch, 1), float(s.freq_width), device=device)
            hit = _spans(batch, s.freq_masks, widest, torch.full_like(widest, num_bins), num_bins, device)
            keep = keep & ~hit[:, :, None]
        return mel_BMT * keep


def _spans(batch: int, number: int, widest: Tensor, length: Tensor, size: int, device: torch.device) -> Tensor:
    """(batch, size) bool: union of `number` random spans of width ⌊U·widest⌋ within `length`."""
    width = (torch.rand(batch, number, device=device) * widest).floor()
    start = (torch.rand(batch, number, device=device) * (length - width)).floor()
    index = torch.arange(size, device=device)
    return ((index >= start[..., None]) & (index < (start + width)[..., None])).any(1)


def mask_until(lengths_B: Tensor, size: int) -> Tensor:
    """(B, size) bool: true before each length."""
    return torch.arange(size, device=lengths_B.device) < lengths_B[:, None]
