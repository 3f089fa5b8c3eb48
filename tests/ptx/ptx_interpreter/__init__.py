"""Runs the PTX that nvcc emits on a CPU, and reports what a GPU would hide.

PTX text is compiled to Python: one function per basic block, one numpy statement per instruction, all lanes of several
thread blocks at once. Asynchronous results arrive as late as the PTX rules allow and read as NaN until then. Checked:
bounds, alignment, uninitialised and in-flight shared memory, data races, proxy fences, wgmma registers, deadlocks.
Not shown: timing, weak memory between blocks, the tensor cores' own summation order.
"""

from .launch import Launch
from .memory import DeviceMemory
from .parser import Module
from .ptx_types import PTXError
from .reports import KINDS

__all__ = ["KINDS", "DeviceMemory", "Launch", "Module", "PTXError"]
