"""llama.cpp's architectures: their model_type in HF, HF's names of their tensors, and rows that come in another order.

Mapping: llama.cpp's convert_hf_to_gguf.py, read backwards.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    Attributes:
      model_type: HF's.
      outer, inner: HF's names for tensors outside of the blocks and in them, without `.weight` and `.bias`. Of an
        encoder-decoder, own names begin with `enc.` or `dec.`.
      layers: HF's name of the list of blocks; of an encoder-decoder, of each of its two.
      norms_plus_one: whether the weights of norms are stored with 1 added.
      paired: whether the rows of a head's queries and keys alternate between its two halves.
    """

    model_type: str
    outer: Mapping[str, str]
    inner: Mapping[str, str]
    layers: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"": "model.layers"})
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
_T5_OUTER = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    "dec.output_norm": "decoder.final_layer_norm",
    "output": "lm_head",
}
# The last sublayer, the feed-forward one, comes after the decoder's attention to the source.
_T5_INNER = {
    f"{stack}.{own}": f"layer.{index}.{inner}"
    for stack, last in (("enc", 1), ("dec", 2))
    for own, index, inner in (
        *((f"attn_{x}", 0, f"SelfAttention.{x}") for x in "qkvo"),
        ("attn_rel_b", 0, "SelfAttention.relative_attention_bias"),
        ("attn_norm", 0, "layer_norm"),
        ("ffn_gate", last, "DenseReluDense.wi_0"),
        ("ffn_up", last, "DenseReluDense.wi_1"),
        ("ffn_down", last, "DenseReluDense.wo"),
        ("ffn_norm", last, "layer_norm"),
    )
} | {
    **{f"dec.cross_attn_{x}": f"layer.1.EncDecAttention.{x}" for x in "qkvo"},
    "dec.cross_attn_rel_b": "layer.1.EncDecAttention.relative_attention_bias",
    "dec.cross_attn_norm": "layer.1.layer_norm",
}
_PLAIN = {f"{stack}.ffn_up": _T5_INNER[f"{stack}.ffn_up"].replace("wi_1", "wi") for stack in ("enc", "dec")}

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
        layers={"": "gpt_neox.layers"},
    ),
    "t5": Architecture("t5", _T5_OUTER, _T5_INNER, layers={"enc.": "encoder.block", "dec.": "decoder.block"}),
}
_TENSOR = re.compile(r"((?:enc|dec)\.)?(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


def architecture_of(name: str, tensors: Collection[str]) -> Architecture:
    """One of ARCHITECTURES, as the names of a file's tensors settle it: a T5 1.0 has no gates."""
    found = ARCHITECTURES[name]
    if found.model_type == "t5" and not any(".ffn_gate." in tensor for tensor in tensors):
        return dataclasses.replace(found, inner={**found.inner, **_PLAIN})
    return found


def hf_name(name: str, architecture: Architecture, file: Path) -> str:
    """HF name of a GGUF tensor. UserError: no such tensor in a model of the architecture."""
    if match := _TENSOR.fullmatch(name):
        stack, layer, own, leaf = match.groups(default="")
        found = (architecture.inner if layer else architecture.outer).get(f"{stack}{own}")
        if found is not None:
            return f"{architecture.layers[stack]}.{layer}.{found}.{leaf}" if layer else f"{found}.{leaf}"
    raise UserError(
        f"unknown tensor {name!r} in {file}",
        why=f"a {architecture.model_type} has no such tensor (mixtures of experts and fused projections are not read)",
        fix="model.path=FILE.gguf of a dense model",
    )


def in_hf_order(rows: np.ndarray, name: str, architecture: Architecture, config: Mapping[str, Any]) -> np.ndarray:
    """Rows of a tensor (weight `[out, in]` or bias `[out]`) from llama.cpp's order to that of HF; `config` has HF's
    keys.
    """
    if architecture.paired and ".q_proj." in name:
        return unpermute(rows, config["num_attention_heads"])
    if architecture.paired and ".k_proj." in name:
        return unpermute(rows, config["num_key_value_heads"])
    if ".query_key_value." in name:
        # All queries, then all keys, then all values; in HF those of one head lie together.
        by_kind = rows.reshape(3, config["num_attention_heads"], -1, *rows.shape[1:])
        return np.ascontiguousarray(by_kind.swapaxes(0, 1)).reshape(rows.shape)
    return rows


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys from llama.cpp's order to HF's.

    llama.cpp rotates neighbouring rows of a head, HF its two halves: row 2j+p there is row j+p*d/2 here.
    """
    paired = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows.shape)
