"""Small random decoders of every family as transformers makes and saves them; needs torch."""

from pathlib import Path
from typing import Any

import numpy as np

_SIZES = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_SETTINGS = {"max_position_embeddings": 512, "initializer_range": 0.15, "pad_token_id": None}
_COMMON = _SIZES | _HEADS | _SETTINGS | {"bos_token_id": None, "eos_token_id": None}
# Windows shorter than the rows of the tests.
_LATE = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}

VARIANTS: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": 20, "head_dim": 32},
    "mistral, no window": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2, windows in late layers": {"model_type": "qwen2"} | _LATE,
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3, biases, windows in late layers": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True} | _LATE,
    "gemma": {"model_type": "gemma", "head_dim": 32},
    "gemma2": {"model_type": "gemma2", "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 20},
    "gemma2, other scale": {"model_type": "gemma2", "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 20},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 20,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "gpt_neox": {"model_type": "gpt_neox", "hidden_act": "gelu"},
    "gpt_neox, one after the other": {
        "model_type": "gpt_neox",
        "hidden_act": "gelu_new",
        "use_parallel_residual": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5},
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
}


def save_random_decoder(folder: Path, seed: int, variant: str, dtype: str = "bfloat16"):
    """A random model in a folder, saved in 16 bits; returned as torch computes it, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    changes = dict(VARIANTS[variant])
    config = AutoConfig.for_model(changes.pop("model_type"), **_COMMON | changes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return read_in_torch(folder)


def read_in_torch(folder: Path):
    import torch
    from transformers import AutoModelForCausalLM

    # Eager attention: the only kind that has Gemma 2's soft caps.
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return read.eval()


# One of each.
FAMILIES = ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt_neox")
# What llama.cpp's converter calls the architecture; the others have no GGUF file that means what they do.
GGUF = {
    "mistral, no window": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gpt_neox": "gptneox",
}


def write_gguf(file: Path, architecture: str, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """A GGUF file as llama.cpp's converter makes it of HF's tensors: names by the gguf package's own table."""
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads", config["num_attention_heads"])
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    if architecture == "gptneox":
        head_dim = config["hidden_size"] // heads
        writer.add_rope_dimension_count(int(config["partial_rotary_factor"] * head_dim))
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_parallel_residual(config.get("use_parallel_residual", True))
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    else:
        writer.add_head_count_kv(kv_heads)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_theta"])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config["sliding_window"])
        if architecture == "gemma2":
            writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        else:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config["rope_scaling"]["factor"])
    for name, values in tensors.items():
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            count = heads if "q_proj" in name else kv_heads
            values = values.reshape(count, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if "query_key_value" in name:
            by_head = values.reshape(heads, 3, -1, *values.shape[1:])
            values = np.concatenate([by_head[:, part].reshape(-1, *values.shape[1:]) for part in range(3)])
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def torch_logits(model: Any, ids, mask=None) -> np.ndarray:
    import torch

    ids = torch.from_numpy(np.asarray(ids, np.int64))
    mask = None if mask is None else torch.from_numpy(np.asarray(mask, np.int64))
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions).logits.float().numpy()
