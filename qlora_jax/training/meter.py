"""How far a model is read or written, on standard error: a bar on a terminal, else lines at tenths if it takes long."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_LINES = 10
_QUIET_SECONDS = 2.0


class Meter:
    """Used as `with Meter("writing") as meter: work(progress=meter.show)`.

    Args:
      what: the word before the bar.
      unit: what is counted: "bytes", or another noun in the plural.
    """

    def __init__(self, what: str, unit: str = "bytes") -> None:
        self._what, self._unit = what, unit
        self._console = Console(file=sys.stderr, highlight=False)
        self._began = time.monotonic()
        self._tenths, self._said = 0, self._began
        counted: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn())
        if unit != "bytes":
            counted = (MofNCompleteColumn(), TextColumn(unit))
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), *counted, TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task(what, total=None)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def show(self, done: int, total: int) -> None:
        """`done` of `total` are read or written."""
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, total=total)
            return
        tenths, now = _LINES * done // max(total, 1), time.monotonic()
        if tenths > self._tenths and now - self._said > _QUIET_SECONDS:
            self._tenths, self._said = tenths, now
            count = f"{in_bytes(done)} of {in_bytes(total)}"
            if self._unit != "bytes":
                count = f"{done} of {total} {self._unit}"
            line = f"{self._what}: {count}, {now - self._began:.0f} s"
            self._console.print(line, markup=False, soft_wrap=True)


def in_bytes(count: int) -> str:
    """`98.2 MB`, `3.90 GB`."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
