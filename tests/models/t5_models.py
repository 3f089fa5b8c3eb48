"""Small random T5s as transformers makes and saves them; needs torch."""

from pathlib import Path
from typing import Any

import numpy as np

V1_0 = {"feed_forward_proj": "relu", "tie_word_embeddings": True}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
_SIZES = {"vocab_size": 150, "d_model": 96, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4}
# With larger weights unscaled scores get so sharp that torch itself is 4e-4 from float64.
_SETTINGS = {"relative_attention_max_distance": 40, "initializer_factor": 1.0, "decoder_start_token_id": 0}


def save_random_t5(folder: Path, seed: int, dtype: str = "bfloat16", **changes: Any):
    """A random T5 in a folder, saved in 16 bits; returned as torch computes it, in float32."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(**_SIZES | _SETTINGS | changes)
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        if changes.get("tie_word_embeddings") is False:
            model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(config.vocab_size, config.d_model))
        for name, parameter in model.named_parameters():
            if name.endswith("layer_norm.weight"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            if "relative_attention_bias" in name:
                parameter.normal_()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def random_batch(seed: int, vocab: int = 150, source: int = 70, target: int = 50):
    """Tokens of source and target, and the source's attention mask: the second row is padded on the left."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(2, vocab, size=(2, source)).astype(np.int32)
    decoder_input_ids = rng.integers(2, vocab, size=(2, target)).astype(np.int32)
    decoder_input_ids[:, 0] = 0
    mask = np.ones_like(input_ids)
    mask[1, : source // 3] = 0
    return input_ids, decoder_input_ids, mask


def torch_logits(model: Any, input_ids, decoder_input_ids, mask=None):
    import torch

    ids, decoder = (torch.from_numpy(np.asarray(ids, np.int64)) for ids in (input_ids, decoder_input_ids))
    mask = None if mask is None else torch.from_numpy(np.asarray(mask, np.int64))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits.numpy()
