"""The blocks of a grid that run side by side: registers, memories, barriers, all in one place for generated code."""

import numpy as np

from .async_copies import AsyncCopies, BulkCopies
from .atomics import Atomics
from .barriers import BlockBarriers
from .compiler import CompiledKernel
from .counters import Counters
from .lanes import Lanes
from .mbarriers import Mbarriers
from .memory import DeviceMemory, GenericMemory, GlobalMemory, LocalMemory
from .ptx_types import UNSIGNED
from .races import BlockHistory, Clocks
from .reports import Reports
from .scheduler import Scheduler
from .shared_memory import SharedMemory
from .tensor_core import TensorCore
from .warp import WarpCollectives
from .wgmma import Wgmma


class BlockGroup:
    """What generated code knows as `B`. Fresh registers hold NaN patterns that no address survives."""

    def __init__(
        self,
        compiled: CompiledKernel,
        lanes: Lanes,
        memory: DeviceMemory,
        parameters: bytes,
        shared_bytes: int,
        reports: Reports,
        counters: Counters | None,
        history: BlockHistory | None,
        rng: np.random.Generator | None,
        max_steps: int,
    ):
        self.lanes, self._parameters = lanes, parameters
        races = history is not None
        number = compiled.kernel.register_count
        halves = np.full((max(number["h"], 1), lanes.count), 0xFFFF, np.uint16)
        words = np.full((max(number["w"], 1), lanes.count), 0xFFFFDEAD, np.uint32)
        doubles = np.full((max(number["d"], 1), lanes.count), 0xDEAD_FFFF_DEAD_FFFF, np.uint64)
        predicates = np.zeros((max(number["p"], 1), lanes.count), np.bool_)
        self.registers = (
            *(halves, halves.view(np.int16)),
            *(words, words.view(np.int32), words.view(np.float32)),
            *(doubles, doubles.view(np.int64), doubles.view(np.float64)),
            predicates,
        )
        self.symbols = memory.symbols(compiled.kernel.module)
        self.clocks = Clocks(lanes)
        self.scheduler = Scheduler(compiled.blocks, lanes, reports, rng, max_steps)
        self.global_memory = GlobalMemory(memory, lanes, reports, counters, history)
        self.shared = SharedMemory(shared_bytes, compiled.granule_shift, lanes, self.clocks, reports, counters, races)
        self.local = LocalMemory(compiled.local_bytes, lanes, reports)
        self.generic = GenericMemory(self.global_memory, self.shared, self.local, lanes)
        self.atomics = Atomics(self.global_memory, self.shared, lanes)
        self.warp = WarpCollectives(lanes, reports)
        self.tensor = TensorCore(self.shared, lanes, counters)
        self.wgmma = Wgmma(words, compiled.wgmma_results, compiled.wgmma_fragments, self.shared, lanes, reports)
        self.barriers = BlockBarriers(lanes, self.clocks, self.scheduler, reports)
        self.mbarriers = Mbarriers(self.shared, lanes, self.clocks, self.scheduler, reports, races)
        self.copies = AsyncCopies(self.shared, self.global_memory, self.mbarriers, lanes, reports)
        self.bulk = BulkCopies(self.shared, self.global_memory, self.mbarriers, lanes, reports, rng)
        self.reports = reports

    def parameter(self, offset: int, size: int):
        return np.frombuffer(self._parameters, UNSIGNED[size], 1, offset)[0]

    def run(self) -> None:
        """Runs the blocks to their end. Raises PTXError."""
        landing = [self.bulk.land_one, self.copies.land_one]
        self.scheduler.run(self, self.barriers, self.mbarriers, landing, self.wgmma.note_exit)
