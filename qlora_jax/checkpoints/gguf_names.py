"""llama.cpp's architectures: their model_type in HF, HF's names of their tensors, and rows that come in another order.

Mapping: llama.cpp's convert_hf_to_gguf.py, read backwards.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qlora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    Attributes:
      model_type: HF's.
      outer, inner: HF's names for tensors outside of the blocks and in them, without `.weight` and `.bias`.
      layers: HF's name of the list of blocks.
      norms_plus_one: whether the weights of norms are stored with 1 added.
      paired: whether the rows of a head's queries and keys alternate between its two halves.
    """

    model_type: str
    outer: Mapping[str, str]
    inner: Mapping[str, str]
    layers: str = "model.layers"
    norms_plus_one: bool = False
    paired: bool = False


_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

ARCHITECTURES = {
    # Mistral's converter writes "llama", too.
    "llama": Architecture("llama", _OUTER, _INNER, paired=True),
    "qwen2": Architecture("qwen2", _OUTER, _INNER),
    "qwen3": Architecture("qwen3", _OUTER, _INNER | _QK_NORMS),
    "gemma": Architecture("gemma", _OUTER, _INNER, norms_plus_one=True),
    "gemma2": Architecture("gemma2", _OUTER, _INNER | _FOUR_NORMS, norms_plus_one=True),
    "gemma3": Architecture("gemma3_text", _OUTER, _INNER | _FOUR_NORMS | _QK_NORMS, norms_plus_one=True),
    "gptneox": Architecture(
        "gpt_neox",
        {
            "token_embd": "gpt_neox.embed_in",
            "output_norm": "gpt_neox.final_layer_norm",
            "output": "embed_out",
        },
        {
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
        },
        layers="gpt_neox.layers",
    ),
}
_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


def hf_name(name: str, architecture: Architecture, file: Path) -> str:
    """HF name of a GGUF tensor. UserError: no such tensor in a model of the architecture."""
    if match := _TENSOR.fullmatch(name):
        layer, own, leaf = match.groups()
        found = (architecture.outer if layer is None else architecture.inner).get(own)
        if found is not None:
            return f"{found}.{leaf}" if layer is None else f"{architecture.layers}.{layer}.{found}.{leaf}"
    raise UserError(
        f"unknown tensor {name!r} in {file}",
        why=f"a {architecture.model_type} has no such tensor (mixtures of experts and fused projections are not read)",
        fix="model.path=FILE.gguf of a dense model",
    )


def in_hf_order(rows: np.ndarray, name: str, architecture: Architecture, heads: int, kv_heads: int) -> np.ndarray:
    """Rows of a tensor (weight `[out, in]` or bias `[out]`) from llama.cpp's order to that of HF."""
    if architecture.paired and ".q_proj." in name:
        return unpermute(rows, heads)
    if architecture.paired and ".k_proj." in name:
        return unpermute(rows, kv_heads)
    if ".query_key_value." in name:
        # All queries, then all keys, then all values; in HF those of one head lie together.
        by_kind = rows.reshape(3, heads, -1, *rows.shape[1:])
        return np.ascontiguousarray(by_kind.swapaxes(0, 1)).reshape(rows.shape)
    return rows


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys from llama.cpp's order to HF's.

    llama.cpp rotates neighbouring rows of a head, HF its two halves: row 2j+p there is row j+p*d/2 here.
    """
    paired = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows.shape)
