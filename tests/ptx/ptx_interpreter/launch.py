"""`Launch`: one kernel launch from arguments to counters and reports."""

import struct
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from .blocks import BlockGroup
from .compiler import CompiledKernel, compile_kernel
from .counters import Counters, class_totals
from .lanes import Lanes
from .memory import DeviceMemory
from .parser import Kernel, Module, Parameter
from .ptx_types import SHARED_BASE, SHARED_LIMIT, PTXError
from .races import BlockHistory
from .reports import KINDS, Reports

Size = int | Sequence[int]


def _triple(size: Size) -> tuple[int, int, int]:
    sizes = [size] if isinstance(size, int | np.integer) else list(size)
    x, y, z = (*sizes, 1, 1)[:3]
    return int(x), int(y), int(z)


def _shared_layout(kernel: Kernel) -> tuple[dict[str, int], int]:
    """Addresses of the shared variables, and the offset where dynamic shared memory starts."""
    addresses, offset = {}, 0
    for variable in kernel.shared + [other for other in kernel.module.shared if other.nbytes]:
        offset = -(-offset // variable.align) * variable.align
        addresses[variable.name] = SHARED_BASE + offset
        offset += variable.nbytes
    dynamic = [variable for variable in kernel.module.shared if not variable.nbytes]
    align = max([variable.align for variable in dynamic] + [16])
    offset = -(-offset // align) * align
    return addresses | {variable.name: SHARED_BASE + offset for variable in dynamic}, offset


def _pack(parameter: Parameter, value) -> bytes:
    if isinstance(value, bytes):
        return value
    if parameter.type in ("f32", "f64"):
        return struct.pack("<f" if parameter.type == "f32" else "<d", value)
    return (int(value) & ((1 << 8 * parameter.nbytes) - 1)).to_bytes(parameter.nbytes, "little")


def _parameter_bytes(kernel: Kernel, arguments: Sequence) -> bytes:
    if len(arguments) != len(kernel.parameters):
        raise PTXError(f"{kernel.name} takes {len(kernel.parameters)} arguments, got {len(arguments)}")
    packed = bytearray(max(kernel.parameter_bytes, 1))
    for parameter, value in zip(kernel.parameters.values(), arguments, strict=True):
        packed[parameter.offset : parameter.offset + parameter.nbytes] = _pack(parameter, value)
    return bytes(packed)


class Launch:
    """Runs kernel `name` of `module` when constructed.

    grid, block: a number or up to three. args: device addresses, integers, floats, or a struct's bytes. smem: dynamic
    shared memory in bytes. races: data races and what goes with them. profile: bank conflicts and sectors. fatal: the
    kinds of report (`KINDS`, or 'all') that stop the run. lanes: how many lanes run side by side at most (blocks are
    packed; a matter of speed). seed: a random schedule and block order. blocks: run only these (x, y, z).
    smem_init, mbar_init ({offset: (count, phase)}): for kernels that are tested without their producer.

    Afterwards: `reports` {(kind, pc): line}, `seconds`, and the methods below. Raises PTXError on what must never
    happen (out of bounds, misalignment, deadlock, endless loop), with earlier reports in its text; on a fatal report;
    and on PTX that the interpreter does not know.
    """

    def __init__(
        self,
        module: Module,
        name: str,
        grid: Size,
        block: Size,
        args: Sequence,
        smem: int = 0,
        mem: DeviceMemory | None = None,
        races: bool = True,
        profile: bool = True,
        fatal: str | Sequence[str] = (),
        lanes: int = 1024,
        seed: int | None = None,
        max_steps: int = 20_000_000,
        blocks: Sequence[tuple[int, int, int]] | None = None,
        smem_init: np.ndarray | None = None,
        mbar_init: dict[int, tuple[int, int]] | None = None,
    ):
        if name not in module.kernels:
            raise PTXError(f"no kernel {name}; there are {sorted(module.kernels)}")
        self.kernel = module.kernels[name]
        self.grid, self.block = _triple(grid), _triple(block)
        self.memory = DeviceMemory() if mem is None else mem
        threads = int(np.prod(self.block))
        if threads > int(np.prod(self.kernel.maxntid or 1024)):
            raise PTXError(f"{name}: {threads} threads, more than .maxntid")
        addresses, static = _shared_layout(self.kernel)
        self.dynamic_bytes, self.shared_bytes = smem, static + smem
        limit = SHARED_LIMIT.get(module.target.rstrip("af"), max(SHARED_LIMIT.values()))
        if self.shared_bytes > limit:
            raise PTXError(f"{name}: {self.shared_bytes} bytes of shared memory, {module.target} has {limit} per block")
        self.compiled = self._compile(addresses)
        self._parameters = _parameter_bytes(self.kernel, args)
        self._findings = Reports(self.kernel, KINDS if fatal == "all" else tuple(fatal))
        self.counters = Counters()
        self._profile, self._max_steps = profile, max_steps
        self.memory.symbols(module)  # laid out before the history is sized
        shift = self.compiled.global_shift
        self._history = BlockHistory(self.memory.used, shift, self._findings) if races else None
        self._smem_init, self._mbar_init = smem_init, mbar_init or {}
        self._rng = None if seed is None else np.random.default_rng(seed)
        self._warp_runs = np.zeros(len(self.compiled.blocks), np.int64)
        self._lane_runs = np.zeros(len(self.compiled.blocks), np.int64)
        self.seconds = 0.0
        self._run(self._ordered(blocks), max(1, lanes // (-(-threads // 32) * 32)))

    def _compile(self, addresses: dict[str, int]) -> CompiledKernel:
        cache = self.kernel.module.compiled
        key = (self.kernel.name, tuple(sorted(addresses.items())))
        if key not in cache:
            cache[key] = compile_kernel(self.kernel, addresses)
        return cache[key]

    def _ordered(self, blocks: Sequence[tuple[int, int, int]] | None) -> list[tuple[int, int, int]]:
        if blocks is None:
            width, height, depth = self.grid
            blocks = [(x, y, z) for z in range(depth) for y in range(height) for x in range(width)]
        blocks = list(blocks)
        return blocks if self._rng is None else [blocks[index] for index in self._rng.permutation(len(blocks))]

    def _run(self, blocks: list[tuple[int, int, int]], at_once: int) -> None:
        start = time.perf_counter()
        try:
            with np.errstate(all="ignore"):
                for first in range(0, len(blocks), at_once):
                    self._run_group(blocks[first : first + at_once])
        except PTXError as error:  # the first report is the cause: keep what was seen before the stop
            earlier = [f"earlier: {line}" for line in list(self.reports.values())[:8]]
            raise PTXError("\n  ".join([str(error), *earlier])) from None
        self.seconds = time.perf_counter() - start

    def _run_group(self, blocks: list[tuple[int, int, int]]) -> None:
        lanes = Lanes(self.block, self.grid, blocks, self.dynamic_bytes, self.shared_bytes, self._findings)
        group = BlockGroup(
            self.compiled,
            lanes,
            self.memory,
            self._parameters,
            self.shared_bytes,
            self._findings,
            self.counters if self._profile else None,
            self._history,
            self._rng,
            self._max_steps,
        )
        if self._smem_init is not None:
            group.shared.preset(np.asarray(self._smem_init).reshape(-1).view(np.uint8))
        for offset, (count, phase) in self._mbar_init.items():
            group.mbarriers.preset(offset, count, phase)
        group.run()
        self._warp_runs += group.scheduler.warp_runs
        self._lane_runs += group.scheduler.lane_runs

    @property
    def reports(self) -> dict[tuple[str, int], str]:
        return self._findings.found

    @property
    def warp_instr(self) -> int:
        """Warp instructions executed."""
        return int(
            sum(runs * block.instructions for runs, block in zip(self._warp_runs, self.compiled.blocks, strict=True))
        )

    @property
    def lane_instr(self) -> int:
        """Lane instructions executed."""
        return int(
            sum(runs * block.instructions for runs, block in zip(self._lane_runs, self.compiled.blocks, strict=True))
        )

    def classes(self) -> Counter[str]:
        """Warp instructions by class (`counters.classify`)."""
        return class_totals(self._warp_runs, [block.classes for block in self.compiled.blocks])

    def conflicts(self) -> int:
        """Shared-memory wavefronts beyond the ideal number."""
        return self.counters.conflicts()

    def traffic(self) -> dict[str, int]:
        """Global bytes read and written by lanes, sectors touched, and the fewest sectors that would do."""
        return self.counters.traffic(self.kernel.instructions)

    def worst(self, count: int = 5) -> list[str]:
        """The shared and global instructions furthest from their ideal."""
        return self.counters.worst(self.kernel.instructions, count)
