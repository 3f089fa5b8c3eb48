"""How the next token is chosen from logits, by the rules of transformers' logits processors, for any decoder.

Applied in this order: the repetition penalty; then, unless the choice is greedy, temperature, top-k, top-p, min-p.

    sampling = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.1).checked()
    seen = None if sampling.repetition_penalty is None else tokens_seen(prompts, vocab, segment_ids > 0)
    token = next_tokens(logits, sampling, seen, row_keys(key, rows, step))
    seen = None if seen is None else seen | tokens_seen(token[:, None], vocab)

What is kept is found without sorting the vocabulary, which takes a CPU longer than a small model takes for a token: a
threshold is settled bit by bit, in 32 passes. Tokens with equal logits are kept or left out together.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from qlora_jax.errors import UserError, UserErrors


class Sampling(NamedTuple):
    """The rules. A pytree: under jit, values are traced, and which rules are there (not None) is static.

    Attributes:
      temperature: 0: the most likely token each time; above: sampled from `softmax(logits / temperature)`.
      top_k: sampled among the `top_k` most likely tokens.
      top_p: sampled among the most likely tokens, as few as have this probability together (arXiv 1904.09751).
      min_p: sampled among tokens with at least `min_p` times the probability of the most likely one (arXiv 2407.01082).
      repetition_penalty: logits of tokens that the prompt or the answer has are divided by it where above 0, else
        multiplied (arXiv 1909.05858).
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def checked(self) -> "Sampling":
        """With None for each rule that changes nothing (temperature 0, top_k 0, top_p 1, min_p 0, penalty 1).

        Raises:
          UserErrors: values out of range, or top_k, top_p or min_p where the choice is greedy.
        """
        greedy = not self.temperature
        limits = {
            "temperature": ("0 takes the likeliest token, above 0 samples", 0, lambda x: 0 <= x < math.inf),
            "top_k": ("it is a number of tokens; 0: all", 50, lambda x: x >= 0 and x == int(x)),
            "top_p": ("it is a probability above 0; 1: all tokens", 0.9, lambda x: 0 < x <= 1),
            "min_p": ("it is a share of the largest probability, from 0 to 1", 0.05, lambda x: 0 <= x <= 1),
            "repetition_penalty": ("logits are divided by it: above 0; 1: no penalty", 1.1, lambda x: 0 < x < math.inf),
        }
        changes_nothing = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1}
        mistakes, rules = [], {}
        for name, (why, example, good) in limits.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not math.isfinite(value) or not good(value):
                mistakes.append(UserError(f"{name}={value:g}", why=why, fix=f"{name}={example}"))
            elif value != changes_nothing[name]:
                if greedy and name in ("top_k", "top_p", "min_p"):
                    why = "at temperature 0 the likeliest token is taken, whatever else is kept"
                    mistakes.append(UserError(f"{name}={value:g}", why=why, fix="temperature=1"))
                rules[name] = value
        if mistakes:
            raise UserErrors(mistakes)
        return Sampling(**rules)


GREEDY = Sampling()


def next_tokens(
    logits: Float[Array, "batch vocab"],
    sampling: Sampling,
    seen: Bool[Array, "batch vocab"] | None = None,
    keys: PRNGKeyArray | None = None,
) -> Int[Array, " batch"]:
    """int32, one token for each row.

    Args:
      logits: float32.
      sampling: what `checked` returned.
      seen: tokens of each row so far; needed with a repetition penalty.
      keys: a random key for each row, `[batch]`; needed unless the choice is greedy.
    """
    if sampling.repetition_penalty is not None:
        assert seen is not None
        penalty = sampling.repetition_penalty
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    assert keys is not None
    logits = logits / sampling.temperature
    logits = jnp.where(kept(logits, sampling), logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def kept(logits: Float[Array, "batch vocab"], sampling: Sampling) -> Bool[Array, "batch vocab"]:
    """The tokens that top_k, top_p and min_p leave, at least one; logits have been divided by the temperature."""
    keep = jnp.ones(logits.shape, bool)
    order = _order(logits)
    if sampling.top_k is not None:
        keep &= order >= _threshold(order, keep.astype(jnp.float32), jnp.asarray(sampling.top_k, jnp.float32))
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(jnp.where(keep, logits, -jnp.inf), axis=-1)
        keep &= order >= _threshold(order, probabilities, jnp.asarray(sampling.top_p, jnp.float32))
    if sampling.min_p is not None:
        keep &= logits >= logits.max(axis=-1, keepdims=True) + jnp.log(sampling.min_p)
    return keep


def tokens_seen(
    tokens: Int[Array, "batch width"], vocab: int, real: Bool[Array, "batch width"] | None = None
) -> Bool[Array, "batch {vocab}"]:
    """Which tokens of the vocabulary each row has; `real` is False at padding."""
    index = tokens if real is None else jnp.where(real, tokens, vocab)
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab), bool).at[rows, index].set(True, mode="drop")


def row_keys(key: PRNGKeyArray, rows: Int[Array, " batch"], step: Int[Array, ""] | int) -> PRNGKeyArray:
    """A key for each row and step: what a row samples does not depend on the other rows."""
    key = jax.random.fold_in(key, step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def _order(x: Float[Array, "batch vocab"]) -> UInt32[Array, "batch vocab"]:
    """Whole numbers in the order of the floats: the sign bit flipped, the others too where it was set."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x).astype(jnp.float32), jnp.uint32)  # -0 is 0
    sign = jnp.uint32(1 << 31)
    return bits ^ jnp.where(bits >= sign, jnp.uint32(0xFFFFFFFF), sign)


def _threshold(order: Array, weights: Float[Array, "batch vocab"], enough: Array) -> UInt32[Array, "batch 1"]:
    """The largest t such that weights of `order >= t` sum to `enough`; 0 where all of them do not."""

    def settle(bit: Array, t: Array) -> Array:
        higher = t | (jnp.uint32(1 << 31) >> bit.astype(jnp.uint32))
        total = jnp.sum(jnp.where(order >= higher, weights, 0), axis=-1, keepdims=True)
        return jnp.where(total >= enough, higher, t)

    return jax.lax.fori_loop(0, 32, settle, jnp.zeros((order.shape[0], 1), jnp.uint32))
