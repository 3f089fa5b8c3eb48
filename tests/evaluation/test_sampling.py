"""The choice of the next token: what is kept, what is penalized, and how often each token is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qlora_jax.errors import UserError
from qlora_jax.evaluation.sampling import Sampling, kept, next_tokens, row_keys, tokens_seen

VOCAB = 24
LOGITS = arrays.arrays(np.float32, (2, VOCAB), elements=st.floats(-30, 30, width=16))
keep_of = jax.jit(kept)


def kept_by_sorting(row: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The definitions, one row at a time in float64. Ties at a border stay together."""
    order = np.argsort(-row, kind="stable")
    among = [i for i in order if row[i] >= row[order[min(top_k, VOCAB) - 1]]]
    p = np.exp(row[among].astype(np.float64) - row.max())
    p /= p.sum()
    before = np.asarray([p[row[among] > row[i]].sum() for i in among])
    among = [i for i, mass in zip(among, before, strict=True) if mass < top_p]
    return {int(i) for i in among if row[i] >= row.max() + np.log(min_p)}


@settings(max_examples=150, deadline=None)
@given(LOGITS, st.integers(1, 30), st.floats(0.05, 0.99), st.floats(0.01, 0.9))
def test_kept_are_the_tokens_of_the_definitions(logits, top_k, top_p, min_p):
    keep = np.asarray(keep_of(logits, Sampling(1.0, top_k, top_p, min_p)))
    for row, mask in zip(logits, keep, strict=True):
        got = set(np.flatnonzero(mask).tolist())
        # Sums in float32 may fall on either side of a border that float64 puts within 1e-5.
        allowed = [kept_by_sorting(row, top_k, top_p + d, min_p * (1 + d)) for d in (-1e-5, 0.0, 1e-5)]
        assert got in allowed
        assert int(row.argmax()) in got


def test_each_rule_alone():
    row = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.06, 0.04]]))
    for sampling, expected in {
        Sampling(1.0): 5,
        Sampling(1.0, top_k=2): 2,
        Sampling(1.0, top_k=9): 5,
        Sampling(1.0, top_p=0.5): 2,
        Sampling(1.0, top_p=1e-6): 1,
        Sampling(1.0, min_p=0.4): 3,
        Sampling(1.0, top_k=2, top_p=0.57): 1,  # of what top_k leaves, the first has 4/7
    }.items():
        assert np.flatnonzero(keep_of(row, sampling)).tolist() == list(range(expected)), sampling


def test_equal_logits_stay_together():
    row = jnp.asarray([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert np.flatnonzero(keep_of(row, Sampling(1.0, top_k=2))).tolist() == [1, 2, 3]
    assert np.flatnonzero(keep_of(row, Sampling(1.0, top_p=0.1))).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "sampling", [Sampling(0.7), Sampling(1.5, top_k=5), Sampling(1.0, top_p=0.8), Sampling(2.0, repetition_penalty=3.0)]
)
def test_tokens_are_drawn_as_often_as_the_softmax_says(sampling):
    logits = np.random.default_rng().normal(size=VOCAB).astype(np.float32) * 2
    seen = np.arange(VOCAB) % 3 == 0
    draws = 20000
    rows = jnp.arange(draws)
    tokens = jax.jit(next_tokens)(
        jnp.broadcast_to(logits, (draws, VOCAB)),
        sampling,
        jnp.broadcast_to(seen, (draws, VOCAB)),
        row_keys(jax.random.key(np.random.default_rng().integers(2**31)), rows, 0),
    )
    expected = logits.astype(np.float64)
    if sampling.repetition_penalty:
        expected = np.where(seen, np.where(expected > 0, expected / 3, expected * 3), expected)
    expected = expected / sampling.temperature
    keep = np.asarray(keep_of(jnp.asarray(expected, jnp.float32)[None], sampling))[0]
    p = np.where(keep, np.exp(expected - expected.max()), 0)
    p /= p.sum()
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[~keep].sum() == 0
    # Bernstein's inequality: one count in 10^5 lies further off at most. Of rare tokens, five standard deviations alone
    # would be passed once in a thousand counts.
    assert (np.abs(counts - draws * p) <= 5 * np.sqrt(draws * p * (1 - p)) + 9).all()


def test_greedy_takes_the_likeliest_that_is_left_by_the_penalty():
    logits = jnp.asarray([[3.0, 2.0, -1.0], [-1.0, -1.1, -9.0]])
    seen = tokens_seen(jnp.asarray([[0], [0]]), 3)
    assert next_tokens(logits, Sampling(), seen).tolist() == [0, 0]
    assert next_tokens(logits, Sampling(repetition_penalty=2.0), seen).tolist() == [1, 1]


def test_padding_is_not_seen():
    seen = tokens_seen(jnp.asarray([[0, 2, 2], [1, 3, 0]]), 4, jnp.asarray([[False, True, True], [True, True, True]]))
    assert np.asarray(seen).astype(int).tolist() == [[0, 0, 1, 0], [1, 1, 0, 1]]


def test_a_row_draws_the_same_whatever_the_other_rows():
    logits = jax.random.normal(jax.random.key(0), (6, VOCAB))
    key = jax.random.key(3)
    together = next_tokens(logits, Sampling(1.0), None, row_keys(key, jnp.arange(6), 2))
    alone = [next_tokens(logits[i : i + 1], Sampling(1.0), None, row_keys(key, jnp.asarray([i]), 2)) for i in range(6)]
    assert together.tolist() == [int(token[0]) for token in alone]


def test_rules_that_change_nothing_are_left_out():
    assert Sampling(0.0, 0, 1.0, 0.0, 1.0).checked() == Sampling()
    assert Sampling(0.5, 40, 0.9, 0.1, 1.2).checked() == Sampling(0.5, 40, 0.9, 0.1, 1.2)


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        (Sampling(-1.0), "temperature=-1"),
        (Sampling(float("nan")), "temperature=nan"),
        (Sampling(1.0, -1), r"(?s)top_k=-1.*number of tokens.*top_k=50"),
        (Sampling(1.0, 2.5), "top_k=2.5"),
        (Sampling(1.0, top_p=0.0), "top_p=0"),
        (Sampling(1.0, top_p=1.5), r"top_p=1\.5"),
        (Sampling(1.0, min_p=2.0), "min_p=2"),
        (Sampling(1.0, repetition_penalty=0.0), "repetition_penalty=0"),
        (Sampling(top_p=0.9), r"(?s)top_p=0\.9.*temperature 0.*fix: temperature=1"),
        (Sampling(0.0, 50, 0.0), r"(?s)top_k=50.*top_p=0"),
    ],
)
def test_mistakes(sampling, told):
    with pytest.raises(UserError, match=told):
        sampling.checked()
