"""What a run prints while it works: a bar on a terminal, plain lines elsewhere."""

import time
from collections import deque
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

_RECENT_STEPS = 20


class Progress:
    """Shows steps with loss, learning rate, gradient norm, trained tokens/s, peak memory and time left.

    Args:
      every: steps between plain lines; evaluations and the last step always get one. A terminal's bar moves each step.
      console: where to print; standard output by default.
      clock: seconds, for the time left.
    """

    def __init__(
        self, *, every: int = 1, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console if console is not None else Console(highlight=False)
        self._every = every
        self._clock = clock
        self._total = 0
        self._ends: deque[tuple[int, float]] = deque(maxlen=_RECENT_STEPS + 1)
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def start(self, total_steps: int, first_step: int = 0) -> None:
        """Begins at `first_step` steps done out of `total_steps`."""
        self._total = total_steps
        self._ends.clear()
        if self.console.is_terminal:
            columns = (BarColumn(bar_width=16), TextColumn("{task.description}", markup=False))
            self._bar = RichProgress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task(f"{first_step}/{total_steps}", total=total_steps, completed=first_step)
            self._bar.start()

    def step(
        self,
        step: int,
        *,
        loss: float | None = None,
        lr: float | None = None,
        grad_norm: float | None = None,
        tokens_per_second: float | None = None,
        memory_bytes: int | None = None,
        eval_loss: float | None = None,
    ) -> None:
        """Shows a finished step. What is None is left out."""
        if loss is not None:
            self._ends.append((step, self._clock()))
        left = self.seconds_left()
        parts = [
            f"step {step}/{self._total}",
            None if loss is None else f"loss {loss:.4f}",
            None if eval_loss is None else f"eval loss {eval_loss:.4f}",
            None if lr is None else f"lr {lr:.2e}",
            None if grad_norm is None else f"grad {grad_norm:.3f}",
            None if tokens_per_second is None else f"{tokens_per_second:,.0f} tok/s",
            None if memory_bytes is None else f"peak {memory_bytes / 1e9:.2f} GB",
            None if left is None else f"{clock_face(left)} left",
        ]
        text = "  ".join(part for part in parts if part is not None)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=text)
        stays = step == self._total or eval_loss is not None
        if stays or (self._bar is None and step % self._every == 0):
            self.say(text)

    def seconds_left(self) -> float | None:
        """By the pace of the last steps; None until two have ended, for the first one compiles."""
        if len(self._ends) < 2:
            return None
        (first, began), (last, ended) = self._ends[0], self._ends[-1]
        return (ended - began) / (last - first) * (self._total - last) if last > first else None

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finish(self) -> None:
        """Takes the bar down. Harmless when there is none."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def clock_face(seconds: float) -> str:
    """`75.2` -> `1:15`, `3700` -> `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
