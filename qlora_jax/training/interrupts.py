"""Ctrl-C during a run: the first asks it to end well, the second ends it."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SAVING = "\nCtrl-C: finishing this step, then saving. Once more to stop without saving.\n"


class Interrupt:
    """Whether the user has asked the run to end."""

    def __init__(self) -> None:
        self.requested = False


@contextlib.contextmanager
def first_interrupt_is_a_request(said: str = _SAVING) -> Iterator[Interrupt]:
    """While inside, the first SIGINT only sets `requested` and prints `said`; a second one raises KeyboardInterrupt.

    Outside the main thread, where signals cannot be handled, nothing is changed.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True
        # Not through the console: the signal may have come while it was printing.
        os.write(2, said.encode())

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
