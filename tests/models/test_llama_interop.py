"""Logits against transformers' LLaMA in torch, float32, same weights: at most 1e-4 apart (design table)."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models.loading import load_model

pytestmark = pytest.mark.interop

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "original_max_position_embeddings": 64}
VARIANTS = {
    "grouped heads, untied": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "one kv head, tied": {"num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "equal heads, biases": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama3 scaling, wide heads": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_parameters": LLAMA3,
    },
    "yarn": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": YARN | {"factor": 8.0},
        "initializer_range": 0.1,  # the factor sharpens attention, and with it the rounding of float32
    },
    "yarn, all of its keys": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "rope_parameters": YARN | {"factor": 8.0, "beta_fast": 8, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.2},
    },
    "linear scaling": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
}


def save_random_llama(folder: Path, dtype: str, seed: int = 0, **changes):
    """A random LLaMA as transformers saves it, in 16 bits; returned as torch computes it, in float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"vocab_size": 160, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3}
    options = {"max_position_embeddings": 512, "rms_norm_eps": 1e-5, "initializer_range": 0.15, "pad_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**shape | options | changes)).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(tmp_path: Path, variant: str, dtype: str) -> None:
    import torch

    theirs = save_random_llama(tmp_path, dtype, **VARIANTS[variant])
    model = load_model(tmp_path, quant_type=None, dtype=jnp.float32)
    ids = np.random.default_rng(0).integers(0, 160, size=(2, 80))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    got = np.asarray(model(ids.astype(np.int32)))
    assert np.abs(expected).max() > 1
    assert np.abs(got - expected).max() < 1e-4
