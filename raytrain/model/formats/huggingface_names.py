"""Names of weights in Hugging Face's Canary, and the order of its decoder's dimensions.

Its position table has all sines before all cosines where ours alternates. Layer norms and linear maps work in any order
of the residual stream's dimensions, so reordering the weights that touch it makes the two models equivalent.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ENCODER_BLOCK = {
    "self_attn.linear_q": "self_attn.q_proj",
    "self_attn.linear_k": "self_attn.k_proj",
    "self_attn.linear_v": "self_attn.v_proj",
    "self_attn.linear_out": "self_attn.o_proj",
    "self_attn.linear_pos": "self_attn.relative_k_proj",
    "conv.batch_norm": "conv.norm",
}


def _attention(module: str, theirs: str, keys_side: str) -> dict[str, tuple[str, str]]:
    """The linear maps of one of the decoder's attentions, as in `_DECODER_BLOCK`."""
    return {
        f"{module}.query_net": (f"{theirs}.q_proj", "in"),
        f"{module}.key_net": (f"{theirs}.k_proj", keys_side),
        f"{module}.value_net": (f"{theirs}.v_proj", keys_side),
        f"{module}.out_projection": (f"{theirs}.o_proj", "out"),
    }


# Our module → theirs, and which of its sides is the decoder's residual stream.
_DECODER_BLOCK = {
    "layer_norm_1": ("input_layernorm", "out"),
    **_attention("first_sub_layer", "self_attn", "in"),
    "layer_norm_2": ("post_attention_layernorm", "out"),
    **_attention("second_sub_layer", "encoder_attn", ""),
    "layer_norm_3": ("final_layernorm", "out"),
    "third_sub_layer.dense_in": ("mlp.fc1", "in"),
    "third_sub_layer.dense_out": ("mlp.fc2", "out"),
}
_DECODER = {
    "transf_decoder._embedding.token_embedding": ("model.decoder.embed_tokens", "in"),
    "transf_decoder._embedding.layer_norm": ("model.decoder.embedding_layernorm", "out"),
    "transf_decoder._decoder.final_layer_norm": ("model.decoder.norm", "out"),
    "log_softmax.mlp.layer0": ("proj_out", "in"),
}


def translate(name: str) -> tuple[str, int | None]:
    """Their name for one of our weights, and its axis that is the decoder's residual stream."""
    module, _, leaf = name.rpartition(".")
    side = ""
    if module.startswith("encoder.layers."):
        _, _, number, inner = module.split(".", 3)
        theirs = f"model.encoder.layers.{number}.{_ENCODER_BLOCK.get(inner, inner)}"
    elif module.startswith("transf_decoder._decoder.layers."):
        _, _, _, number, inner = module.split(".", 4)
        theirs, side = _DECODER_BLOCK[inner]
        theirs = f"model.decoder.layers.{number}.{theirs}"
    elif module in _DECODER:
        theirs, side = _DECODER[module]
    else:
        theirs = module.replace("encoder.pre_encode.conv", "model.encoder.subsampling.layers")
        theirs = theirs.replace("encoder.pre_encode.out", "model.encoder.subsampling.linear")
    axis = 0 if side == "out" else 1 if side == "in" and leaf == "weight" else None
    return f"{theirs}.{leaf.removeprefix('pos_')}", axis


def sines_first(width: int) -> Tensor:
    """Our dimension for each of theirs: their position table has all sines, then all cosines; ours alternates.

    The table is not a weight there. But norms and linear maps don't depend on the order of the residual stream's
    dimensions, so reordering the weights around it is exact.
    """
    return torch.cat((torch.arange(0, width, 2), torch.arange(1, width, 2)))


def reordered(value: Tensor, order: Tensor, axis: int | None) -> Tensor:
    # Always copy: safetensors rejects shared memory, and loaded tensors may be views of the file.
    return value.clone(memory_format=torch.contiguous_format) if axis is None else value.index_select(axis, order)
