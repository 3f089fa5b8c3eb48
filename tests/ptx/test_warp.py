"""Exchanges between lanes and the matrix instructions, against numpy."""

import ml_dtypes
import numpy as np
import pytest
from ptx_interpreter import PTXError

RNG = np.random.default_rng(3)
LANE = np.arange(64) % 32
VALUES = RNG.integers(0, 1 << 32, 64, dtype=np.uint32)


def of_lane(lane):
    """The value that `lane` of each one's own warp holds."""
    return VALUES[np.arange(64) // 32 * 32 + lane]


def test_shuffles(lanewise):
    body = """shfl.sync.idx.b32 %d, %a, 5, 31, -1; shfl.sync.bfly.b32 %e, %a, 3, 31, -1;
    shfl.sync.up.b32 %f|%p1, %a, 2, 0, -1; selp.u32 %g, 1, 0, %p1; shfl.sync.down.b32 %h, %a, 3, 0x181f, -1;
    shfl.sync.idx.b32 %i, %a, 9, 0x181f, -1;"""
    d, e, f, g, h, i, _ = lanewise(body, dict.fromkeys("defghi", np.uint32), a=VALUES)
    np.testing.assert_array_equal(d, of_lane(5))
    np.testing.assert_array_equal(e, of_lane(LANE ^ 3))
    np.testing.assert_array_equal(f, of_lane(np.where(LANE >= 2, LANE - 2, LANE)))
    np.testing.assert_array_equal(g, LANE >= 2)
    within = LANE % 8 + 3 < 8  # segments of 8 lanes
    np.testing.assert_array_equal(h, of_lane(np.where(within, LANE + 3, LANE)))
    np.testing.assert_array_equal(i, of_lane(LANE // 8 * 8 + 1))


def test_votes_and_elections(lanewise):
    body = """setp.gt.u32 %p1, %a, 0x80000000; vote.sync.ballot.b32 %d, %p1, -1; vote.sync.any.pred %p2, %p1, -1;
    selp.u32 %e, 1, 0, %p2; vote.sync.all.pred %p3, %p1, -1; selp.u32 %f, 1, 0, %p3; activemask.b32 %g;
    redux.sync.add.u32 %h, %a, -1; redux.sync.min.s32 %i, %a, -1; elect.sync %j|%p4, -1; selp.u32 %k, 1, 0, %p4;"""
    d, e, f, g, h, i, j, k, _ = lanewise(body, dict.fromkeys("defghijk", np.uint32), a=VALUES)
    above = (VALUES > 0x80000000).reshape(2, 32)
    np.testing.assert_array_equal(d, np.repeat((above << np.arange(32)).sum(1), 32))
    np.testing.assert_array_equal(e, 1)
    np.testing.assert_array_equal(f, 0)
    np.testing.assert_array_equal(g, 0xFFFFFFFF)
    rows = VALUES.reshape(2, 32)
    np.testing.assert_array_equal(h, np.repeat(rows.sum(1, dtype=np.uint32), 32))
    np.testing.assert_array_equal(i.view(np.int32), np.repeat(rows.view(np.int32).min(1), 32))
    np.testing.assert_array_equal(j, 0)
    np.testing.assert_array_equal(k, LANE == 0)


def test_a_shuffle_from_a_lane_that_left(lanewise):
    body = "setp.lt.u32 %p1, %thread, 16; @%p1 shfl.sync.idx.b32 %d, %a, 20, 31, 0xffff; @!%p1 mov.u32 %d, 0;"
    with pytest.raises(PTXError, match="reads a lane that does not take part"):
        lanewise(body, {"d": np.uint32}, a=VALUES[:32])


# Every lane stores four words (its row of 16 bytes), so matrix i is rows 8i .. 8i + 7 of a 32 x 8 array of 16 bits.
FILL = """mov.u32 %x1, smem; mad.lo.u32 %x1, %thread, 16, %x1;
st.shared.v4.u32 [%x1], {%a, %b, %c, %e}; bar.sync 0;"""


def filled():
    rows = RNG.integers(0, 1 << 16, (32, 8), dtype=np.uint16)
    return rows, dict(zip("abce", np.ascontiguousarray(rows.view(np.uint32).T), strict=True))


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize("transpose", [False, True])
def test_ldmatrix(lanewise, number, transpose):
    rows, inputs = filled()
    targets = ["%m", "%n", "%o", "%q"][:number]
    trans = ".trans" if transpose else ""
    body = FILL + f"ldmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 {{{','.join(targets)}}}, [%x1];"
    *got, launch = lanewise(body, {name[1]: np.uint32 for name in targets}, shared=512, **inputs)
    for index, words in enumerate(got):
        matrix = rows[8 * index : 8 * index + 8]
        matrix = matrix.T if transpose else matrix
        lane = np.arange(32)
        wanted = np.stack([matrix[lane // 4, lane % 4 * 2], matrix[lane // 4, lane % 4 * 2 + 1]], 1)
        np.testing.assert_array_equal(words.view(np.uint16).reshape(32, 2), wanted)
    assert launch.conflicts() == 0


@pytest.mark.parametrize("transpose", [False, True])
def test_stmatrix_is_the_inverse(lanewise, transpose):
    _, inputs = filled()
    trans = ".trans" if transpose else ""
    body = f"""mov.u32 %x1, smem; mad.lo.u32 %x1, %thread, 16, %x1;
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%x1], {{%a, %b, %c, %e}}; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%m, %n, %o, %q}}, [%x1];"""
    *got, _ = lanewise(body, dict.fromkeys("mnoq", np.uint32), shared=512, **inputs)
    for words, wanted in zip(got, inputs.values(), strict=True):
        np.testing.assert_array_equal(words, wanted)


def test_movmatrix_transposes(lanewise):
    _, inputs = filled()
    d, _ = lanewise("movmatrix.sync.aligned.m8n8.trans.b16 %d, %a;", {"d": np.uint32}, a=inputs["a"])
    matrix = inputs["a"].view(np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(d.view(np.uint16).reshape(8, 8), matrix.T)


def test_matrix_rows_must_be_aligned_and_lanes_complete(lanewise):
    _, inputs = filled()
    load = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%d}, [%x1];"
    with pytest.raises(PTXError, match=r"misaligned shared access \(16 bytes\)"):
        lanewise(FILL + "add.u32 %x1, %x1, 8;" + load, {"d": np.uint32}, shared=1024, **inputs)
    with pytest.raises(PTXError, match=r"aligned instruction without all 32 lanes|only part of a warp"):
        lanewise(FILL + "setp.lt.u32 %p1, %thread, 16; @%p1 " + load, {"d": np.uint32}, shared=512, **inputs)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
@pytest.mark.parametrize("depth", [16, 8])
def test_mma(lanewise, kind, depth):
    """Operands laid out by the ISA's fragment tables: small integers, so that any order of summation is exact."""
    dtype = np.dtype(ml_dtypes.bfloat16) if kind == "bf16" else np.dtype(np.float16)
    a, b = RNG.integers(-8, 9, (2, 16, depth)), RNG.integers(-8, 9, (2, depth, 8))
    c = RNG.integers(-50, 50, (2, 16, 8)).astype(np.float32)
    lane = np.arange(32)
    g, t = lane >> 2, lane & 3
    inputs, a_names, b_names = {}, "abef"[: depth // 4], "gh"[: depth // 8]
    for r, name in enumerate(a_names):
        row, column = g + 8 * (r & 1), 2 * t + 8 * (r >> 1)
        inputs[name] = (
            np.stack([a[:, row, column], a[:, row, column + 1]], -1).astype(dtype).view(np.uint32).reshape(-1)
        )
    for r, name in enumerate(b_names):
        inputs[name] = (
            np.stack([b[:, 2 * t + 8 * r, g], b[:, 2 * t + 8 * r + 1, g]], -1).astype(dtype).view(np.uint32).reshape(-1)
        )
    for i, name in enumerate("ijkl"):
        inputs[name] = c[:, g + 8 * (i >> 1), 2 * t + (i & 1)].reshape(-1)
    brace = {key: "{" + ",".join("%" + name for name in names) + "}" for key, names in (("a", a_names), ("b", b_names))}
    shape = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32"
    body = f"{shape} {{%m, %n, %o, %q}}, {brace['a']}, {brace['b']}, {{%i, %j, %k, %l}};"
    *got, _ = lanewise(body, dict.fromkeys("mnoq", np.float32), **inputs)
    wanted = a @ b + c
    for i, values in enumerate(got):
        np.testing.assert_array_equal(values.reshape(2, 32), wanted[:, g + 8 * (i >> 1), 2 * t + (i & 1)])
