"""How much of the machine others took meanwhile: threads that wait for each other suffer most from it."""

import os
import time
from collections.abc import Sequence
from pathlib import Path


class OtherLoad:
    """Counts, from when it is made, the processor time of all processes but this one and some others (Linux).

    Args:
      pids: of processes that are measured, too.
    """

    def __init__(self, pids: Sequence[int] = ()) -> None:
        self._pids = pids
        self._began, self._start = time.perf_counter(), self._others()

    def share(self) -> float | None:
        """Of all cores' time since then, what others took: 0 to 1; None where the system does not say."""
        now = self._others()
        if now is None or self._start is None:
            return None
        wall = (time.perf_counter() - self._began) * (os.cpu_count() or 1)
        return min(1.0, max(0.0, (now - self._start) / wall))

    def _others(self) -> float | None:
        try:
            ticks = sum(_busy_ticks()) - sum(sum(_own_ticks(pid)) for pid in (os.getpid(), *self._pids))
        except OSError:
            return None
        return ticks / os.sysconf("SC_CLK_TCK")


def _busy_ticks() -> list[int]:
    """Time of all processes, and what a hypervisor gave to other machines; not idle, not waiting for a disk."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return [user, nice, system, irq, softirq, steal]


def _own_ticks(pid: int) -> list[int]:
    # After the name, which may hold blanks, the 12th and 13th numbers are its time and the kernel's for it.
    fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    return [int(fields[11]), int(fields[12])]
