"""Triton kernels of attention with relative positions: forward, and the gradients in three kernels.

Shapes: B utterances, T frames, H heads, K channels of a head (a power of two >= 16), M frames of a tile; a pair is an
utterance and a head. No kernel holds more than tiles of scores, as in Dao 2023 (FlashAttention-2).

The position term of a tile of M queries from i and M keys from j needs a band of 2M - 1 relative positions. With
R = q_v·pᵀ for the band's two chunks of M positions, `low` and `high`, the term of query i + a and key j + b is in
column b - a + M - 1 of R. So a row takes M columns of both, all different modulo M: a choice between `low` and `high`
and a rotation of each row by `tl.gather` give the term (`_skew`), and the reverse gives R's gradient (`_unskew`). The
next tile's `low` is this tile's `high`, so the term costs a product a tile, as the content term does.

Importing this file imports Triton. With TRITON_INTERPRET=1 the kernels run on a CPU too.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _rows(pointer: tl.tensor, row_M: tl.tensor, stride: tl.tensor, limit: tl.tensor, K: tl.constexpr) -> tl.tensor:
    """(M, K) of rows `row_M`; zeros for rows outside of 0 … limit - 1."""
    inside_M = (row_M >= 0) & (row_M < limit)
    offset_MK = row_M[:, None] * stride + tl.arange(0, K)[None, :]
    return tl.load(pointer + offset_MK, mask=inside_M[:, None], other=0.0)


@triton.jit
def _store(
    pointer: tl.tensor, row_M: tl.tensor, stride: tl.tensor, limit: tl.tensor, x_MK: tl.tensor, K: tl.constexpr
) -> None:
    inside_M = (row_M >= 0) & (row_M < limit)
    offset_MK = row_M[:, None] * stride + tl.arange(0, K)[None, :]
    tl.store(pointer + offset_MK, x_MK.to(pointer.dtype.element_ty), mask=inside_M[:, None])


@triton.jit
def _start(batch: tl.tensor, head: tl.tensor, T: tl.tensor, H: tl.tensor, K: tl.constexpr) -> tl.tensor:
    """Where a head begins in a contiguous (B, T, H, K): int64, since a batch may have more than 2³¹ elements."""
    return (batch.to(tl.int64) * T * H + head) * K


@triton.jit
def _skew(low_MM: tl.tensor, high_MM: tl.tensor, axis: tl.constexpr, M: tl.constexpr) -> tl.tensor:
    """The position term of a tile from products with its band's two chunks; `axis` is that of positions and keys."""
    query_MM, position_MM = _coordinates(axis, M)
    band_MM = tl.where(query_MM + position_MM >= M - 1, low_MM, high_MM)
    return tl.gather(band_MM, (position_MM - query_MM + M - 1) & (M - 1), axis)


@triton.jit
def _unskew(x_MM: tl.tensor, axis: tl.constexpr, M: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """A tile's gradient as gradients of the products with its band's two chunks."""
    query_MM, position_MM = _coordinates(axis, M)
    band_MM = tl.gather(x_MM, (position_MM + query_MM + 1) & (M - 1), axis)
    is_low_MM = query_MM + position_MM >= M - 1
    return tl.where(is_low_MM, band_MM, 0.0), tl.where(is_low_MM, 0.0, band_MM)


@triton.jit
def _coordinates(axis: tl.constexpr, M: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(M, M) of the query's and of the position's (or key's) number in a tile."""
    zeros_MM = tl.zeros((M, M), tl.int32)
    row_MM = zeros_MM + tl.arange(0, M)[:, None]
    column_MM = zeros_MM + tl.arange(0, M)[None, :]
    if axis == 1:
        return row_MM, column_MM
    else:
        return column_MM, row_MM


@triton.jit
def _noise(
    noise: tl.tensor, pairs: tl.tensor, pair: tl.tensor, query_M: tl.tensor, T: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The two random words of each row, from (2, B, H, T); `pairs` is B·H, and a pair is an utterance and a head."""
    first_M = _row_values(noise, pair, query_M, T, 0)
    second_M = _row_values(noise, pairs + pair, query_M, T, 0)
    return first_M.to(tl.uint32, bitcast=True), second_M.to(tl.uint32, bitcast=True)


@triton.jit
def _kept(first: tl.tensor, second: tl.tensor, column: tl.tensor, cut: tl.tensor) -> tl.tensor:
    """Which scores dropout keeps, from their rows' random words and their columns; with probability 1 - cut/2²⁴.

    Philox for each score would take 100 instructions in each of four kernels, 7 % of a training step; this takes 8.
    It is Wellons' hash of two rounds (hash-prospector, 2018) from a random start, with a random word between them.
    """
    x = first + column.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = x ^ second
    x = (x ^ (x >> 15)) * 0x735A2D97
    x = x ^ (x >> 15)
    return (x >> 8).to(tl.int32) >= cut


@triton.jit
def _dot(x: tl.tensor, y: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """x·y in y's dtype, accumulated in float32."""
    return tl.dot(x.to(y.dtype), y, input_precision=PRECISION)


@triton.jit(do_not_specialize=["pairs", "T", "H", "cut"])
def forward_kernel(
    q_u: tl.tensor, q_v: tl.tensor, k: tl.tensor, v: tl.tensor, positions: tl.tensor, lengths: tl.tensor,
    noise: tl.tensor, out: tl.tensor, lse: tl.tensor, pairs: tl.tensor, T: tl.tensor, H: tl.tensor,
    kv_batch: tl.tensor, kv_time: tl.tensor, kv_head: tl.tensor, scale: tl.tensor, cut: tl.tensor,
    keep_scale: tl.tensor, K: tl.constexpr, M: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """A program per tile of queries of a head: its output and the logarithms of its rows' sums of exponentials."""
    tiles = tl.cdiv(T, M)
    pair, first_query = tl.program_id(0) // tiles, tl.program_id(0) % tiles * M
    batch, head = pair // H, pair % H
    query_M, frame_M = first_query + tl.arange(0, M), tl.arange(0, M)
    start, kv_start = _start(batch, head, T, H, K), batch.to(tl.int64) * kv_batch + head * kv_head
    q_u_MK = _rows(q_u + start, query_M, H * K, T, K)
    q_v_MK = _rows(q_v + start, query_M, H * K, T, K)
    positions += head * K
    length = tl.load(lengths + batch).to(tl.int32)
    if DROPOUT:
        first_M, second_M = _noise(noise, pairs, pair, query_M, T)
    chunk_M = T - M - first_query + frame_M
    low_MM = _dot(q_v_MK, tl.trans(_rows(positions, chunk_M, H * K, 2 * T - 1, K)), PRECISION)
    top_M, sum_M = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    mixed_MK = tl.zeros((M, K), tl.float32)
    for first_key in range(0, length, M):
        key_M = first_key + frame_M
        k_MK = _rows(k + kv_start, key_M, kv_time, length, K)
        p_MK = _rows(positions, chunk_M + (first_key + M), H * K, 2 * T - 1, K)
        high_MM = _dot(q_v_MK, tl.trans(p_MK), PRECISION)
        score_MM = _dot(q_u_MK, tl.trans(k_MK), PRECISION) + _skew(low_MM, high_MM, 1, M)
        score_MM = tl.where(key_M[None, :] < length, score_MM * (scale * _LOG2_E), float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(score_MM, 1))
        weight_MM = tl.exp2(score_MM - new_top_M[:, None])
        shrink_M = tl.exp2(top_M - new_top_M)
        sum_M = sum_M * shrink_M + tl.sum(weight_MM, 1)
        if DROPOUT:
            kept_MM = _kept(first_M[:, None], second_M[:, None], key_M[None, :], cut)
            weight_MM = tl.where(kept_MM, weight_MM, 0.0)
        v_MK = _rows(v + kv_start, key_M, kv_time, length, K)
        mixed_MK = mixed_MK * shrink_M[:, None] + _dot(weight_MM, v_MK, PRECISION)
        top_M, low_MM = new_top_M, high_MM
    _store(out + start, query_M, H * K, T, mixed_MK * (keep_scale / sum_M)[:, None], K)
    lse_M = (top_M + tl.log2(sum_M)) * _LN_2
    tl.store(lse + pair.to(tl.int64) * T + query_M, lse_M, mask=query_M < T)


@triton.jit(do_not_specialize=["pairs", "T", "H", "cut"])
def query_gradient_kernel(
    q_u: tl.tensor, q_v: tl.tensor, k: tl.tensor, v: tl.tensor, positions: tl.tensor, lengths: tl.tensor,
    noise: tl.tensor, out: tl.tensor, lse: tl.tensor, d_out: tl.tensor, delta: tl.tensor, d_q_u: tl.tensor,
    d_q_v: tl.tensor, pairs: tl.tensor, T: tl.tensor, H: tl.tensor, kv_batch: tl.tensor, kv_time: tl.tensor,
    kv_head: tl.tensor, scale: tl.tensor, cut: tl.tensor, keep_scale: tl.tensor, K: tl.constexpr, M: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """A program per tile of queries of a head: gradients of q_u and q_v, and `delta`, each row's d_out·out."""
    tiles = tl.cdiv(T, M)
    pair, first_query = tl.program_id(0) // tiles, tl.program_id(0) % tiles * M
    batch, head = pair // H, pair % H
    query_M, frame_M = first_query + tl.arange(0, M), tl.arange(0, M)
    start, kv_start = _start(batch, head, T, H, K), batch.to(tl.int64) * kv_batch + head * kv_head
    q_u_MK = _rows(q_u + start, query_M, H * K, T, K)
    q_v_MK = _rows(q_v + start, query_M, H * K, T, K)
    d_out_MK = _rows(d_out + start, query_M, H * K, T, K)
    out_MK = _rows(out + start, query_M, H * K, T, K)
    delta_M = tl.sum(d_out_MK.to(tl.float32) * out_MK.to(tl.float32), 1)
    tl.store(delta + pair.to(tl.int64) * T + query_M, delta_M, mask=query_M < T)
    lse_M = _row_values(lse, pair, query_M, T, float("inf"))
    positions += head * K
    length = tl.load(lengths + batch).to(tl.int32)
    if DROPOUT:
        first_M, second_M = _noise(noise, pairs, pair, query_M, T)
    chunk_M = T - M - first_query + frame_M
    p_low_MK = _rows(positions, chunk_M, H * K, 2 * T - 1, K)
    low_MM = _dot(q_v_MK, tl.trans(p_low_MK), PRECISION)
    # What the previous tile of keys adds to the gradient of this tile's `low`, which was its `high`.
    d_low_MM = tl.zeros((M, M), tl.float32)
    d_q_u_MK, d_q_v_MK = tl.zeros((M, K), tl.float32), tl.zeros((M, K), tl.float32)
    for first_key in range(0, length, M):
        key_M = first_key + frame_M
        k_MK = _rows(k + kv_start, key_M, kv_time, length, K)
        v_MK = _rows(v + kv_start, key_M, kv_time, length, K)
        p_high_MK = _rows(positions, chunk_M + (first_key + M), H * K, 2 * T - 1, K)
        high_MM = _dot(q_v_MK, tl.trans(p_high_MK), PRECISION)
        score_MM = _dot(q_u_MK, tl.trans(k_MK), PRECISION) + _skew(low_MM, high_MM, 1, M)
        weight_MM = _weights(score_MM, lse_M[:, None], key_M[None, :] < length, scale)
        d_weight_MM = _dot(d_out_MK, tl.trans(v_MK), PRECISION)
        if DROPOUT:
            kept_MM = _kept(first_M[:, None], second_M[:, None], key_M[None, :], cut)
            d_weight_MM = tl.where(kept_MM, d_weight_MM * keep_scale, 0.0)
        d_score_MM = weight_MM * (d_weight_MM - delta_M[:, None])
        d_q_u_MK += _dot(d_score_MM, k_MK, PRECISION)
        d_tile_low_MM, d_high_MM = _unskew(d_score_MM, 1, M)
        # Read again: in registers from the previous tile it would displace others.
        p_low_MK = _rows(positions, chunk_M + first_key, H * K, 2 * T - 1, K)
        d_q_v_MK += _dot(d_low_MM + d_tile_low_MM, p_low_MK, PRECISION)
        low_MM, d_low_MM = high_MM, d_high_MM
    last_MK = _rows(positions, chunk_M + tl.cdiv(length, M) * M, H * K, 2 * T - 1, K)
    d_q_v_MK += _dot(d_low_MM, last_MK, PRECISION)
    _store(d_q_u + start, query_M, H * K, T, d_q_u_MK * scale, K)
    _store(d_q_v + start, query_M, H * K, T, d_q_v_MK * scale, K)


@triton.jit
def _row_values(
    pointer: tl.tensor, pair: tl.tensor, query_M: tl.tensor, T: tl.tensor, otherwise: tl.constexpr
) -> tl.tensor:
    """Values of a head's queries, of (B, H, T). Queries after the last have no weights if their `lse` is infinite."""
    return tl.load(pointer + pair.to(tl.int64) * T + query_M, mask=query_M < T, other=otherwise)


@triton.jit
def _weights(score: tl.tensor, lse: tl.tensor, valid: tl.tensor, scale: tl.tensor) -> tl.tensor:
    return tl.exp2(tl.where(valid, score * (scale * _LOG2_E), float("-inf")) - lse * _LOG2_E)


@triton.jit
def _transposed_tile(
    q_u_MK: tl.tensor, q_v_MK: tl.tensor, d_out_MK: tl.tensor, k_MK: tl.tensor, v_MK: tl.tensor, p_low_MK: tl.tensor,
    p_high_MK: tl.tensor, lse: tl.tensor, delta: tl.tensor, noise: tl.tensor, pairs: tl.tensor, pair: tl.tensor,
    query_M: tl.tensor, key_M: tl.tensor, length: tl.tensor, T: tl.tensor, scale: tl.tensor, cut: tl.tensor,
    keep_scale: tl.tensor, M: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Weights after dropout and gradients of the scores before scaling, (M keys, M queries): products over queries
    then take them as they are."""
    lse_M = _row_values(lse, pair, query_M, T, float("inf"))
    delta_M = _row_values(delta, pair, query_M, T, 0.0)
    low_MM = _dot(p_low_MK, tl.trans(q_v_MK), PRECISION)
    high_MM = _dot(p_high_MK, tl.trans(q_v_MK), PRECISION)
    score_MM = _dot(k_MK, tl.trans(q_u_MK), PRECISION) + _skew(low_MM, high_MM, 0, M)
    weight_MM = _weights(score_MM, lse_M[None, :], key_M[:, None] < length, scale)
    d_weight_MM = _dot(v_MK, tl.trans(d_out_MK), PRECISION)
    dropped_MM = weight_MM
    if DROPOUT:
        first_M, second_M = _noise(noise, pairs, pair, query_M, T)
        kept_MM = _kept(first_M[None, :], second_M[None, :], key_M[:, None], cut)
        d_weight_MM = tl.where(kept_MM, d_weight_MM * keep_scale, 0.0)
        dropped_MM = tl.where(kept_MM, weight_MM * keep_scale, 0.0)
    return dropped_MM, weight_MM * (d_weight_MM - delta_M[None, :])


@triton.jit(do_not_specialize=["pairs", "T", "H", "cut"])
def key_gradient_kernel(
    q_u: tl.tensor, q_v: tl.tensor, k: tl.tensor, v: tl.tensor, positions: tl.tensor, lengths: tl.tensor,
    noise: tl.tensor, lse: tl.tensor, d_out: tl.tensor, delta: tl.tensor, d_k: tl.tensor, d_v: tl.tensor,
    pairs: tl.tensor, T: tl.tensor, H: tl.tensor, kv_batch: tl.tensor, kv_time: tl.tensor, kv_head: tl.tensor,
    scale: tl.tensor, cut: tl.tensor, keep_scale: tl.tensor, K: tl.constexpr, M: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """A program per tile of keys of a head: gradients of k and v."""
    tiles = tl.cdiv(T, M)
    pair, first_key = tl.program_id(0) // tiles, tl.program_id(0) % tiles * M
    batch, head = pair // H, pair % H
    key_M, frame_M = first_key + tl.arange(0, M), tl.arange(0, M)
    start, kv_start = _start(batch, head, T, H, K), batch.to(tl.int64) * kv_batch + head * kv_head
    length = tl.load(lengths + batch).to(tl.int32)
    k_MK = _rows(k + kv_start, key_M, kv_time, length, K)
    v_MK = _rows(v + kv_start, key_M, kv_time, length, K)
    positions += head * K
    chunk_M = T + first_key + frame_M
    p_high_MK = _rows(positions, chunk_M, H * K, 2 * T - 1, K)
    d_k_MK, d_v_MK = tl.zeros((M, K), tl.float32), tl.zeros((M, K), tl.float32)
    for first_query in range(0, tl.where(first_key < length, T, 0), M):
        query_M = first_query + frame_M
        q_u_MK = _rows(q_u + start, query_M, H * K, T, K)
        q_v_MK = _rows(q_v + start, query_M, H * K, T, K)
        d_out_MK = _rows(d_out + start, query_M, H * K, T, K)
        p_low_MK = _rows(positions, chunk_M - (first_query + M), H * K, 2 * T - 1, K)
        p_high_MK = _rows(positions, chunk_M - first_query, H * K, 2 * T - 1, K)
        weight_MM, d_score_MM = _transposed_tile(
            q_u_MK, q_v_MK, d_out_MK, k_MK, v_MK, p_low_MK, p_high_MK, lse, delta, noise, pairs, pair, query_M, key_M,
            length, T, scale, cut, keep_scale, M, DROPOUT, PRECISION,
        )  # fmt: skip
        d_v_MK += _dot(weight_MM, d_out_MK, PRECISION)
        d_k_MK += _dot(d_score_MM, q_u_MK, PRECISION)
    _store(d_k + start, key_M, H * K, T, d_k_MK * scale, K)
    _store(d_v + start, key_M, H * K, T, d_v_MK, K)


@triton.jit(do_not_specialize=["pairs", "parts", "T", "H", "cut"])
def position_gradient_kernel(
    q_u: tl.tensor, q_v: tl.tensor, k: tl.tensor, v: tl.tensor, positions: tl.tensor, lengths: tl.tensor,
    noise: tl.tensor, lse: tl.tensor, d_out: tl.tensor, delta: tl.tensor, d_positions: tl.tensor, pairs: tl.tensor,
    parts: tl.tensor, T: tl.tensor, H: tl.tensor, kv_batch: tl.tensor, kv_time: tl.tensor, kv_head: tl.tensor,
    scale: tl.tensor, cut: tl.tensor, keep_scale: tl.tensor, K: tl.constexpr, M: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """A program per diagonal of tiles, head and part of the batch: the gradients of the two chunks of positions that
    the diagonal's tiles share, in d_positions (2·parts, 2T - 1, H, K); low chunks in the first half, high ones after.

    Sums over the batch stay in registers. Adding each tile's share to memory would take ten times as many additions.
    """
    tiles = tl.cdiv(T, M)
    diagonal = tl.program_id(0) % (2 * tiles - 1) - (tiles - 1)
    head, part = tl.program_id(0) // (2 * tiles - 1) % H, tl.program_id(0) // (2 * tiles - 1) // H
    frame_M = tl.arange(0, M)
    chunk_M = T - M + diagonal * M + frame_M
    p_low_MK = _rows(positions + head * K, chunk_M, H * K, 2 * T - 1, K)
    p_high_MK = _rows(positions + head * K, chunk_M + M, H * K, 2 * T - 1, K)
    d_low_MK, d_high_MK = tl.zeros((M, K), tl.float32), tl.zeros((M, K), tl.float32)
    size, on_diagonal = pairs // H, tiles - tl.abs(diagonal)
    for index in range(part * size // parts * on_diagonal, (part + 1) * size // parts * on_diagonal):
        batch = index // on_diagonal
        query_M = (index % on_diagonal + tl.maximum(-diagonal, 0)) * M + frame_M
        key_M = query_M + diagonal * M
        start, kv_start = _start(batch, head, T, H, K), batch.to(tl.int64) * kv_batch + head * kv_head
        length = tl.load(lengths + batch).to(tl.int32)
        q_v_MK = _rows(q_v + start, query_M, H * K, T, K)
        _, d_score_MM = _transposed_tile(
            _rows(q_u + start, query_M, H * K, T, K), q_v_MK, _rows(d_out + start, query_M, H * K, T, K),
            _rows(k + kv_start, key_M, kv_time, length, K), _rows(v + kv_start, key_M, kv_time, length, K),
            p_low_MK, p_high_MK, lse, delta, noise, pairs, batch * H + head, query_M, key_M, length,
            T, scale, cut, keep_scale, M, DROPOUT, PRECISION,
        )  # fmt: skip
        d_low_MM, d_high_MM = _unskew(d_score_MM, 0, M)
        d_low_MK += _dot(d_low_MM, q_v_MK, PRECISION)
        d_high_MK += _dot(d_high_MM, q_v_MK, PRECISION)
    positions_size = (2 * T - 1).to(tl.int64) * H * K
    d_low = d_positions + part * positions_size + head * K
    d_high = d_low + parts * positions_size
    _store(d_low, chunk_M, H * K, 2 * T - 1, d_low_MK * scale, K)
    _store(d_high, chunk_M + M, H * K, 2 * T - 1, d_high_MK * scale, K)
    # The last chunk is no diagonal's low one, and the first is none's high one.
    if diagonal == tiles - 1:
        _store(d_low, chunk_M + M, H * K, 2 * T - 1, tl.zeros((M, K), tl.float32), K)
    if diagonal == 1 - tiles:
        _store(d_high, chunk_M, H * K, 2 * T - 1, tl.zeros((M, K), tl.float32), K)
