"""What is kept and penalized, against transformers' logits processors."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.evaluation.sampling import Sampling, kept, next_tokens, tokens_seen

pytestmark = pytest.mark.interop


@pytest.mark.parametrize(
    "rules", [{"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 40, "top_p": 0.9, "min_p": 0.02}, {"top_k": 999}]
)
def test_the_same_tokens_are_kept(rules):
    import torch
    from transformers.generation import logits_process as theirs

    logits = np.random.default_rng().normal(size=(16, 500)).astype(np.float32) * 3
    expected = theirs.TemperatureLogitsWarper(0.8)(None, torch.tensor(logits))
    for name, make in {
        "top_k": theirs.TopKLogitsWarper,
        "top_p": theirs.TopPLogitsWarper,
        "min_p": theirs.MinPLogitsWarper,
    }.items():
        if name in rules:
            expected = make(rules[name])(None, expected)
    ours = np.asarray(kept(jnp.asarray(logits) / np.float32(0.8), Sampling(0.8, **rules)))
    # A token whose mass puts it within 1e-5 of the border may fall on either side; one in thousands does.
    assert (ours != torch.isfinite(expected).numpy()).sum() <= 1
    if "top_p" not in rules:
        np.testing.assert_array_equal(ours, torch.isfinite(expected).numpy())


def test_the_penalty_is_the_same():
    import torch
    from transformers.generation import logits_process as theirs

    rng = np.random.default_rng()
    logits, ids = rng.normal(size=(64, 50)).astype(np.float32), rng.integers(0, 50, (64, 30))
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(ids), torch.tensor(logits))
    ours = next_tokens(jnp.asarray(logits), Sampling(repetition_penalty=1.7), tokens_seen(jnp.asarray(ids), 50))
    assert ours.tolist() == expected.argmax(-1).tolist()
