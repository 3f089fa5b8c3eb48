"""The machine code of every kernel on every architecture: no local memory, the instructions that were meant, no growth.

`sass.json` holds the figures of the last accepted build; `python tests/gpu_compile/record_sass.py` rewrites it.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kernel_gates.compilation import ARCHITECTURES, Built, compile_kernels, compiler_version
from kernel_gates.counts import measure, product_shape

from qlora_jax._lib import _plan

pytestmark = pytest.mark.gpu_compile

RECORD = Path(__file__).parent / "sass.json"
GROWTH = 0.03
MEND = "if that is meant, run record_sass.py and predict.py (tests/gpu_compile) and commit what they write"
LOCAL_MEMORY = {"LDL", "STL"}
GENERIC_ADDRESSES = {"LD", "ST", "ATOM"}  # where the compiler has lost whether memory is shared or global

NAMES = sorted(_plan.kernel_names())
PRODUCTS = [name for name in NAMES if product_shape(name)]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Built]]:
    return compile_kernels()


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def each(compiled: dict[str, dict[str, Built]], architecture: str, names: list[str]) -> Iterator[tuple[str, Built]]:
    yield from ((name, compiled[architecture][name]) for name in names)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_entry_point_is_compiled(architecture: str, compiled: Any) -> None:
    assert sorted(compiled[architecture]) == NAMES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_uses_local_memory(architecture: str, compiled: Any) -> None:
    for name, built in each(compiled, architecture, NAMES):
        assert not LOCAL_MEMORY & built.kernel.opcodes.keys(), name
        usage = built.resources
        assert (usage.stack, usage.spill_stores, usage.spill_loads) == (0, 0, 0), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_address_is_generic(architecture: str, compiled: Any) -> None:
    for name, built in each(compiled, architecture, NAMES):
        assert not GENERIC_ADDRESSES & built.kernel.opcodes.keys(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_main_loop_of_a_product_has_the_instructions_that_its_sizes_ask_for(architecture: str, compiled: Any) -> None:
    for name, built in each(compiled, architecture, PRODUCTS):
        shape = product_shape(name)
        assert shape is not None
        warps = shape["threads"] // shape["k_groups"] // 32
        rows, tokens = shape["rows"], shape["tokens"]
        path = built.kernel.main_path()
        counts = Counter(i.opcode for i in path)
        # 16 output features x 8 tokens x 16 of the contraction.
        assert counts["HMMA"] == rows // 16 * (tokens // 8) * 4 // warps, name
        wanted = ".16816.F32.BF16" if "bf16" in name else ".16816.F32"
        assert {i.modifiers for i in path if i.opcode == "HMMA"} == {wanted}, name
        # Every warp reads all tokens, 16 of them or all 8 at a time, 16 of the contraction.
        assert counts["LDSM"] == max(tokens // 16, 1) * 4, name
        wanted = ".M88.4" if tokens >= 16 else ".M88.2"
        assert all(wanted in i.modifiers for i in path if i.opcode == "LDSM"), name
        # Weights and activations 16 bytes at a time; two words for each scale, on some architectures by two predicates.
        wide = (rows * 32 + tokens * 128) // 16
        assert counts["LDGSTS"] >= (wide // 32 + 2 * rows // 32) // warps, name
        assert sum(".128" in i.modifiers for i in path if i.opcode == "LDGSTS") == wide // 32 // warps, name
        assert not {"LDG", "STG", "SHFL"} & counts.keys(), name
        # A look-up gives a pair of weights.
        assert counts["LDS"] > rows * 64 // 2 // 32 // warps, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_long_streams_move_16_bytes_at_a_time(architecture: str, compiled: Any) -> None:
    for name, built in each(compiled, architecture, NAMES):
        wide = Counter(i.opcode for i in built.kernel.instructions if i.is_wide)
        if "sum_splits" in name:
            assert wide["LDG"], name
        else:
            assert wide["STG"], name  # dense weights, or sums of a split
        if "dequantize" in name:
            stored = [i for i in built.kernel.main_path() if i.opcode == "STG"]
            assert all(i.is_wide for i in stored), name


def test_the_record_is_of_this_compiler(record: Any) -> None:
    assert record["nvcc"] == compiler_version(), MEND
    assert list(record["kernels"]) == list(ARCHITECTURES), MEND


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_opcode_is_new(architecture: str, compiled: Any, record: Any) -> None:
    known = set(record["opcodes"][architecture])
    for name, built in each(compiled, architecture, NAMES):
        assert not built.kernel.opcodes.keys() - known, f"{name}: {MEND}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_figures_are_those_recorded(architecture: str, compiled: Any, record: Any) -> None:
    complaints = []
    for name, built in each(compiled, architecture, NAMES):
        now, then = measure(name, built, architecture), record["kernels"][architecture].get(name)
        if then is None:
            complaints.append(f"{name}: not recorded")
            continue
        for figure in ("threads", "shared", "blocks"):
            if now[figure] != then[figure]:
                complaints.append(f"{name}: {figure} {then[figure]} -> {now[figure]}")
        for figure in ("registers", "instructions", "path", "shared_clocks"):
            # Shrunk ones as well, so that the next growth shows.
            if abs(now[figure] - then[figure]) > GROWTH * then[figure]:
                complaints.append(f"{name}: {figure} {then[figure]} -> {now[figure]}")
        for kind in now["kinds"].keys() | then["kinds"].keys():
            before, after = then["kinds"].get(kind, 0), now["kinds"].get(kind, 0)
            if before == 0 or after > before + max(2, GROWTH * then["path"]):
                complaints.append(f"{name}: {before} -> {after} instructions of kind {kind}")
    assert not complaints, "\n".join([MEND, *complaints])
