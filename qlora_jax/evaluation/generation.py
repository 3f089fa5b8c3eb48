"""Answers token by token: a compiled loop over a cache of keys and values, which the host may look into."""

import functools
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from qlora_jax.errors import UserError
from qlora_jax.evaluation.sampling import GREEDY, Sampling, next_tokens, row_keys, tokens_seen
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.t5 import T5

# Shapes are rounded up, so that prompts of many lengths share few compiled programs: widths are 32, 64, ... 512, then
# multiples of 512; answers have room for a multiple of 64 tokens.
_WIDTHS = 32, 512
_ANSWER_STEP = 64
# Someone who watches sees new tokens about as often as this, up to so many at once.
_GLANCE_SECONDS = 0.1
_GLANCE_TOKENS = 64

# Given the answers so far, says which rows (by number) need no more tokens.
Watch = Callable[[list[list[int]]], Collection[int]]


def generate(
    model: Decoder | T5,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    eos_ids: Collection[int] = (),
    row_numbers: Sequence[int] | None = None,
    watch: Watch | None = None,
) -> list[list[int]]:
    """Continues each prompt, or answers it where it is a T5's source, until a stop token or `max_new_tokens`.

    Prompts are padded on the left to a common length, and padding is masked out: an answer does not depend on the
    other prompts of the batch, beyond the order in which float sums are taken.

    Args:
      model: the model, with or without adapters.
      prompts: token ids, at least one in each.
      max_new_tokens: longest answer.
      sampling: how tokens are chosen; default: the most likely one each time.
      seed: decides what is sampled; the same seed gives the same answers.
      eos_ids: tokens that end an answer.
      row_numbers: with the seed they decide what each prompt samples; default: 0, 1, 2 ...
      watch: called several times a second with the answers so far. The loop is then left and entered again in between,
        in the same compiled program.

    Returns:
      The new tokens of each prompt, without the stop token. A row that `watch` ended may have a few more than it saw.

    Raises:
      UserError: an empty prompt, a token outside the vocabulary, sampling out of range, or more tokens than the model
        has positions.
    """
    if not prompts:
        return []
    sampling = sampling.checked()
    _check(model, prompts, max_new_tokens)
    rows = _power_of_two(len(prompts))
    width = _padded_width(max(len(prompt) for prompt in prompts))
    tokens, segments = np.zeros((2, rows, width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        segments[row, width - len(prompt) :] = 1
    numbers = np.zeros(rows, np.int32)
    numbers[: len(prompts)] = range(len(prompts)) if row_numbers is None else row_numbers
    rules = _Rules(sampling, jax.random.key(seed), jnp.asarray(numbers), jnp.asarray(sorted(eos_ids), jnp.int32))
    graphdef, state = nnx.split(_with_wide_head(model))
    capacity = _multiple(max_new_tokens, _ANSWER_STEP)
    stopped = np.arange(rows) >= len(prompts)
    written = _begin(graphdef, state, tokens, segments, stopped, rules, capacity=capacity)
    # Without a watch, and but for the first token, one call.
    glance = 1 if watch else max_new_tokens
    while True:
        answers = _answers(written, len(prompts))
        if watch is not None:
            stopped[list(watch(answers))] = True
        step = int(written.step)
        if step >= max_new_tokens or (np.asarray(written.done) | stopped).all():
            return answers
        began = time.monotonic()
        written = _continue(graphdef, state, written, stopped, rules, np.int32(min(step + glance, max_new_tokens)))
        written.step.block_until_ready()
        took = time.monotonic() - began
        if watch is not None:
            glance = max(1, glance // 2) if took > _GLANCE_SECONDS else min(2 * glance, _GLANCE_TOKENS)


class _Rules(NamedTuple):
    sampling: Sampling
    key: PRNGKeyArray
    row_numbers: Int[Array, " batch"]
    eos_ids: Int[Array, " stops"]


class _Written(NamedTuple):
    """A batch of answers, as far as they are written."""

    step: Int[Array, ""]  # tokens written in each row
    token: Int[Array, " batch"]  # the last one, which the model has not read
    cache: Any  # of all before it
    answers: Int[Array, "batch capacity"]
    lengths: Int[Array, " batch"]  # tokens before each row's stop token
    done: Bool[Array, " batch"]
    seen: Bool[Array, "batch vocab"] | None  # tokens of prompt and answer, where a penalty asks for them


@functools.partial(jax.jit, static_argnames=("graphdef", "capacity"))
def _begin(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "batch width"],
    segments: Int[Array, "batch width"],
    done: Bool[Array, " batch"],
    rules: _Rules,
    *,
    capacity: int,
) -> _Written:
    """Reads the prompts and writes the first token of each answer."""
    model = nnx.merge(graphdef, state)
    batch = tokens.shape[0]
    if isinstance(model, T5):
        cache: Any = model.init_cache(tokens, segment_ids=segments, max_len=capacity)
        # What the decoder reads is the prompt from here on: a penalty knows nothing else, as in transformers.
        tokens = jnp.full((batch, 1), model.config.decoder_start_token_id, jnp.int32)
        segments = jnp.ones((batch, 1), jnp.int32)
        h, cache = model.decode(tokens, cache)
    else:
        cache = model.init_cache(batch, tokens.shape[1] + capacity)
        h, cache = model.hidden(tokens, segment_ids=segments, cache=cache)
    penalized = rules.sampling.repetition_penalty is not None
    start = _Written(
        step=jnp.int32(0),
        token=jnp.zeros(batch, jnp.int32),
        cache=cache,
        answers=jnp.zeros((batch, capacity), jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        done=done,
        seen=tokens_seen(tokens, model.config.vocab_size, segments > 0) if penalized else None,
    )
    return _write(model, h[:, -1], start, rules)


@functools.partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("written",))
def _continue(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    written: _Written,
    stopped: Bool[Array, " batch"],
    rules: _Rules,
    until: Int[Array, ""],
) -> _Written:
    """Writes on until `until` tokens are written or every row is done; rows that are `stopped` get no more."""
    model = nnx.merge(graphdef, state)

    def write_one(written: _Written) -> _Written:
        token = written.token[:, None]
        read = model.decode if isinstance(model, T5) else model.hidden
        h, cache = read(token, cache=written.cache)
        return _write(model, h[:, 0], written._replace(cache=cache), rules)

    return jax.lax.while_loop(
        lambda written: (written.step < until) & ~written.done.all(),
        write_one,
        written._replace(done=written.done | stopped),
    )


def _write(model: Decoder | T5, h: Array, written: _Written, rules: _Rules) -> _Written:
    """Chooses the token after the states h `[batch, embed]` in each row."""
    step, sampling = written.step, rules.sampling
    keys = None if sampling.temperature is None else row_keys(rules.key, rules.row_numbers, step)
    logits = model.head(h.astype(jnp.float32) if _head_is_wide() else h)
    token = next_tokens(logits, sampling, written.seen, keys)
    done = written.done | (token[:, None] == rules.eos_ids[None, :]).any(axis=-1)
    return _Written(
        step=step + 1,
        token=token,
        cache=written.cache,
        answers=jax.lax.dynamic_update_slice(written.answers, token[:, None], (0, step)),
        lengths=written.lengths + ~done,
        done=done,
        seen=None if written.seen is None else written.seen | tokens_seen(token[:, None], written.seen.shape[1]),
    )


def _head_is_wide() -> bool:
    """Whether the head is multiplied in float32: XLA does so on a CPU, whatever the dtypes."""
    return jax.default_backend() == "cpu"


def _with_wide_head(model: Decoder | T5) -> Decoder | T5:
    """The model with the values of its head in float32, where the head is wide.

    XLA would make that copy each time a compiled program is entered: as long as several tokens take.
    """
    table = model.head_embedding().weight.get_value()
    if not _head_is_wide() or table.dtype == model.dtype == jnp.float32:
        return model
    model = nnx.clone(model)
    model.head_embedding().weight.set_value(table.astype(model.dtype).astype(jnp.float32))
    return model


def _answers(written: _Written, rows: int) -> list[list[int]]:
    answers, lengths = np.asarray(written.answers), np.asarray(written.lengths)
    return [answers[row, : lengths[row]].tolist() for row in range(rows)]


def room(model: Decoder | T5, prompt: Sequence[int]) -> int:
    """Tokens that an answer may have: the positions that a prompt leaves. A T5 has no positions to run out of."""
    positions = model.config.max_position_embeddings
    return sys.maxsize if positions is None else positions - len(prompt)


def _check(model: Decoder | T5, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    vocab, positions = model.config.vocab_size, model.config.max_position_embeddings
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}", why="an answer has at least one token")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {number} is empty", why="the first token is predicted from the prompt")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise UserError(
                f"prompt {number} has token {max(prompt) if max(prompt) >= vocab else min(prompt)}",
                why=f"the model's vocabulary has {vocab} tokens, from 0: the tokenizer belongs to another model",
            )
        if positions is not None and len(prompt) + max_new_tokens > positions:
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
