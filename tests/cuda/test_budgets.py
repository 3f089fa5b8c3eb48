"""What the kernels cost, counted in the PTX interpreter and held against budgets.json.

Counts of PTX, not of machine code or time. A product's numbers are differences between two contractions, of which the
second is twice as long: what one more 64x64 tile of weights costs a block. `pytest tests/cuda --record-budgets` writes
the file anew.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from packed_weight import DTYPES, PackedWeight, make_weight
from products import ALL_KERNELS, SHAPES, Kernel
from ptx_interpreter import DeviceMemory, Launch
from replay import dequantize, execute

from qlora_jax._lib import _plan

FILE = Path(__file__).with_name("budgets.json")
# Another patch release of nvcc may move an instruction.
TOLERANCE = 0.02
Costs = dict[str, float]


class Budgets:
    """The recorded costs of each kernel, and those that this session counts."""

    def __init__(self, recording: bool):
        self.recording = recording
        self.recorded: dict[str, Costs] = {} if recording else json.loads(FILE.read_text())
        self.counted: dict[str, Costs] = {}

    def check(self, kernel: str, costs: Costs) -> None:
        self.counted[kernel] = costs
        if self.recording:
            return
        budget = self.recorded[kernel]
        assert costs.keys() == budget.keys()
        for name, cost in costs.items():
            most = budget[name] * (1 + TOLERANCE)
            assert cost <= most, f"{kernel}: {name} is {cost}, the budget {budget[name]}"
            least = budget[name] * (1 - 5 * TOLERANCE)
            assert cost >= least, f"{kernel}: {name} is only {cost}, record it: the budget {budget[name]} is stale"

    def write(self) -> None:
        FILE.write_text(json.dumps(self.counted, indent=1, sort_keys=True) + "\n")


@pytest.fixture(scope="module")
def budgets(request: pytest.FixtureRequest) -> Iterator[Budgets]:
    # The option is unknown to runs that were not started in this folder.
    budgets = Budgets(request.config.getoption("--record-budgets", default=False))
    yield budgets
    if budgets.recording:
        budgets.write()


def with_one_scale(weight: PackedWeight) -> PackedWeight:
    """All scale codes equal: lanes look up one entry of the dynamic map, and no conflict depends on the data."""
    return dataclasses.replace(weight, absmax=np.full_like(weight.absmax, 200))


def count_product(kernel: Kernel, contraction: int) -> Launch:
    rng = np.random.default_rng(0)
    weight = with_one_scale(kernel.weight(rng, contraction, kernel.rows))
    return kernel.run(weight, kernel.activations(rng, kernel.tokens, weight, "normal"), profile=True).launches[0]


@pytest.mark.parametrize("kernel", ALL_KERNELS, ids=str)
def test_product(kernel: Kernel, budgets: Budgets):
    shape = SHAPES[kernel.tokens]
    contraction = 64 * shape["k_groups"] * (shape["stages"] + 1)
    short, long = count_product(kernel, contraction), count_product(kernel, 2 * contraction)
    tiles = contraction // 64 * kernel.rows // 64
    costs = {
        "instructions_per_weight": (long.warp_instr - short.warp_instr) * 32 / (tiles * 4096),
        "sectors_per_tile": (long.traffic()["sectors"] - short.traffic()["sectors"]) / tiles,
        "fewest_sectors_per_tile": (long.traffic()["ideal_sectors"] - short.traffic()["ideal_sectors"]) / tiles,
        "bank_conflicts": long.conflicts(),
    }
    if kernel.operation == "dx":
        costs["bank_conflicts_at_odd_addresses"] = count_product(kernel, contraction - 1).conflicts()
    budgets.check(kernel.entry, costs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["rows", "fragments"])
def test_dequantize(layout: str, dtype: str, budgets: Budgets):
    weight = with_one_scale(make_weight(np.random.default_rng(0), 512, 128))
    launch = dequantize(weight, dtype, layout, profile=True).launches[0]
    costs = {
        "instructions_per_weight": launch.warp_instr * 32 / weight.codes.size,
        "sectors_per_tile": launch.traffic()["sectors"] * 4096 / weight.codes.size,
        "fewest_sectors_per_tile": launch.traffic()["ideal_sectors"] * 4096 / weight.codes.size,
        "bank_conflicts": launch.conflicts(),
    }
    budgets.check(launch.kernel.name, costs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sum_splits(dtype: str, budgets: Budgets):
    tokens, outputs, splits = 16, 256, 4
    plan = _plan.plan(
        "forward", route="skinny", dtype=dtype, weight_dtype=dtype, tokens=tokens, in_features=64 * splits,
        out_features=outputs, row_blocks=splits, splits=splits,
    )  # fmt: skip
    plan["launches"] = plan["launches"][1:]
    memory = DeviceMemory(1 << 20)
    addresses = {
        "partials": memory.upload(np.zeros((splits, tokens, outputs), np.float32)),
        "y": memory.alloc(tokens * outputs * 2),
    }
    (launch,) = execute(plan, addresses, memory, profile=True)
    costs = {
        "instructions_per_result": launch.warp_instr * 32 / (tokens * outputs),
        "sectors": launch.traffic()["sectors"],
        "fewest_sectors": launch.traffic()["ideal_sectors"],
    }
    budgets.check(launch.kernel.name, costs)
