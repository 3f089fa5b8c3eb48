"""wgmma operand layouts, chained products, and the registers that nobody may touch meanwhile."""

import ml_dtypes
import numpy as np
import pytest
from ptx_interpreter import PTXError
from ptx_interpreter.ptx_types import SHARED_BASE

RNG = np.random.default_rng(8)
LANE = np.arange(128)
WARP, G, T = LANE >> 5, LANE >> 2 & 7, LANE & 3
ROWS = 64


def layout(transposed, width):
    """(byte offset of element (n, k) for n < 64, k < 16; leading and stride byte offset; mode), in CUTLASS's terms:
    rows of `width` bytes whose 16-byte chunks are permuted by the row's number; width 16 is no swizzle."""
    n, k = np.arange(ROWS)[:, None], np.arange(16)[None, :]
    mode = {16: 0, 128: 1, 64: 2, 32: 3}[width]
    permute = {
        16: lambda row: 0 * row,
        128: lambda row: row % 8,
        64: lambda row: row // 2 % 4,
        32: lambda row: row // 4 % 2,
    }
    if width == 16 and not transposed:  # core matrices of 8 n x 8 k: k / 8 outside n / 8
        return n % 8 * 16 + n // 8 * 128 + k // 8 * 1024 + k % 8 * 2, 1024, 128, mode
    if width == 16:
        return k % 8 * 16 + n % 8 * 2 + n // 8 * 256 + k // 8 * 128, 128, 256, mode
    if not transposed:
        return n * width + ((k // 8) ^ permute[width](n)) * 16 + k % 8 * 2, 16, 8 * width, mode
    columns = width // 2  # n per atom; an atom has 8 k
    atom = n // columns * (2 * 8 * width) + k // 8 * (8 * width)
    return (
        atom + k % 8 * width + ((n % columns // 8) ^ permute[width](k % 8)) * 16 + n % 8 * 2,
        16 * width,
        8 * width,
        mode,
    )


def descriptor(offset, leading, stride, mode):
    return (SHARED_BASE + offset) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def operand(transposed, width, dtype):
    """Small integers [64 n, 16 k], the shared memory that holds them, and the descriptor's fields."""
    values = RNG.integers(-4, 5, (ROWS, 16))
    offsets, *fields = layout(transposed, width)
    memory = np.zeros(8192, np.uint8)
    memory.view(np.uint16)[offsets // 2] = values.astype(dtype).view(np.uint16)
    return values, memory, fields


def fragments(a, dtype):
    """The four A registers of every lane for a [64, 16]."""
    registers = {}
    for r, name in enumerate("abce"):
        row, column = 16 * WARP + G + 8 * (r & 1), 2 * T + 8 * (r >> 1)
        registers[name] = np.stack([a[row, column], a[row, column + 1]], -1).astype(dtype).view(np.uint32).reshape(-1)
    return registers


RESULT = [f"r{i}" for i in range(32)]
LIST = "{" + ",".join(f"%{name}" for name in RESULT) + "}"
CLEAR = "".join(f"mov.b32 %{name}, 0;" for name in RESULT)
FENCE = "wgmma.fence.sync.aligned;"
FINISH = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


def multiply(a, b, kind="bf16", scale=1, immediates="1, 1, 0"):
    opcode = f"wgmma.mma_async.sync.aligned.m64n64k16.f32.{kind}.{kind}"
    return f"setp.ne.b32 %p1, {scale}, 0; {opcode} {LIST}, {a}, {b}, %p1, {immediates};"


def result(outputs):
    """[64, 64]: register i holds row 16 warp + g + 8 (i >> 1 & 1), column 8 (i >> 2) + 2t + (i & 1)."""
    c = np.zeros((64, 64), np.float32)
    for i, values in enumerate(outputs):
        c[16 * WARP + G + 8 * (i >> 1 & 1), 8 * (i >> 2) + 2 * T + (i & 1)] = values
    return c


def run(lanewise, body, memory, fatal="all", **inputs):
    options = {"smem_init": memory, "fatal": fatal}
    outputs = dict.fromkeys(RESULT, np.float32)
    *columns, launch = lanewise(body, outputs, threads=128, shared=len(memory), options=options, **inputs)
    return result(columns), launch


LAYOUTS = [(transposed, width) for transposed in (False, True) for width in (16, 32, 64, 128)]


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize(("transposed", "width"), LAYOUTS)
def test_operand_b_in_every_layout(lanewise, transposed, width, kind):
    dtype = ml_dtypes.bfloat16 if kind == "bf16" else np.float16
    b, memory, fields = operand(transposed, width, dtype)
    a = RNG.integers(-4, 5, (64, 16))
    body = (
        CLEAR + FENCE + multiply("{%a,%b,%c,%e}", descriptor(0, *fields), kind, immediates=f"1, 1, {int(transposed)}")
    )
    got, _ = run(lanewise, body + FINISH, memory, **fragments(a, dtype))
    np.testing.assert_array_equal(got, a @ b.T)


@pytest.mark.parametrize(("transposed", "width"), LAYOUTS)
def test_operand_a_from_shared_memory(lanewise, transposed, width):
    a, a_memory, a_fields = operand(transposed, width, ml_dtypes.bfloat16)
    b, b_memory, b_fields = operand(False, 128, ml_dtypes.bfloat16)
    memory = np.concatenate([a_memory, b_memory])
    product = multiply(descriptor(0, *a_fields), descriptor(8192, *b_fields), immediates=f"1, 1, {int(transposed)}, 0")
    got, _ = run(lanewise, CLEAR + FENCE + product + FINISH, memory)
    np.testing.assert_array_equal(got, a @ b.T)


B, MEMORY, FIELDS = operand(False, 128, ml_dtypes.bfloat16)
A = RNG.integers(-4, 5, (64, 16))
REGISTERS = fragments(A, ml_dtypes.bfloat16)
PRODUCT = multiply("{%a,%b,%c,%e}", descriptor(0, *FIELDS))


def test_chains_scales_and_groups(lanewise):
    got, _ = run(lanewise, CLEAR + FENCE + PRODUCT + PRODUCT + FINISH, MEMORY, **REGISTERS)
    np.testing.assert_array_equal(got, 2 * A @ B.T)
    negative = multiply("{%a,%b,%c,%e}", descriptor(0, *FIELDS), immediates="-1, 1, 0")
    got, _ = run(lanewise, CLEAR + FENCE + PRODUCT + PRODUCT + negative + FINISH, MEMORY, **REGISTERS)
    np.testing.assert_array_equal(got, A @ B.T)
    fresh = multiply("{%a,%b,%c,%e}", descriptor(0, *FIELDS), scale=0)
    got, _ = run(lanewise, CLEAR.replace(", 0;", ", 7;") + FENCE + fresh + PRODUCT + FINISH, MEMORY, **REGISTERS)
    np.testing.assert_array_equal(got, 2 * A @ B.T)
    commit = "wgmma.commit_group.sync.aligned;"
    got, _ = run(lanewise, CLEAR + FENCE + PRODUCT + commit + PRODUCT + commit + FINISH, MEMORY, **REGISTERS)
    np.testing.assert_array_equal(got, 2 * A @ B.T)


def test_what_is_not_waited_for_reads_as_nan(lanewise):
    commit = "wgmma.commit_group.sync.aligned;"
    got, launch = run(lanewise, CLEAR + FENCE + PRODUCT + commit, MEMORY, fatal=(), **REGISTERS)
    assert np.isnan(got).all()
    assert {kind for kind, _ in launch.reports} == {"wgmma-register", "exit-in-flight"}
    one_left = CLEAR + FENCE + PRODUCT + commit + "wgmma.wait_group.sync.aligned 1;"
    with pytest.raises(PTXError, match="wgmma-register"):
        run(lanewise, one_left, MEMORY, **REGISTERS)


def test_register_and_fence_rules(lanewise):
    with pytest.raises(PTXError, match="missing-wgmma-fence"):
        run(lanewise, FENCE + CLEAR + PRODUCT + FINISH, MEMORY, **REGISTERS)
    with pytest.raises(PTXError, match="missing-wgmma-fence"):
        run(lanewise, CLEAR + FENCE + "mov.b32 %c, 0;" + PRODUCT + FINISH, MEMORY, **REGISTERS)
    with pytest.raises(PTXError, match="A-fragment register overwritten"):
        run(lanewise, CLEAR + FENCE + PRODUCT + "mov.b32 %a, 0;" + FINISH, MEMORY, **REGISTERS)
    with pytest.raises(PTXError, match="accumulator register accessed"):
        run(lanewise, CLEAR + FENCE + PRODUCT + "add.f32 %r3, %r3, %r3;" + FINISH, MEMORY, **REGISTERS)


def test_operands_in_shared_memory_are_checked(lanewise):
    store = "mov.u32 %x1, smem; mad.lo.u32 %x1, %thread, 4, %x1; st.shared.b32 [%x1], 0;"
    with pytest.raises(PTXError, match="write-under-wgmma"):
        run(lanewise, CLEAR + FENCE + PRODUCT + store + FINISH, MEMORY, **REGISTERS)
    with pytest.raises(PTXError, match="missing-proxy-fence"):
        run(lanewise, CLEAR + store + "bar.sync 0;" + FENCE + PRODUCT + FINISH, MEMORY, **REGISTERS)
    fenced = "fence.proxy.async.shared::cta;"
    with pytest.raises(PTXError, match=r"race-read-after-write.*wgmma operand"):
        run(lanewise, CLEAR + store + fenced + FENCE + PRODUCT + FINISH, MEMORY, **REGISTERS)
    run(lanewise, CLEAR + store + fenced + "bar.sync 0;" + FENCE + PRODUCT + FINISH, MEMORY, **REGISTERS)
    # Only the warps that fence make their own writes visible.
    some = "setp.lt.u32 %p2, %thread, 32; @%p2 fence.proxy.async.shared::cta;"
    with pytest.raises(PTXError, match="missing-proxy-fence"):
        run(lanewise, CLEAR + store + some + "bar.sync 0;" + FENCE + PRODUCT + FINISH, MEMORY, **REGISTERS)


@pytest.mark.parametrize(
    ("offset", "fields", "message"),
    [
        (128, FIELDS, "wgmma-descriptor.*not on a swizzle-pattern boundary"),
        (8192, FIELDS, "reaches outside shared memory"),
        (0, [FIELDS[0], 2048, FIELDS[2]], "reaches outside shared memory"),
    ],
)
def test_bad_descriptors(lanewise, offset, fields, message):
    product = multiply("{%a,%b,%c,%e}", descriptor(offset, *fields))
    with pytest.raises(PTXError, match=message):
        run(lanewise, CLEAR + FENCE + product + FINISH, MEMORY, **REGISTERS)


def test_an_unfinished_warpgroup_is_refused(lanewise):
    with pytest.raises(PTXError, match="all four warps of an aligned warpgroup"):
        lanewise(FENCE + "mov.u32 %d, 0;", {"d": np.uint32}, threads=96, a=np.zeros(96, np.uint32))
