"""Answers token by token: one compiled loop over a cache of keys and values."""

import functools
from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from qlora_jax.errors import UserError
from qlora_jax.models.decoder import Decoder

# Shapes are rounded up, so that prompts of many lengths share few compiled programs: widths are 32, 64, ... 512, then
# multiples of 512; answers have room for a multiple of 64 tokens.
_WIDTHS = 32, 512
_ANSWER_STEP = 64


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    eos_ids: Collection[int] = (),
) -> list[list[int]]:
    """Continues each prompt until a stop token or `max_new_tokens`.

    Prompts are padded on the left to a common length, and padding is masked out: an answer does not depend on the
    other prompts of the batch, beyond the order in which float sums are taken.

    Args:
      model: the model, with or without adapters.
      prompts: token ids, at least one in each.
      max_new_tokens: longest answer.
      temperature: 0: the most likely token each time; above: sampled from `softmax(logits / temperature)`.
      seed: decides what is sampled; the same seed gives the same answers.
      eos_ids: tokens that end an answer.

    Returns:
      The new tokens of each prompt, without the stop token.

    Raises:
      UserError: an empty prompt, a token outside the vocabulary, a temperature below 0, or more tokens than the model
        has positions.
    """
    if not prompts:
        return []
    _check(model, prompts, max_new_tokens, temperature)
    rows = _power_of_two(len(prompts))
    width = _padded_width(max(len(prompt) for prompt in prompts))
    tokens, segments = np.zeros((2, rows, width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        segments[row, width - len(prompt) :] = 1
    graphdef, state = nnx.split(model)
    answers, lengths = _generate(
        graphdef,
        state,
        tokens,
        segments,
        np.arange(rows) >= len(prompts),
        np.asarray(sorted(eos_ids), np.int32),
        np.int32(max_new_tokens),
        np.float32(temperature),
        jax.random.key(seed),
        capacity=_multiple(max_new_tokens, _ANSWER_STEP),
        greedy=temperature == 0,
    )
    answers, lengths = np.asarray(answers), np.asarray(lengths)
    return [answers[row, : lengths[row]].tolist() for row in range(len(prompts))]


@functools.partial(jax.jit, static_argnames=("graphdef", "capacity", "greedy"))
def _generate(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "batch width"],
    segments: Int[Array, "batch width"],
    done: Bool[Array, " batch"],
    eos_ids: Int[Array, " stops"],
    max_new_tokens: Int[Array, ""],
    temperature: Float[Array, ""],
    key: Array,
    *,
    capacity: int,
    greedy: bool,
) -> tuple[Int[Array, "batch capacity"], Int[Array, " batch"]]:
    """New tokens, and how many of each row precede its stop token."""
    model = nnx.merge(graphdef, state)
    rows = jnp.arange(tokens.shape[0])

    def pick(h: Array, step: Array | int) -> Int[Array, " batch"]:
        logits = model.head(h)
        if greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        # A key for each row and step: a row's sample does not depend on how many rows there are.
        keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, step)))(rows)
        return jax.vmap(jax.random.categorical)(keys, logits / temperature).astype(jnp.int32)

    def record(step: Array | int, token: Array, answers: Array, lengths: Array, done: Array) -> tuple[Array, ...]:
        answers = jax.lax.dynamic_update_slice(answers, token[:, None], (0, step))
        done = done | (token[:, None] == eos_ids[None, :]).any(axis=-1)
        return answers, lengths + ~done, done

    def going_on(carry: tuple) -> Array:
        step, _, _, _, _, done = carry
        return (step < max_new_tokens) & ~done.all()

    def step_once(carry: tuple) -> tuple:
        step, token, cache, answers, lengths, done = carry
        h, cache = model.hidden(token[:, None], cache=cache)
        token = pick(h[:, 0], step)
        return step + 1, token, cache, *record(step, token, answers, lengths, done)

    cache = model.init_cache(tokens.shape[0], tokens.shape[1] + capacity)
    h, cache = model.hidden(tokens, segment_ids=segments, cache=cache)
    first = pick(h[:, -1], 0)
    answers = jnp.zeros((tokens.shape[0], capacity), jnp.int32)
    lengths = jnp.zeros(tokens.shape[0], jnp.int32)
    start = jnp.int32(1), first, cache, *record(0, first, answers, lengths, done)
    _, _, _, answers, lengths, _ = jax.lax.while_loop(going_on, step_once, start)
    return answers, lengths


def _check(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float) -> None:
    vocab, positions = model.config.vocab_size, model.config.max_position_embeddings
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}", why="an answer has at least one token")
    if not temperature >= 0:
        raise UserError(f"temperature={temperature}", why="0 is greedy, above 0 is sampled", fix="temperature=0")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number} is empty", why="the first token is predicted from the prompt")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise UserError(
                f"prompt {number} has token {max(prompt) if max(prompt) >= vocab else min(prompt)}",
                why=f"the model's vocabulary has {vocab} tokens, from 0: the tokenizer belongs to another model",
            )
        if len(prompt) + max_new_tokens > positions:
            raise UserError(
                f"prompt {number} of {len(prompt)} tokens and max_new_tokens={max_new_tokens} are too long together",
                why=f"the model has {positions} positions",
                fix=f"max_new_tokens={positions - len(prompt)}" if len(prompt) < positions else "shorten the prompt",
            )


def _padded_width(longest: int) -> int:
    smallest, step = _WIDTHS
    return _multiple(longest, step) if longest > step else max(smallest, _power_of_two(longest))


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
