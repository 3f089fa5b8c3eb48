"""Messages in, answers out: one conversation, or a file of prompts in batches of like length."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.data.formats import Message, Prompt
from qlora_jax.data.rendering import Renderer
from qlora_jax.data.source_target import SourceTargetRenderer
from qlora_jax.errors import UserError, UserErrors
from qlora_jax.evaluation.answers import Answer, Answerer
from qlora_jax.evaluation.generation import room


class Asker:
    """A model that is asked in messages.

    Args:
      answerer: the model and how it answers.
      renderer: writes messages as the model knows them.
    """

    def __init__(self, answerer: Answerer, renderer: Renderer | SourceTargetRenderer) -> None:
        self._answerer, self._renderer = answerer, renderer

    def ask(
        self,
        turns: Sequence[tuple[str, str]],
        *,
        show: Callable[[str], None] | None = None,
        is_interrupted: Callable[[], bool] | None = None,
    ) -> Answer:
        """Answers the last of the turns (role, content); `show` and `is_interrupted` as in `Answerer.answer`.

        Raises:
          UserError: the turns take all of the model's positions, or the template refuses them.
        """
        prompt = self._renderer.prompt([Message(*turn) for turn in turns])
        what, fix = ("the conversation", "begin a new one") if len(turns) > 2 else ("the prompt", "shorten it")
        if mistake := self._too_long(prompt, what, fix):
            raise mistake
        return self._answerer.answer([prompt], show=show, is_interrupted=is_interrupted)[0]

    def ask_all(
        self,
        prompts: Sequence[Prompt],
        place: Path,
        *,
        system: str | None = None,
        batch_size: int = 8,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Answers the prompts of a file.

        Args:
          prompts: of the file.
          place: the file, for messages.
          system: system message of prompts without one.
          batch_size: prompts that are answered at once. It does not change what is sampled.
          progress: called with (done, all).

        Returns:
          In the order of the file, each row with "answer" and "finish" ("stop" or "length"); a text as "prompt".

        Raises:
          UserErrors: every prompt that takes all of the model's positions, or that has an "answer" already.
        """
        tokens, mistakes = [], []
        for prompt in prompts:
            messages = list(prompt.messages)
            if system and messages[0].role != "system":
                messages.insert(0, Message("system", system))
            tokens.append(self._renderer.prompt(messages))
            where = f"{place}:{prompt.line}"
            if taken := [key for key in ("answer", "finish") if isinstance(prompt.row, dict) and key in prompt.row]:
                mistakes.append(UserError(f'{where}: the row has "{taken[0]}"', why="the model's goes there"))
            if mistake := self._too_long(tokens[-1], f"{where}: the prompt", "shorten it"):
                mistakes.append(mistake)
        if mistakes:
            raise UserErrors(mistakes)
        answers: dict[int, Answer] = {}
        for batch in self._batches(tokens, batch_size):
            made = self._answerer.answer([tokens[index] for index in batch], row_numbers=batch)
            answers |= dict(zip(batch, made, strict=True))
            if progress is not None:
                progress(len(answers), len(prompts))
        rows = [prompt.row if isinstance(prompt.row, dict) else {"prompt": prompt.row} for prompt in prompts]
        return [
            {**row, "answer": answers[index].text, "finish": answers[index].finish} for index, row in enumerate(rows)
        ]

    def _batches(self, tokens: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
        """Indices, by length. An answer's room in a batch is that of its longest prompt: those with little go alone."""
        by_length = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
        roomy = [i for i in by_length if room(self._answerer.model, tokens[i]) >= self._answerer.max_new_tokens]
        for start in range(0, len(roomy), size):
            yield roomy[start : start + size]
        for index in by_length[len(roomy) :]:
            yield [index]

    def _too_long(self, prompt: Sequence[int], what: str, fix: str) -> UserError | None:
        if room(self._answerer.model, prompt) > 0:
            return None
        positions = len(prompt) + room(self._answerer.model, prompt)
        return UserError(
            f"{what} takes {len(prompt)} tokens, with the template's own",
            why=f"the model has {positions} positions, and an answer needs some of them",
            fix=fix,
        )
