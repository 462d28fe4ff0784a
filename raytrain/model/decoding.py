"""Greedy decoding with a preallocated key/value cache.

Rows that have ended leave the batch, so late steps cost what the unfinished rows cost. The length cap is each
utterance's own, not that of the batch's padding, so a batch gives what its members give alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raytrain.errors import DataError
from raytrain.model.canary import Canary
from raytrain.model.features import mask_until


@torch.no_grad()
def greedy(
    model: Canary,
    states: Tensor,
    lengths: Tensor,
    prompt_ids: Tensor,
    prompt_lengths: Tensor,
    eos_id: int,
    *,
    max_generation_delta: int = 50,
) -> list[list[int]]:
    """Most probable next tokens until `eos_id`, or a total of min(max positions, frames + delta) tokens.

    `states` (B, T, D), `lengths` (B,) from `Canary.encode`; `prompt_ids` (B, P) with their `prompt_lengths`.
    Returns each row's generated ids without prompt and end. Prompts of unequal length are decoded group by group.
    """
    results: list[list[int]] = [[] for _ in range(states.shape[0])]
    sizes = prompt_lengths.tolist()
    if min(sizes, default=1) < 1:
        raise DataError("a prompt must hold at least one token", got=min(sizes))
    for size in sorted(set(sizes)):
        rows = (prompt_lengths == size).nonzero().flatten()
        longest = int(lengths[rows].max())
        group = _greedy_group(
            model,
            states[rows, : max(longest, 1)],
            lengths[rows],
            prompt_ids[rows, :size],
            eos_id,
            max_generation_delta,
        )
        for row, ids in zip(rows.tolist(), group, strict=True):
            results[row] = ids
    return results


def _greedy_group(
    model: Canary, states: Tensor, lengths: Tensor, prompt: Tensor, eos_id: int, delta: int
) -> list[list[int]]:
    batch, size = prompt.shape
    limits = (lengths + delta).clamp_max(model.config.max_positions)
    most = int(limits.max())
    cache = model.transf_decoder.make_cache(states, max(most, size))
    mask = mask_until(lengths.clamp_min(1), states.shape[1])[:, None, None]
    # Ids stay on the device; a row's column is filled with `eos` once it has ended.
    generated = torch.full((batch, max(most - size, 0)), eos_id, device=states.device)
    active = torch.arange(batch, device=states.device)
    ids, position = prompt, 0
    while position + ids.shape[1] < most:
        hidden = model.transf_decoder.extend(ids, cache, position, mask)
        position += ids.shape[1]
        chosen = model.log_softmax(hidden[:, -1]).argmax(-1)
        generated[active, position - size] = chosen
        going = (chosen != eos_id) & (position + 1 < limits[active])
        if not bool(going.all()):
            keep = going.nonzero().flatten()
            if not len(keep):
                break
            active, mask, chosen = active[keep], mask[keep], chosen[keep]
            cache = [layer.select(keep) for layer in cache]
        ids = chosen[:, None]
    return [row[: row.index(eos_id)] if eos_id in row else row for row in generated.tolist()]
