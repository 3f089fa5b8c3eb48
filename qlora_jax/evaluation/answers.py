"""Answers as text: where a stop string ends one, and what of a growing one can no longer change."""

import bisect
import re
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from qlora_jax.evaluation.generation import generate, room
from qlora_jax.evaluation.sampling import GREEDY, Sampling
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.t5 import T5

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A token that stands for one byte, where a tokenizer falls back to bytes. A run of them becomes text as a whole.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_HALF_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class Answer(NamedTuple):
    """Attributes:
    text: without the stop token or string, and without white space around it.
    tokens: how many it has, with those of a stop string and without a stop token.
    finish: "stop" at a stop token or string, "length" at the limit, "interrupted" where the asker wanted no more.
    """

    text: str
    tokens: int
    finish: Literal["stop", "length", "interrupted"]


class Answerer:
    """Asks a model, and gives text.

    Args:
      model: the model, with or without adapters.
      tokenizer: its tokenizer.
      stop_ids: tokens that end an answer.
      stop_strings: texts before which an answer ends, however they are cut into tokens. The text of a special token
        stands for that token, which is not part of any answer's text.
      max_new_tokens: longest answer.
      sampling: how tokens are chosen.
      seed: decides what is sampled.
    """

    def __init__(
        self,
        model: Decoder | T5,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        stop_ids: Collection[int],
        stop_strings: Sequence[str] = (),
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> None:
        special = {str(token): id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.model, self.tokenizer = model, tokenizer
        self.stop_ids = {*stop_ids, *(special[stop] for stop in stop_strings if stop in special)}
        self.stop_strings = [stop for stop in stop_strings if stop not in special]
        self.max_new_tokens = max_new_tokens
        self.sampling, self.seed = sampling, seed

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        row_numbers: Sequence[int] | None = None,
        show: Callable[[str], None] | None = None,
        is_interrupted: Callable[[], bool] | None = None,
    ) -> list[Answer]:
        """Answers prompts together.

        Args:
          prompts: tokens, at least one in each; none so long that the model has no position left.
          row_numbers: see `generate`.
          show: called with each new piece of the first answer's text, which the pieces add up to.
          is_interrupted: asked several times a second whether to stop.

        Raises:
          UserError: as `generate`.
        """
        texts = [GrowingText(self.tokenizer, self.stop_strings) for _ in prompts]
        interrupted = False

        def watch(answers: list[list[int]]) -> Collection[int]:
            nonlocal interrupted
            if show is not None and (piece := texts[0].settle(answers[0])):
                show(piece)
            if is_interrupted is not None and is_interrupted():
                interrupted = True
                return range(len(answers))
            if not self.stop_strings:
                return ()
            return [row for row, text in enumerate(texts) if text.is_stopped(answers[row])]

        limit = min([self.max_new_tokens, *(room(self.model, prompt) for prompt in prompts)])
        answers = generate(
            self.model,
            prompts,
            max_new_tokens=limit,
            sampling=self.sampling,
            seed=self.seed,
            eos_ids=self.stop_ids,
            row_numbers=row_numbers,
            watch=watch if show or is_interrupted or self.stop_strings else None,
        )
        if show is not None and answers and (piece := texts[0].finish(answers[0])):
            show(piece)
        made = []
        for text, tokens in zip(texts, answers, strict=True):
            finish: Literal["stop", "length", "interrupted"] = "stop"
            if text.is_stopped(tokens):
                # A few more may have been written before anyone looked.
                end = bisect.bisect_left(range(len(tokens)), True, key=lambda n: text.is_stopped(tokens[:n]))
                tokens = tokens[:end]
            elif len(tokens) == limit:
                finish = "length"
            elif interrupted:
                finish = "interrupted"
            made.append(Answer(text.whole(tokens), len(tokens), finish))
        return made


class GrowingText:
    """The text of one answer while its tokens come.

    Tokenizers change earlier text: a character of several bytes is whole only with its last one, bytes that a
    tokenizer falls back to become text as a run, and some join punctuation to the word before it.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stop_strings)
        self._shown = ""

    def whole(self, tokens: Sequence[int]) -> str:
        """The text of all tokens, up to a stop string."""
        text = self._decode(tokens)
        return text[: self._stop(text)].strip()

    def is_stopped(self, tokens: Sequence[int]) -> bool:
        return self._stop(self._decode(tokens)) is not None if self._stops else False

    def settle(self, tokens: Sequence[int]) -> str:
        """What has become certain since the last call: it stays, whatever tokens follow."""
        end = len(tokens)
        while end and _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(int(tokens[end - 1])))):
            end -= 1
        text = self._decode(tokens[:end])
        stop = self._stop(text)
        if stop is None:
            text = text.rstrip(_HALF_CHARACTER)
            if self._tokenizer.clean_up_tokenization_spaces:
                text = text[: max(text.rfind(" "), 0)]
            text = text[: len(text) - self._begun_stop(text)]
        return self._advance(text[:stop].strip())

    def finish(self, tokens: Sequence[int]) -> str:
        """The rest of the text. After what was shown by `settle`, should the two differ, the whole on a new line."""
        whole = self.whole(tokens)
        return self._advance(whole) if whole.startswith(self._shown) else f"\n{whole}"

    def _advance(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _stop(self, text: str) -> int | None:
        """Where the first stop string begins."""
        return min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=None)

    def _begun_stop(self, text: str) -> int:
        """Length of the longest end of a text that a stop string begins with."""
        for length in range(min(max(map(len, self._stops), default=0) - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
