"""A T5's answers against transformers' generate: the same weights, float32, greedy, token for token."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.evaluation.generation import generate
from qlora_jax.models.loading import load_model

pytestmark = pytest.mark.interop

NEW = 20
_NEAR = 1e-3  # between the two likeliest tokens: float sums of another order may choose the other


@pytest.mark.parametrize(
    "version", [{}, {"feed_forward_proj": "relu", "tie_word_embeddings": True}], ids=["1.1", "1.0"]
)
def test_greedy_equals_transformers(make_tiny_t5, tmp_path: Path, version: dict) -> None:
    import torch
    from transformers import T5ForConditionalGeneration

    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    folder = make_tiny_t5(tmp_path / "t5", seed, **version)
    theirs = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    rng = np.random.default_rng(seed)
    sources = [[*rng.integers(2, 128, length).tolist(), 1] for length in (3, 11, 25, 7)]
    got = generate(load_model(folder, quant_type=None, dtype=jnp.float32), sources, max_new_tokens=NEW, eos_ids={1})
    assert len({tuple(answer) for answer in got}) > 1
    for source, answer in zip(sources, got, strict=True):
        with torch.no_grad():
            made = theirs.generate(
                torch.tensor([source]),
                max_new_tokens=NEW,
                do_sample=False,
                num_beams=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
        expected = [token for token in made.sequences[0].tolist()[1:] if token != 1]
        if answer != expected:
            at = next(i for i in range(NEW) if answer[i : i + 1] != expected[i : i + 1])
            first, second = made.logits[at][0].topk(2).values
            assert float(first - second) < _NEAR
