"""Instructions of handwritten PTX against numpy, lane by lane."""

import ml_dtypes
import numpy as np
import pytest
from ptx_interpreter import DeviceMemory, Launch, Module, PTXError

RNG = np.random.default_rng(1)
BF16 = np.dtype(ml_dtypes.bfloat16)
N = 64


def words(dtype, small=False):
    info = np.iinfo(dtype)
    low, high = (-1000, 1000) if small and info.min else (0, 1000) if small else (info.min, info.max)
    return RNG.integers(low, high, N, dtype=dtype, endpoint=True)


def floats(dtype=np.float32):
    return (RNG.standard_normal(N) * 8).astype(dtype)


def unsigned(values, dtype):
    """Python integers, wrapped into an unsigned type."""
    bits = np.dtype(dtype).itemsize * 8
    return np.array([int(value) & ((1 << bits) - 1) for value in values], dtype)


def objects(array):
    return array.astype(object)


INTEGER = {
    "add.u32": (np.uint32, lambda a, b: a + b),
    "sub.s32": (np.int32, lambda a, b: a - b),
    "add.s64": (np.int64, lambda a, b: a + b),
    "mul.lo.s32": (np.int32, lambda a, b: a * b),
    "mul.lo.s64": (np.int64, lambda a, b: a * b),
    "mul.hi.u32": (np.uint32, lambda a, b: a * b >> 32),
    "mul.hi.s64": (np.int64, lambda a, b: a * b >> 64),
    "and.b64": (np.uint64, lambda a, b: a & b),
    "or.b32": (np.uint32, lambda a, b: a | b),
    "xor.b32": (np.uint32, lambda a, b: a ^ b),
    "min.s32": (np.int32, min),
    "max.u64": (np.uint64, max),
    "div.u32": (np.uint32, lambda a, b: a // b),
    "rem.u64": (np.uint64, lambda a, b: a % b),
    "div.s64": (np.int64, lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)),
    "rem.s32": (np.int32, lambda a, b: abs(a) % abs(b) * (1 if a > 0 else -1)),
}


@pytest.mark.parametrize("opcode", INTEGER)
def test_integer_instructions(lanewise, opcode):
    dtype, function = INTEGER[opcode]
    a, b = words(dtype), words(dtype)
    b = np.where(b == 0, dtype(7), b) if opcode[:3] in ("div", "rem") else b
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    got, _ = lanewise(f"{opcode} %d, %a, %b;", {"d": bits}, a=a, b=b)
    wanted = [function(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    np.testing.assert_array_equal(got, unsigned(wanted, bits))


def test_wide_products_and_multiply_add(lanewise):
    a, b, c = words(np.int32), words(np.int32), words(np.int64)
    body = "mul.wide.s32 %d, %a, %b; mad.wide.s32 %e, %a, %b, %c; mad.lo.s64 %f, %c, %c, %d; mul.wide.u32 %g, %a, %b;"
    outputs = dict.fromkeys("defg", np.uint64)
    d, e, f, g, _ = lanewise(body, outputs, a=a, b=b, c=c)
    product = objects(a) * objects(b)
    np.testing.assert_array_equal(d, unsigned(product, np.uint64))
    np.testing.assert_array_equal(e, unsigned(product + objects(c), np.uint64))
    np.testing.assert_array_equal(f, unsigned(objects(c) * objects(c) + product, np.uint64))
    np.testing.assert_array_equal(g, unsigned(objects(a.view(np.uint32)) * objects(b.view(np.uint32)), np.uint64))


def test_shifts_by_register_and_literal(lanewise):
    a, c = words(np.int64), words(np.uint32)
    n = np.arange(N, dtype=np.uint32)
    body = (
        "shr.s64 %d, %a, 3; shl.b64 %e, %a, %n; shr.u32 %f, %c, %n; shr.s32 %g, %c, 31; shf.l.wrap.b32 %h, %c, %f, %n;"
    )
    d, e, f, g, h, _ = lanewise(
        body, {"d": np.int64, "e": np.uint64, "f": np.uint32, "g": np.int32, "h": np.uint32}, a=a, c=c, n=n
    )
    np.testing.assert_array_equal(d, a >> 3)
    np.testing.assert_array_equal(e, unsigned(objects(a) << objects(n), np.uint64))
    np.testing.assert_array_equal(f, unsigned(objects(c) >> objects(n), np.uint32))
    np.testing.assert_array_equal(g, c.view(np.int32) >> 31)
    joined = objects(f) * 2**32 + objects(c)
    np.testing.assert_array_equal(h, unsigned((joined << (objects(n) & 31)) >> 32, np.uint32))


def test_lookup_and_byte_permutation(lanewise):
    a, b, c = (words(np.uint32) for _ in range(3))
    body = """prmt.b32 %d, %a, %b, 0x5410U; lop3.b32 %e, %a, %b, %c, 0xD8; lop3.b32 %f, %a, %b, 15, 0x6a;
    bfe.u32 %g, %a, 4, 8; bfe.s32 %h, %a, 4, 8; bfi.b32 %i, %a, %b, 8, 4; popc.b32 %j, %a; not.b32 %k, %a;"""
    outputs = dict.fromkeys("defghijk", np.uint32)
    d, e, f, g, h, i, j, k, _ = lanewise(body, outputs, a=a, b=b, c=c)
    np.testing.assert_array_equal(d, (a & 0xFFFF) | (b << np.uint32(16)))
    np.testing.assert_array_equal(e, (c & b) | (~c & a))
    np.testing.assert_array_equal(f, (a & b) ^ np.uint32(15))
    np.testing.assert_array_equal(g, (a >> np.uint32(4)) & 0xFF)
    np.testing.assert_array_equal(h.view(np.int32), ((a >> np.uint32(4)).astype(np.uint8)).view(np.int8))
    np.testing.assert_array_equal(i, (b & ~np.uint32(0xF00)) | ((a & np.uint32(0xF)) << np.uint32(8)))
    np.testing.assert_array_equal(j, np.bitwise_count(a))
    np.testing.assert_array_equal(k, ~a)


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_packed_half_arithmetic(lanewise, kind):
    dtype = np.float16 if kind == "f16x2" else BF16
    a, b, c = ((RNG.standard_normal(2 * N) * 4).astype(dtype) for _ in range(3))
    round_mode = "" if kind == "f16x2" else ".rn"
    body = f"""mul{round_mode}.{kind} %d, %a, %b; mul.rn.{kind} %e, %a, %b; fma.rn.{kind} %f, %a, %b, %c;
    add.rn.{kind} %g, %a, %b; neg.{kind} %h, %a; fma.rn.relu.{kind} %i, %a, %b, %c; max.{kind} %j, %a, %b;
    sub.rn.{kind} %k, %a, %b; abs.{kind} %l, %a;"""
    outputs = dict.fromkeys("defghijkl", np.uint32)
    packed = {name: array.view(np.uint32) for name, array in zip("abc", (a, b, c), strict=True)}
    *got, _ = lanewise(body, outputs, **packed)
    d, e, f, g, h, i, j, k, length = (array.view(dtype).astype(np.float64) for array in got)
    a, b, c = (array.astype(np.float64) for array in (a, b, c))

    def rounded(values):  # products and sums of 11-bit numbers of like size are exact in float64
        return values.astype(dtype).astype(np.float64)

    np.testing.assert_array_equal(d, rounded(a * b))
    np.testing.assert_array_equal(e, d)
    np.testing.assert_array_equal(f, rounded(a * b + c))
    np.testing.assert_array_equal(g, rounded(a + b))
    np.testing.assert_array_equal(h, -a)
    np.testing.assert_array_equal(i, np.maximum(rounded(a * b + c), 0))
    np.testing.assert_array_equal(j, np.maximum(a, b))
    np.testing.assert_array_equal(k, rounded(a - b))
    np.testing.assert_array_equal(length, np.abs(a))


def test_float_arithmetic(lanewise):
    a, b, c = floats(), floats(), floats()
    body = """mul.f32 %d, %a, %b; add.f32 %e, %a, %b; fma.rn.f32 %f, %a, %b, %c; div.rn.f32 %g, %a, %b;
    min.f32 %h, %a, %b; sqrt.rn.f32 %i, %a; neg.f32 %j, %a; abs.f32 %k, %a; add.sat.f32 %l, %a, %b;
    mul.f32 %m, %a, 0f3E000000; rcp.rn.f32 %o, %a; rsqrt.approx.f32 %q, %k; ex2.approx.f32 %r, %a;"""
    *got, _ = lanewise(body, dict.fromkeys("defghijklmoqr", np.float32), a=a, b=b, c=c)
    exact = (a.astype(np.longdouble) * b + c).astype(np.float32)
    with np.errstate(invalid="ignore"):
        wanted = [a * b, a + b, exact, a / b, np.minimum(a, b), np.sqrt(a), -a, np.abs(a), np.clip(a + b, 0, 1)]
        wanted += [a * np.float32(0.125), 1 / a, 1 / np.sqrt(np.abs(a)), np.exp2(a)]
    for result, expected in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(result, expected.astype(np.float32))


def test_conversions(lanewise):
    a = floats() * np.float32(100)
    body = """cvt.rn.bf16x2.f32 %d, %a, %b; cvt.rn.f16x2.f32 %e, %a, %b; cvt.rn.bf16.f32 %f, %a;
    cvt.rn.f16.f32 %g, %a; cvt.f32.f16 %h, %g; cvt.f32.bf16 %i, %f; cvt.rzi.s32.f32 %j, %a; cvt.rn.f32.s32 %k, %j;
    cvt.rni.s32.f32 %l, %a; cvt.s64.s32 %m, %j; cvt.u64.u32 %o, %j; cvt.u32.u16 %q, %f; cvt.sat.u8.s32 %r, %j;
    cvt.f64.f32 %s, %a; cvt.rn.f32.f64 %t, %s; cvt.s32.s8 %u, %r; cvt.rn.f16.s32 %v, %j; cvt.rmi.f32.f32 %w, %a;"""
    outputs = {"d": np.uint32, "e": np.uint32, "f": np.uint16, "g": np.uint16, "h": np.float32, "i": np.float32}
    outputs |= {"j": np.int32, "k": np.float32, "l": np.int32, "m": np.int64, "o": np.uint64, "q": np.uint32}
    outputs |= {"r": np.uint16, "s": np.float64, "t": np.float32, "u": np.int32, "v": np.uint16, "w": np.float32}
    b = floats()
    *got, _ = lanewise(body, outputs, a=a, b=b)
    d, e, f, g, h, i, j, k, rounded, m, o, q, r, s, t, u, v, w = got
    bf16, f16 = a.astype(BF16), a.astype(np.float16)

    def pack(high, low):
        return high.view(np.uint16).astype(np.uint32) << np.uint32(16) | low.view(np.uint16)

    np.testing.assert_array_equal(d, pack(bf16, b.astype(BF16)))
    np.testing.assert_array_equal(e, pack(f16, b.astype(np.float16)))
    np.testing.assert_array_equal(f, bf16.view(np.uint16))
    np.testing.assert_array_equal(g, f16.view(np.uint16))
    np.testing.assert_array_equal(h, f16.astype(np.float32))
    np.testing.assert_array_equal(i, bf16.astype(np.float32))
    whole = np.trunc(a).astype(np.int32)
    np.testing.assert_array_equal(j, whole)
    np.testing.assert_array_equal(k, whole.astype(np.float32))
    np.testing.assert_array_equal(rounded, np.rint(a).astype(np.int32))
    np.testing.assert_array_equal(m, whole.astype(np.int64))
    np.testing.assert_array_equal(o, whole.view(np.uint32).astype(np.uint64))
    np.testing.assert_array_equal(q, bf16.view(np.uint16))
    np.testing.assert_array_equal(r, np.clip(whole, 0, 255))
    np.testing.assert_array_equal(s, a.astype(np.float64))
    np.testing.assert_array_equal(t, a)
    np.testing.assert_array_equal(u, np.clip(whole, 0, 255).astype(np.uint8).view(np.int8))
    np.testing.assert_array_equal(v, whole.astype(np.float16).view(np.uint16))
    np.testing.assert_array_equal(w, np.floor(a))


def test_moves_pack_and_unpack(lanewise):
    a, b = words(np.uint32), words(np.uint32)
    body = """.reg .b16 %lo, %hi; mov.b32 {%lo, %hi}, %a; mov.b32 %d, {%hi, %lo}; mov.b64 %e, {%a, %b};
    mov.b64 {%f, _}, %e; mov.u32 %g, %laneid; mov.b32 %h, 0f3F800000;"""
    outputs = {"d": np.uint32, "e": np.uint64, "f": np.uint32, "g": np.uint32, "h": np.float32}
    d, e, f, g, h, _ = lanewise(body, outputs, a=a, b=b)
    np.testing.assert_array_equal(d, a >> np.uint32(16) | a << np.uint32(16))
    np.testing.assert_array_equal(e, b.astype(np.uint64) << np.uint64(32) | a)
    np.testing.assert_array_equal(f, a)
    np.testing.assert_array_equal(g, np.arange(N) % 32)
    np.testing.assert_array_equal(h, 1)


def test_comparisons_and_predicates(lanewise):
    a, b = floats(), floats()
    a[:3], b[2:5] = np.nan, np.nan
    a[6], b[6] = 0.0, -0.0
    body = """setp.lt.f32 %p1, %a, %b; selp.u32 %d, 1, 0, %p1; setp.ltu.f32 %p1, %a, %b; selp.u32 %e, 1, 0, %p1;
    setp.ne.f32 %p1|%p2, %a, %b; selp.u32 %f, 1, 0, %p1; selp.u32 %g, 1, 0, %p2; setp.nan.f32 %p3, %a, %b;
    setp.gt.and.f32 %p4, %a, %b, !%p3; selp.u32 %h, 1, 0, %p4; mov.u32 %i, 5; @%p3 mov.u32 %i, 9;
    @!%p3 add.u32 %i, %i, 2; xor.pred %p5, %p3, %p4; selp.u32 %j, 1, 0, %p5;"""
    *got, _ = lanewise(body, dict.fromkeys("defghij", np.uint32), a=a, b=b)
    nan = np.isnan(a) | np.isnan(b)
    wanted = [a < b, (a < b) | nan, (a != b) & ~nan, ~((a != b) & ~nan), a > b, np.where(nan, 9, 7), nan ^ (a > b)]
    for result, expected in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(result, expected)


def test_half_comparisons(lanewise):
    a, b = floats(BF16), floats(BF16)
    body = "setp.lt.bf16 %p1, %a, %b; selp.u32 %d, 1, 0, %p1;"
    d, _ = lanewise(body, {"d": np.uint32}, a=a.view(np.uint16), b=b.view(np.uint16))
    np.testing.assert_array_equal(d, a < b)


def test_special_registers(lanewise):
    body = """mov.u32 %d, %tid.x; mov.u32 %e, %ctaid.x; mov.u32 %f, %nctaid.x; mov.u32 %g, %lanemask_lt;
    mov.u32 %h, %ntid.x; mov.u32 %i, %warpid;"""
    d, e, f, g, h, i, _ = lanewise(body, dict.fromkeys("defghi", np.uint32), threads=96, blocks=3)
    thread = np.tile(np.arange(96), 3)
    np.testing.assert_array_equal(d, thread)
    np.testing.assert_array_equal(e, np.repeat(np.arange(3), 96))
    np.testing.assert_array_equal(f, 3)
    np.testing.assert_array_equal(g, (1 << thread % 32) - 1)
    np.testing.assert_array_equal(h, 96)
    np.testing.assert_array_equal(i, thread // 32)


UNSUPPORTED = [
    "add.rz.f32 %d, %a, %a;",
    "cvt.rz.f16.f32 %h, %a;",
    "add.cc.u32 %d, %a, %a;",
    "fma.rz.f32 %d, %a, %a, %a;",
    "call.uni function, (%a);",
    "tanh.approx.bf16x2 %d, %a;",
    "bar.red.popc.u32 %d, 0, %p1;",
    "@%p1 bar.sync 0;",
    "barrier.cluster.arrive.aligned;",
    "cp.async.cg.shared.global [%x1], [%y1], 8;",
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%x1], [%y1, {%x1, %x2}], [%x3];",
    "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%x1,%x2}, {%x1,%x2,%x3,%x4}, {%x1,%x2}, {%x1,%x2};",
    "frobnicate.b32 %d, %a;",
]


@pytest.mark.parametrize("statement", UNSUPPORTED)
def test_what_is_not_known_is_refused_by_name(lanewise, statement):
    with pytest.raises(PTXError, match="unsupported instruction") as error:
        lanewise(".reg .b16 %h;" + statement, {"d": np.uint32}, a=words(np.uint32))
    assert statement.rstrip(";") in str(error.value)


def test_cache_hints_are_accepted(lanewise):
    a = words(np.uint32)
    body = """createpolicy.fractional.L2::evict_first.b64 %y1, 1.0; ld.param.u64 %y2, [p_a];
    mul.wide.u32 %y3, %number, 4; add.s64 %y2, %y2, %y3; ld.global.nc.L1::no_allocate.L2::cache_hint.b32 %d, [%y2], %y1;
    prefetch.global.L2 [%y2];"""
    d, _ = lanewise(body, {"d": np.uint32}, a=a)
    np.testing.assert_array_equal(d, a)


def test_parser_keeps_scopes_apart():
    """Inline assembly repeats names: registers and labels belong to their braces."""
    text = """.version 9.0
    .target sm_80
    .visible .entry k(.param .u64 out) .maxntid 64, 1, 1 .minnctapersm 2 {
    .reg .b32 %r<4>; .reg .b64 %d; .reg .pred %p;
    mov.u32 %r1, 3; // a comment; with a semicolon
    { .reg .b32 t; mov.u32 t, 1; L: add.u32 %r1, %r1, t; setp.lt.u32 %p, %r1, 10; @%p bra L; }
    { .reg .b32 %r<4>; mov.u32 %r1, 77; }
    { .reg .b32 t; mov.u32 t, 100; L: add.u32 %r1, %r1, t; setp.lt.u32 %p, %r1, 300; @%p bra L; } /* done */
    ld.param.u64 %d, [out]; st.global.u32 [%d], %r1; ret; }"""
    module = Module(text)
    assert module.target == "sm_80"
    assert module.kernels["k"].maxntid == [64, 1, 1]
    memory = DeviceMemory(1 << 16)
    out = memory.alloc(4)
    Launch(module, "k", 1, 1, [out], mem=memory)
    assert memory.download(out, 1, np.uint32)[0] == 310
    with pytest.raises(PTXError, match="65 threads, more than"):
        Launch(module, "k", 1, 65, [out], mem=memory)
    with pytest.raises(PTXError, match="takes 1 arguments, got 2"):
        Launch(module, "k", 1, 1, [out, 1], mem=memory)
    with pytest.raises(PTXError, match="no kernel f"):
        Launch(module, "f", 1, 1, [out], mem=memory)


def test_shared_memory_limit_is_the_targets(lanewise):
    text = ".target sm_86\n.extern .shared .align 16 .b8 s[];\n.visible .entry k() { ret; }"
    Launch(Module(text), "k", 1, 32, [], smem=99 * 1024)
    with pytest.raises(PTXError, match="sm_86 has 101376 per block"):
        Launch(Module(text), "k", 1, 32, [], smem=99 * 1024 + 1)
    Launch(Module(text.replace("86", "90a")), "k", 1, 32, [], smem=227 * 1024)
