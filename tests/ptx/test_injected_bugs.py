"""Whole kernels as nvcc compiles them: right and free of reports; and broken in one place, named by the report."""

import ml_dtypes
import numpy as np
import pytest
from ptx_interpreter import DeviceMemory, Launch, PTXError

BF16 = np.dtype(ml_dtypes.bfloat16)
LEVELS = np.linspace(-1, 1, 16, dtype=np.float32)


def dequantize(build, *defines, n=8192, **options):
    rng = np.random.default_rng(4)
    packed = rng.integers(0, 256, n // 2, dtype=np.uint8)
    absmax = rng.random(-(-n // 64)).astype(np.float32) + np.float32(0.1)
    memory = DeviceMemory(1 << 20)
    out = memory.alloc(2 * n)
    arguments = [memory.upload(packed), memory.upload(absmax), memory.upload(LEVELS), out, n]
    module = build("dequantize.cu", "sm_80", *defines)
    launch = Launch(module, "dequantize", -(-n // 1024), 128, arguments, mem=memory, **options)
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)
    wanted = (LEVELS[codes] * np.repeat(absmax, 64)[:n]).astype(BF16)
    return launch, np.array_equal(memory.download(out, n, BF16), wanted)


def product(a, b):
    return a.astype(np.float64) @ b.astype(np.float64).T


def gemm_sm80(build, *defines, m=64, n=64, k=128, **options):
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal((rows, k)).astype(BF16) for rows in (m, n))
    memory = DeviceMemory(1 << 20)
    c = memory.alloc(4 * m * n)
    arguments = [memory.upload(a), memory.upload(b), c, m, n, k]
    module = build("gemm_sm80.cu", "sm_80", *defines)
    launch = Launch(module, "gemm", (-(-n // 64), -(-m // 64)), 128, arguments, mem=memory, **options)
    return launch, np.allclose(memory.download(c, (m, n), np.float32), product(a, b), rtol=1e-4, atol=1e-3)


def gemm_sm90(build, *defines, name="gemm_bulk", k=256, **options):
    rng = np.random.default_rng(6)
    w, x = (rng.standard_normal((64, k)).astype(BF16) for _ in range(2))
    memory = DeviceMemory(1 << 20)
    y = memory.alloc(4 * 64 * 64)
    bulk = name == "gemm_bulk"
    laid_out = np.ascontiguousarray(x.reshape(64, k // 64, 8, 8).transpose(1, 2, 0, 3)) if bulk else x
    arguments = [memory.upload(w), memory.upload(laid_out), y, k]
    shared = 2 * 8192 + 32 if bulk else 8192
    module = build("gemm_sm90.cu", "sm_90a", *defines)
    launch = Launch(module, name, 1, 256 if bulk else 128, arguments, shared, memory, **options)
    return launch, np.allclose(memory.download(y, (64, 64), np.float32), product(w, x), rtol=1e-4, atol=1e-3)


def swizzled(build, *defines, **options):
    return gemm_sm90(build, *defines, name="gemm_swizzled", **options)


KERNELS = {"dequantize": dequantize, "gemm_sm80": gemm_sm80, "gemm_bulk": gemm_sm90, "gemm_swizzled": swizzled}


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("kernel", KERNELS)
def test_unbroken_kernels_are_right_without_a_report(build, kernel, seed):
    launch, right = KERNELS[kernel](build, fatal="all", seed=seed)
    assert right
    assert not launch.reports
    assert launch.warp_instr > 0
    assert launch.lane_instr <= 32 * launch.warp_instr


@pytest.mark.parametrize("lanes", [128, 4096])
def test_ragged_tiles(build, lanes):
    assert gemm_sm80(build, m=100, n=72, k=136, fatal="all", lanes=lanes)[1]
    assert dequantize(build, n=8192 - 64, fatal="all", lanes=lanes)[1]


def test_checks_can_be_switched_off(build):
    for kernel in KERNELS.values():
        launch, right = kernel(build, races=False, profile=False, fatal="all")
        assert right
        assert launch.conflicts() == 0
        assert launch.traffic()["read"] == 0


# kernel, bug, kind of the first report, the instruction that it names, whether the numbers come out right all the same
REPORTED = [
    ("dequantize", "BUG_NO_SYNC", "race-read-after-write", "ld.shared", True),
    ("gemm_sm80", "BUG_NO_CLOSING_SYNC", "race-write-after-read", "cp.async.cg", True),
    ("gemm_sm80", "BUG_NO_WAIT", "in-flight-read", "ldmatrix", False),
    ("gemm_bulk", "BUG_NO_WGMMA_WAIT", "wgmma-register", "", False),
    ("gemm_swizzled", "BUG_NO_PROXY_FENCE", "missing-proxy-fence", "wgmma.mma_async", True),
    ("gemm_swizzled", "BUG_LATE_CLEAR", "missing-wgmma-fence", "wgmma.mma_async", True),
]


@pytest.mark.parametrize(("kernel", "bug", "kind", "opcode", "right"), REPORTED)
def test_each_bug_has_its_report(build, kernel, bug, kind, opcode, right):
    launch, result = KERNELS[kernel](build, bug)
    assert result == right
    assert kind in {found for found, _ in launch.reports}, launch.reports
    (_, pc), line = next(item for item in launch.reports.items() if item[0][0] == kind)
    assert opcode in launch.kernel.instructions[pc].text
    assert launch.kernel.instructions[pc].text[:60] in line
    with pytest.raises(PTXError, match="|".join({found for found, _ in launch.reports})):
        KERNELS[kernel](build, bug, fatal="all")
    if kind.startswith("race-read"):
        assert "last written by warp" in line
        assert "st.shared" in line


STOPPED = [
    ("gemm_sm80", "BUG_MISALIGNED", r"misaligned shared access \(16 bytes\)\n.*ldmatrix"),
    ("gemm_bulk", "BUG_NO_FULL_WAIT", r"DEADLOCK: 1 threads wait on mbarrier(.|\n)*earlier: in-flight-read.*wgmma"),
    ("gemm_bulk", "BUG_WRONG_PARITY", r"mbarrier: more arrivals than its count \(1\)"),
    ("gemm_bulk", "BUG_SHORT_EXPECT", r"DEADLOCK: .*128 threads wait on mbarrier"),
    ("gemm_bulk", "BUG_COUNT", r"DEADLOCK: .*threads wait on mbarrier"),
]


@pytest.mark.parametrize(("kernel", "bug", "message"), STOPPED)
def test_each_fatal_bug_stops_the_run(build, kernel, bug, message):
    with pytest.raises(PTXError, match=message):
        KERNELS[kernel](build, bug)


def test_a_wrong_but_legal_pattern_shows_in_the_numbers_only(build):
    launch, right = gemm_sm80(build, "BUG_WRONG_PATTERN")
    assert not right
    assert not launch.reports


def test_unpadded_rows_show_as_bank_conflicts(build):
    """Rows of 80 bytes start in 8 different bank quads; rows of 64 bytes share two: 4 wavefronts for 8 rows."""
    (padded, _), (unpadded, right) = gemm_sm80(build), gemm_sm80(build, "BUG_NO_PADDING")
    assert right
    for launch, wavefronts in ((padded, 1), (unpadded, 4)):
        for pc, (requests, used, ideal) in launch.counters.shared.items():
            if launch.kernel.instructions[pc].parts[0] == "ldmatrix":
                assert ideal == 4 * requests
                assert used == wavefronts * ideal
    assert "ldmatrix" in unpadded.worst()[0]
    assert unpadded.conflicts() > padded.conflicts()
