"""The rows of a run: read, split, rendered, and counted, so that nothing is dropped silently."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_jax.data.formats import Conversation
    from qlora_jax.data.rendering import Example, Renderer


@dataclass(frozen=True)
class Dataset:
    """Rendered rows no longer than train.seq_len, and the counts of the others.

    Attributes:
      train, evaluation: examples to train on, examples held out (cut to eval.rows).
      train_too_long, eval_too_long: rows dropped because they are longer than train.seq_len.
      held_out: conversations of `evaluation`, in the same order: what sample answers are asked of.
    """

    train: list["Example"]
    evaluation: list["Example"]
    train_too_long: int
    eval_too_long: int
    held_out: list["Conversation"]

    @property
    def tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.train)

    @property
    def trained_tokens(self) -> int:
        return sum(int(example.loss_mask.sum()) for example in self.train)


def load_dataset(config: TrainConfig, renderer: "Renderer") -> Dataset:
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
    limit = config.train.seq_len
    examples = [renderer.render(conversation) for conversation in train]
    kept, too_long = drop_long(examples, limit)
    if not kept:
        raise _all_too_long(data.path, examples, limit)
    eval_examples = [renderer.render(conversation) for conversation in held_out]
    eval_kept, eval_too_long = drop_long(eval_examples, limit)
    if held_out and not eval_kept:
        raise _all_too_long(data.eval_path or f"{data.path}, held out", eval_examples, limit)
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


def _all_too_long(path: str, examples: list["Example"], limit: int) -> UserError:
    lengths = sorted(len(example.input_ids) for example in examples)
    return UserError(
        f"train.seq_len={limit} leaves none of the {len(lengths)} rows of {path}",
        why=f"they take {lengths[0]} to {lengths[-1]} tokens each, with the chat template",
        fix=f"train.seq_len={lengths[int(0.99 * (len(lengths) - 1))]}   (99 % of the rows)",
    )
