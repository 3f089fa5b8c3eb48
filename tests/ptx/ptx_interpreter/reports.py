"""What a run may be accused of, and where it is written down."""

from typing import NoReturn

from .parser import Kernel
from .ptx_types import PTXError

KINDS = (
    "in-flight-read",
    "in-flight-write",
    "uninitialised-read",
    "write-under-wgmma",
    "wgmma-register",
    "missing-wgmma-fence",
    "missing-proxy-fence",
    "wgmma-descriptor",
    "race-read-after-write",
    "race-write-after-write",
    "race-write-after-read",
    "race-within-warp",
    "race-between-blocks",
    "race-mbarrier-init",
    "exit-in-flight",
)


class Reports:
    """The first report of each kind at each instruction; a kind in `fatal` stops the run."""

    def __init__(self, kernel: Kernel, fatal: tuple[str, ...]):
        self.kernel = kernel
        self.fatal = fatal
        self.found: dict[tuple[str, int], str] = {}

    def fail(self, pc: int, message: str) -> NoReturn:
        """Stops the run: nothing after this could be trusted."""
        raise PTXError(f"{self.kernel.name}: {message}\n    at PTX #{pc}: {self.text(pc, 140)}")

    def report(self, kind: str, pc: int, message: str) -> None:
        """Notes a defect that the run can go on after."""
        if (kind, pc) in self.found:
            return
        line = f"{kind} at PTX #{pc}: {self.text(pc, 100)} -- {message}"
        self.found[kind, pc] = line
        if kind in self.fatal:
            raise PTXError(f"{self.kernel.name}: {line}")

    def text(self, pc: int, length: int = 60) -> str:
        return self.kernel.instructions[pc].text[:length]
