"""When was each token spoken? An estimate from the decoder's cross-attention.

The weights of all heads are averaged and a monotonic path through tokens × frames maximizes their sum (dynamic time
warping, as Radford et al. 2022 use it for Whisper). The result is an estimate: accurate to about a quarter of a second
with a trained model, meaningless with an untrained one.

Shapes: U tokens, T encoder frames of 80 ms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytrain.model.canary import Canary
from raytrain.model.decoder import Attention

FRAME_SECONDS = 0.08
_EDGE = 0.1  # a token's span ends where its weight falls below this part of its peak


@torch.no_grad()
def token_spans(
    model: Canary, states: Tensor, lengths: Tensor, prompt_ids: list[int], ids: list[int]
) -> list[tuple[float, float]]:
    """(start, end) in seconds of each generated token of one utterance: `states` (1, T, D), `lengths` (1,)."""
    if not ids:
        return []
    weights = cross_attention(model, states, lengths, [*prompt_ids, *ids])
    # Position u predicts token u + 1, hence the step back by one.
    first = len(prompt_ids) - 1
    generated = weights[first : first + len(ids)].float().cpu().numpy()
    generated = generated[:, : max(int(lengths[0]), 1)]
    return [(start * FRAME_SECONDS, end * FRAME_SECONDS) for start, end in spans(generated)]


def cross_attention(model: Canary, states: Tensor, lengths: Tensor, ids: list[int]) -> Tensor:
    """(U, T) weights of one utterance, averaged over layers and heads."""
    by_layer: list[Tensor] = []

    def record(layer: Attention, arguments: tuple[Any, ...]) -> None:
        x, keys, _, mask = arguments
        queries = layer.split(layer.query_net(x))
        scores = (queries @ keys.transpose(2, 3)) / keys.shape[3] ** 0.5
        by_layer.append(scores.masked_fill(~mask, float("-inf")).float().softmax(-1)[0])

    layers = [block.second_sub_layer for block in model.transf_decoder._decoder.layers]
    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        model.transf_decoder(torch.tensor([ids], device=states.device), states, model.cross_mask(states, lengths))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(by_layer).mean((0, 1))


def spans(weights: np.ndarray) -> list[tuple[int, int]]:
    """Frames [start, end) of each token, in order and not overlapping, if there are enough frames.

    `weights`: (U, T). With more tokens than frames several tokens share one.
    """
    tokens, frames = weights.shape
    if tokens > frames:
        edges = np.linspace(0, frames, tokens + 1)
        return [(int(edges[u]), max(int(edges[u + 1]), int(edges[u]) + 1)) for u in range(tokens)]
    token_of_frame = _path(np.log(weights + 1e-6))
    starts = np.searchsorted(token_of_frame, np.arange(tokens), side="left")
    ends = np.searchsorted(token_of_frame, np.arange(tokens), side="right")
    result = []
    for row, start, end in zip(weights, starts, ends, strict=True):
        span = row[start:end]
        strong = np.flatnonzero(span >= _EDGE * span.max())
        result.append((int(start + strong[0]), int(start + strong[-1] + 1)))
    return result


def _path(scores: np.ndarray) -> np.ndarray:
    """(T,) token of each frame: starts with the first, ends with the last, never goes back or skips one."""
    tokens, frames = scores.shape
    best = np.full(tokens, -np.inf)
    best[0] = scores[0, 0]
    advanced = np.zeros((tokens, frames), dtype=bool)  # the path comes from the previous token
    for frame in range(1, frames):
        previous = np.concatenate(([-np.inf], best[:-1]))
        advanced[:, frame] = previous > best
        best = np.maximum(previous, best) + scores[:, frame]
    token_of_frame = np.empty(frames, dtype=np.int64)
    token = tokens - 1
    for frame in range(frames - 1, -1, -1):
        token_of_frame[frame] = token
        token -= int(advanced[token, frame])
    return token_of_frame
