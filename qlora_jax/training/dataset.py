"""The rows of a run: read, split, rendered, and counted, so that nothing is dropped silently."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig, TrainSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_jax.data.formats import Conversation
    from qlora_jax.data.rendering import Example, Renderer
    from qlora_jax.data.source_target import SourceTargetRenderer


@dataclass(frozen=True)
class Dataset:
    """Rendered rows no longer than `row_lengths`, and the counts of the others.

    Attributes:
      train, evaluation: examples to train on, examples held out (cut to eval.rows).
      train_too_long, eval_too_long: rows dropped because they are longer.
      held_out: conversations of `evaluation`, in the same order: what sample answers are asked of.
    """

    train: list["Example"]
    evaluation: list["Example"]
    train_too_long: int
    eval_too_long: int
    held_out: list["Conversation"]

    @property
    def tokens(self) -> int:
        return sum(example.tokens for example in self.train)

    @property
    def trained_tokens(self) -> int:
        return sum(int(example.loss_mask.sum()) for example in self.train)

    @property
    def has_sources(self) -> bool:
        """Whether the examples are for an encoder-decoder."""
        return self.train[0].source_ids is not None


class RowLengths(NamedTuple):
    """Tokens of a row of the batch: of the model, or of the decoder and of the encoder before it."""

    seq_len: int
    source_len: int | None

    @property
    def tokens(self) -> int:
        return self.seq_len + (self.source_len or 0)


def row_lengths(train: TrainSection, *, has_sources: bool) -> RowLengths:
    """What the settings say; where there is an encoder, train.seq_len is its."""
    if not has_sources:
        return RowLengths(train.seq_len, None)
    # The share that the original QLoRA gives to targets: 256 beside 1024.
    return RowLengths(train.target_len or max(train.seq_len // 4, 2), train.seq_len)


def load_dataset(config: TrainConfig, renderer: "Renderer | SourceTargetRenderer") -> Dataset:
    """Reads data.path and data.eval_path (or holds out data.eval_split), renders, and drops what is too long.

    The held-out rows of a split depend on the file's rows and `seed` alone.

    Raises:
      UserError: bad rows (all of them), or none left to train on or to evaluate.
    """
    from qlora_jax.data.formats import read_conversations
    from qlora_jax.data.loader import drop_long

    data = config.data
    if data.path is None:
        raise UserError("data.path is not given", why="there is nothing to train on", fix="data.path=rows.jsonl")
    rows = read_conversations(data.path)
    if data.eval_path is not None:
        train, held_out = rows, read_conversations(data.eval_path, setting="data.eval_path")
    else:
        train, held_out = _split(rows, data.eval_split or 0, config.seed, data.path)
    examples = [renderer.render(conversation) for conversation in train]
    limits = row_lengths(config.train, has_sources=examples[0].source_ids is not None)
    kept, too_long = drop_long(examples, *limits)
    if not kept:
        raise _all_too_long(data.path, examples, limits)
    eval_examples = [renderer.render(conversation) for conversation in held_out]
    eval_kept, eval_too_long = drop_long(eval_examples, *limits)
    if held_out and not eval_kept:
        raise _all_too_long(data.eval_path or f"{data.path}, held out", eval_examples, limits)
    evaluation = eval_kept[: config.eval.rows]
    lines = {example.line for example in evaluation}
    return Dataset(
        train=kept,
        evaluation=evaluation,
        train_too_long=too_long,
        eval_too_long=eval_too_long,
        held_out=[conversation for conversation in held_out if conversation.line in lines],
    )


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", embedding_rows: int, model_path: str) -> None:
    """Refuses a tokenizer that knows more tokens than the model has embeddings.

    Raises:
      UserError: naming the first token without one.
    """
    beyond = [(index, token) for token, index in tokenizer.get_vocab().items() if index >= embedding_rows]
    if beyond:
        index, token = min(beyond)
        raise UserError(
            f"vocabulary mismatch in {model_path}: {len(beyond)} of the tokenizer's tokens have no embedding",
            why=f"the model has {embedding_rows} embeddings, the first token without one is {token!r} ({index})",
            fix="model.path=FOLDER whose tokenizer belongs to its weights",
        )


def _split(
    rows: list["Conversation"], split: float, seed: int, path: str
) -> tuple[list["Conversation"], list["Conversation"]]:
    count = int(split) if split >= 1 else round(split * len(rows))
    if split > 0:
        count = max(count, 1)
    if count >= len(rows):
        raise UserError(
            f"data.eval_split={split:g} holds out {count} of the {len(rows)} rows of {path}",
            why="none is left to train on",
            fix="data.eval_split=0, or data.eval_path=FILE",
        )
    held = set(np.random.default_rng(seed).permutation(len(rows))[:count].tolist())
    train = [row for index, row in enumerate(rows) if index not in held]
    return train, [row for index, row in enumerate(rows) if index in held]


def _all_too_long(path: str, examples: list["Example"], limits: RowLengths) -> UserError:
    lengths = sorted(len(example.input_ids) for example in examples)
    nearly_all = int(0.99 * (len(lengths) - 1))
    if limits.source_len is None:
        return UserError(
            f"train.seq_len={limits.seq_len} leaves none of the {len(lengths)} rows of {path}",
            why=f"they take {lengths[0]} to {lengths[-1]} tokens each, with the chat template",
            fix=f"train.seq_len={lengths[nearly_all]}   (99 % of the rows)",
        )
    sources = sorted(len(example.source_ids) for example in examples if example.source_ids is not None)
    return UserError(
        f"train.seq_len={limits.source_len} and train.target_len={limits.seq_len} leave none of the "
        f"{len(lengths)} rows of {path}",
        why=f"their sources take {sources[0]} to {sources[-1]} tokens, their targets {lengths[0]} to {lengths[-1]}",
        fix=f"train.seq_len={sources[nearly_all]} train.target_len={lengths[nearly_all]}   (99 % of either)",
    )
