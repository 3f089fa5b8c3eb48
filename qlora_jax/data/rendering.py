"""Conversations as tokens, and which of them are trained.

Trained are the tokens of each answer and the end-of-turn token after it: never the header before an answer, nor the
white space after the end-of-turn token. The mask comes out of rendering. With `text(i)` the template applied to the
first i messages, for an answer i of a conversation

    text(i) + header  =  "<|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n"
    text(i + 1)       =  "<|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\nHi!<|im_end|>\\n"

both begin the text of the whole conversation, and the answer is what the second has more than the first. That text is
tokenized once; the tokenizer's character offsets say which tokens have a part in an answer (one that joins the header's
last white space to the first word does). Nothing is searched for in the text or in the ids, so it does not matter
whether the padding token is the end-of-sequence token, or whether an answer quotes a header.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from jaxtyping import Bool, Int32

from qlora_jax.data.formats import Conversation, Message
from qlora_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Llama 3.1's default. Its template (alone) would else write the date of the day, and rows would change overnight.
_DATE = "26 Jul 2024"
_PLAIN = "data.template=plain   ('### Instruction:' headings instead of the chat template)"


@dataclass(frozen=True, eq=False)
class Example:
    """One conversation as tokens.

    Attributes:
      input_ids: tokens; of an encoder-decoder those that the decoder reads.
      loss_mask: True where the token is a target; at least one is, and never the first.
      line: line of the data file.
      source_ids: tokens that an encoder reads; None: the model is a decoder alone.
    """

    input_ids: Int32[np.ndarray, " tokens"]
    loss_mask: Bool[np.ndarray, " tokens"]
    line: int
    source_ids: Int32[np.ndarray, " source"] | None = None

    @property
    def tokens(self) -> int:
        """All that a model reads of it."""
        return len(self.input_ids) + (0 if self.source_ids is None else len(self.source_ids))


class Renderer:
    """Renders conversations for training and prompts for generation, by one template.

    Args:
      tokenizer: a fast tokenizer (it has to tell character offsets).
      template: "auto" is the tokenizer's chat template where it has one, with its default system message, else
        "plain"; "chat" insists on it; "plain" is `### Instruction:` and `### Response:` headings.

    Attributes:
      tokenizer: as given.
      stop_ids: tokens that end an answer: the template's end of turn and the tokenizer's end of sequence.

    Raises:
      UserError: the tokenizer cannot be used this way, or its template has answers without an end-of-turn token.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", template: Literal["auto", "chat", "plain"] = "auto"
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {type(tokenizer).__name__} has no character offsets",
                why="the loss mask is made from them; fast tokenizers (tokenizer.json) have them",
                fix="AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes tokenizer.json",
            )
        self.tokenizer = tokenizer
        self._template: _Template
        if template == "chat" or (template == "auto" and tokenizer.chat_template):
            self._template = _ChatTemplate(tokenizer)
        else:
            self._template = _PlainTemplate(tokenizer)
        self.stop_ids = self._find_stop_ids()

    def render(self, conversation: Conversation) -> Example:
        """Tokens and loss mask of a whole conversation.

        Raises:
          UserError: the template refuses the conversation or does not write it as one answer after another.
        """
        place = f"{conversation.source}:{conversation.line}"
        messages = conversation.messages
        text = self._text(messages, header=False, place=place)
        answers = [self._answer_span(messages, i, text, place) for i, m in enumerate(messages) if m.role == "assistant"]
        ids, starts, ends = self._tokens(text)
        trained = np.zeros(len(ids), bool)
        for start, end in answers:
            trained |= (ends > start) & (starts < end)
        if not trained[1:].any():
            raise UserError(f"{place}: no token to train on", why=f"it is rendered as {text[-200:]!r}", fix=_PLAIN)
        return Example(ids, trained, conversation.line)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of the messages and of the header that an answer follows."""
        ids, _, _ = self._tokens(self._text(messages, header=True, place="the prompt"))
        return ids.tolist()

    def _text(self, messages: Sequence[Message], *, header: bool, place: str) -> str:
        try:
            return self._template.render(messages, header=header)
        except Exception as error:  # Jinja code out of a model's folder: anything may come out of it
            raise UserError(
                f"{place}: the chat template does not accept this conversation: {error}",
                why=f"its roles are {', '.join(message.role for message in messages)}",
                fix=_PLAIN,
            ) from error

    def _answer_span(self, messages: Sequence[Message], index: int, text: str, place: str) -> tuple[int, int]:
        """First and last (exclusive) character in `text` of the answer `index` and its end of turn."""
        before = self._text(messages[:index], header=True, place=place)
        through = text if index + 1 == len(messages) else self._text(messages[: index + 1], header=False, place=place)
        if not (through.startswith(before) and text.startswith(through)):
            raise UserError(
                f"{place}: the chat template does not simply go on at message {index + 1}",
                why="what it writes without that answer, or without what follows it, is not how the whole begins: "
                "it is uncertain which tokens are the answer's",
                fix=_PLAIN,
            )
        return len(before), len(through.rstrip())

    def _tokens(self, text: str) -> tuple[Int32[np.ndarray, " tokens"], np.ndarray, np.ndarray]:
        """Ids, and the first and last (exclusive) character of each."""
        # Templates write the special tokens they want, once; the plain one has `first_ids`.
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        first = self._template.first_ids
        ids = np.asarray([*first, *encoded["input_ids"]], np.int32)
        offsets = np.concatenate([np.zeros((len(first), 2), np.int64), offsets])
        return ids, offsets[:, 0], offsets[:, 1]

    def _find_stop_ids(self) -> tuple[int, ...]:
        probe = Conversation((Message("user", "Hello"), Message("assistant", "Hello")), 1, "the template's trial")
        example = self.render(probe)
        end_of_turn = int(example.input_ids[np.flatnonzero(example.loss_mask)[-1]])
        if end_of_turn not in self.tokenizer.added_tokens_decoder and end_of_turn != self.tokenizer.eos_token_id:
            raise UserError(
                f"the chat template ends an answer with {self.tokenizer.decode([end_of_turn])!r}, no special token",
                why="the model would never learn where to stop",
                fix=_PLAIN,
            )
        eos = self.tokenizer.eos_token_id
        return (end_of_turn,) if eos is None or eos == end_of_turn else (end_of_turn, eos)


class _Template(Protocol):
    first_ids: Sequence[int]  # before the text

    def render(self, messages: Sequence[Message], *, header: bool) -> str: ...


class _ChatTemplate:
    """The tokenizer's own, which also writes the beginning-of-sequence token where the model wants one."""

    first_ids: Sequence[int] = ()

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if not tokenizer.chat_template:
            raise UserError("data.template=chat, but the tokenizer has no chat template", fix=_PLAIN)
        self._tokenizer = tokenizer

    def render(self, messages: Sequence[Message], *, header: bool) -> str:
        turns = [message._asdict() for message in messages]
        rendered = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=header, date_string=_DATE
        )
        return str(rendered)


class _PlainTemplate:
    """Alpaca's headings, for base models: no token that they have not seen. Each answer ends with end-of-sequence."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        if tokenizer.eos_token is None:
            raise UserError(
                "the tokenizer has no end-of-sequence token",
                why="answers would have no end",
                fix='set "eos_token" in tokenizer_config.json',
            )
        self._formats = {
            "system": "{}",
            "user": "### Instruction:\n{}",
            "assistant": "### Response:\n{}" + tokenizer.eos_token,
        }
        # As an id, not as text: SentencePiece tokenizes the first word differently after a token.
        start = tokenizer("a").input_ids[:1]
        self.first_ids: Sequence[int] = start if start == [tokenizer.bos_token_id] else ()

    def render(self, messages: Sequence[Message], *, header: bool) -> str:
        turns = [self._formats[role].format(content) for role, content in messages]
        return "\n\n".join([*turns, "### Response:\n"] if header else turns)
