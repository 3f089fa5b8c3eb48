"""Held-out prompts answered before and after training: the change that a loss does not show."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_jax.training.result import Sample
from qlora_jax.training.run_folder import RunFolder, write_atomically

if TYPE_CHECKING:
    from qlora_jax.data.formats import Conversation, Message
    from qlora_jax.data.rendering import Renderer
    from qlora_jax.data.source_target import SourceTargetRenderer
    from qlora_jax.models.decoder import Decoder
    from qlora_jax.models.t5 import T5


class Samples:
    """The prompts of a run and their answers, kept in RUN/samples.json so that a resumed run still has the first ones.

    Args:
      count: prompts, spread evenly over the held-out conversations.
      max_new_tokens: longest answer.
    """

    def __init__(
        self,
        held_out: Sequence["Conversation"],
        renderer: "Renderer | SourceTargetRenderer",
        *,
        count: int,
        max_new_tokens: int,
    ) -> None:
        count = min(count, len(held_out))
        chosen = [held_out[index * len(held_out) // count] for index in range(count)]
        self._renderer = renderer
        self._max_new_tokens = max_new_tokens
        self.turns = [_first_turn(conversation) for conversation in chosen]

    def answer(self, model: "Decoder | T5") -> list[str]:
        """Greedy answers of the model as it is now."""
        from qlora_jax.evaluation.generation import generate

        prompts = [self._renderer.prompt(messages) for messages, _ in self.turns]
        if not prompts:
            return []
        answers = generate(model, prompts, max_new_tokens=self._max_new_tokens, eos_ids=self._renderer.stop_ids)
        return [str(self._renderer.tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in answers]

    def pair(self, before: Sequence[str], after: Sequence[str]) -> list[Sample]:
        return [
            Sample(prompt=messages[-1].content, reference=reference, before=old, after=new)
            for (messages, reference), old, new in zip(self.turns, before, after, strict=True)
        ]


def keep_answers(folder: RunFolder, answers: Sequence[str]) -> None:
    """Writes the answers from before training."""
    write_atomically(folder.samples_path, json.dumps(list(answers), ensure_ascii=False, indent=2) + "\n")


def kept_answers(folder: RunFolder) -> list[str] | None:
    """The answers from before training, where the run has got that far."""
    return json.loads(folder.samples_path.read_text(encoding="utf-8")) if folder.samples_path.exists() else None


def _first_turn(conversation: "Conversation") -> tuple[list["Message"], str]:
    """The messages before the first answer, and that answer."""
    messages = list(conversation.messages)
    index = next(number for number, message in enumerate(messages) if message.role == "assistant")
    return messages[:index], messages[index].content
