"""Conversations for an encoder-decoder: the encoder reads what was asked, the decoder writes the answer.

Text goes in as it is, without headings or turns: T5 and Flan know their tasks by the words of the source
("translate English to German: ..."), which belong to the rows. Source and target end as the tokenizer ends a text, with
its end-of-sequence token; the decoder's tokens begin with the model's start token. Trained is the target, its end too.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from qlora_jax.data.formats import Conversation, Message
from qlora_jax.data.rendering import Example
from qlora_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SourceTargetRenderer:
    """Renders conversations of one answer for training, and sources for generation; see `Renderer`.

    Args:
      tokenizer: of the model.
      start_id: the token that a decoder begins with.
      template: "auto"; the others are for decoders.

    Attributes:
      tokenizer: as given.
      stop_ids: the token that ends an answer.

    Raises:
      UserError: the tokenizer has no end-of-sequence token, or another template is asked for.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, start_id: int, template: str = "auto") -> None:
        if template != "auto":
            raise UserError(
                f"data.template={template} for an encoder-decoder",
                why="its source is the text of the row as it is: the words that name a task belong there",
                fix="data.template=auto",
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token",
                why="answers would have no end",
                fix='set "eos_token" in tokenizer_config.json',
            )
        self.tokenizer = tokenizer
        self._start_id = start_id
        self.stop_ids: tuple[int, ...] = (int(tokenizer.eos_token_id),)

    def render(self, conversation: Conversation) -> Example:
        """Tokens of source and target.

        Raises:
          UserError: more than one answer.
        """
        *asked, answer = conversation.messages
        if answer.role != "assistant" or any(message.role == "assistant" for message in asked):
            raise UserError(
                f"{conversation.source}:{conversation.line}: a conversation of several turns",
                why="an encoder-decoder reads one source and writes one target; its roles are "
                + ", ".join(message.role for message in conversation.messages),
                fix='rows of {"source": ..., "target": ...}, one for each answer',
            )
        target = np.asarray([self._start_id, *self._ids(answer.content)], np.int32)
        trained = np.ones(len(target), bool)
        trained[0] = False
        return Example(target, trained, conversation.line, source_ids=np.asarray(self.prompt(asked), np.int32))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of the source: the messages one after another.

        Raises:
          UserError: an answer among them.
        """
        if any(message.role == "assistant" for message in messages):
            raise UserError(
                "a conversation of several turns",
                why="an encoder-decoder reads one source and writes one target",
                fix="ask anew, with all that matters in one text   (in a conversation: /new)",
            )
        return self._ids("\n\n".join(message.content for message in messages))

    def _ids(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text, verbose=False).input_ids)
        return ids if ids[-1:] == list(self.stop_ids) else [*ids, *self.stop_ids]
