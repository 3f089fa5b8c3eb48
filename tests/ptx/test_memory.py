"""Tables, address spaces, atomics, and every access that must be reported."""

import numpy as np
import pytest
from ptx_interpreter import DeviceMemory, Launch, PTXError

RNG = np.random.default_rng(2)
LEVELS = np.array([*np.arange(-1, 2.75, 0.25)[:15], 1e-30], np.float32)


def test_constant_and_global_tables(build):
    module, memory = build("tables.cu"), DeviceMemory(1 << 20)
    index = RNG.integers(0, 256, 64, dtype=np.uint8)
    levels, others, count = memory.alloc(256), memory.alloc(256), memory.alloc(4)
    arguments = [memory.upload(index), levels, others, count]
    for call in (1, 2):  # the counter lives as long as the memory
        launch = Launch(module, "tables", 1, 64, arguments, mem=memory, fatal="all")
        assert memory.download(count, 1, np.uint32)[0] == call
    np.testing.assert_array_equal(memory.download(levels, 64, np.float32), LEVELS[index & 15] + LEVELS[3])
    words = np.array([0xDEADBEEF, 7, 0, 0xFFFFFFFF], np.uint32)
    table = np.array([0, 1, 127, 128, 200, 255, 3, 9], np.uint32)
    np.testing.assert_array_equal(memory.download(others, 64, np.uint32), words[index & 3] ^ table[index & 7])
    assert launch.classes()["ld.const"] > 0
    other = DeviceMemory(1 << 20)
    other_count = other.alloc(4)
    arguments = [other.upload(index), other.alloc(256), other.alloc(256), other_count]
    Launch(module, "tables", 1, 64, arguments, mem=other)
    assert other.download(other_count, 1, np.uint32)[0] == 1


@pytest.mark.parametrize("which", [0, 1, 2])
def test_generic_addresses(build, which):
    memory = DeviceMemory(1 << 20)
    values = RNG.standard_normal(128).astype(np.float32)
    out = memory.alloc(512)
    Launch(build("spaces.cu"), "generic", 1, 128, [memory.upload(values), out, which], mem=memory, fatal="all")
    t = np.arange(128)
    chosen = [values, values[127 - t] + np.float32(1000), values * (t & 7).astype(np.float32)][which]
    np.testing.assert_array_equal(memory.download(out, 128, np.float32), np.where(t & 1, values, chosen))


def test_atomics(build):
    memory = DeviceMemory(1 << 20)
    ints, floats = memory.upload(np.zeros(7, np.int32)), memory.upload(np.zeros(1, np.float32))
    wide, halves = memory.upload(np.zeros(1, np.uint64)), memory.upload(np.zeros(2, np.float16))
    old = memory.alloc(4 * 96)
    arguments = [ints, floats, wide, halves, old]
    Launch(build("spaces.cu"), "atomics", 3, 32, arguments, mem=memory, blocks=[(0, 0, 0)], fatal="all")
    Launch(build("spaces.cu"), "atomics", 1, 96, arguments, mem=memory, fatal="all")
    got = memory.download(ints, 7, np.int32)
    assert got[:3].tolist() == [3 * 128, 95, -95]
    assert got[3] == 0
    assert got[4] in range(1, 33)
    assert got[5:].tolist() == [77, 128 % 10]
    assert sorted(memory.download(old, 96, np.int32)) == list(range(96, 96 + 3 * 96, 3))
    assert memory.download(floats, 1, np.float32)[0] == 64
    assert memory.download(wide, 1, np.uint64)[0] == 128 << 33
    assert memory.download(halves, 2, np.float16).tolist() == [128, 256]


def test_shared_atomics(build):
    memory = DeviceMemory(1 << 20)
    out = memory.alloc(32)
    Launch(build("spaces.cu"), "sharedAtomics", 1, 128, [out], mem=memory, fatal="all")
    assert memory.download(out, 8, np.int32).tolist() == [sum(range(bin_, 128, 8)) for bin_ in range(8)]


GLOBAL = "ld.param.u64 %y1, [p_a]; mul.wide.u32 %y2, %thread, 4; add.s64 %y1, %y1, %y2;"
A = np.arange(32, dtype=np.uint32)


def test_global_bounds_and_alignment(lanewise):
    with pytest.raises(
        PTXError, match=r"global read out of bounds: tid 31 .* 4 bytes(.|\n)*ld.global.u32 %d, \[%y1\+4\]"
    ):
        lanewise(GLOBAL + "ld.global.u32 %d, [%y1+4];", {"d": np.uint32}, a=A)
    with pytest.raises(PTXError, match="global write out of bounds: tid 0 "):
        lanewise(GLOBAL + "st.global.u32 [%y1+-4], %a; mov.u32 %d, 0;", {"d": np.uint32}, a=A)
    with pytest.raises(PTXError, match=r"misaligned global access \(4 bytes\)"):
        lanewise(GLOBAL + "ld.global.u32 %d, [%y1+2];", {"d": np.uint32}, a=np.arange(40, dtype=np.uint32), threads=32)
    with pytest.raises(PTXError, match=r"misaligned global access \(16 bytes\)"):
        lanewise(GLOBAL + "ld.global.v4.u32 {%d,_,_,_}, [%y1];", {"d": np.uint32}, a=A, threads=16)
    wide = GLOBAL.replace("%thread, 4", "%thread, 16") + "ld.global.v4.u32 {%d,_,_,_}, [%y1];"
    with pytest.raises(PTXError, match=r"global read out of bounds: tid 7 .* 16 bytes"):  # it starts inside
        lanewise(wide, {"d": np.uint32}, a=A[:30], threads=8)
    with pytest.raises(PTXError, match="out of bounds"):  # an address nobody computed
        lanewise("ld.global.u32 %d, [%y5];", {"d": np.uint32}, a=A)


SHARED = "mov.u32 %x1, smem; mul.lo.u32 %x2, %thread, 4; add.u32 %x1, %x1, %x2;"


def test_shared_bounds_and_alignment(lanewise):
    store = SHARED + "st.shared.u32 [%x1], %a; bar.sync 0;"
    with pytest.raises(PTXError, match="shared read out of bounds: tid 31, offset 128, 4 bytes, allocated 128"):
        lanewise(store + "ld.shared.u32 %d, [%x1+4];", {"d": np.uint32}, a=A, shared=128)
    with pytest.raises(PTXError, match="shared write out of bounds: tid 0, offset -4"):
        lanewise(SHARED + "st.shared.u32 [%x1+-4], %a; mov.u32 %d, 0;", {"d": np.uint32}, a=A, shared=128)
    with pytest.raises(PTXError, match=r"misaligned shared access \(8 bytes\)"):
        lanewise(store + "ld.shared.v2.u32 {%d,_}, [%x1];", {"d": np.uint32}, a=A, shared=256)


def test_vectors_and_narrow_types(lanewise):
    body = """mov.u32 %x1, smem; mul.lo.u32 %x2, %thread, 16; add.u32 %x1, %x1, %x2; add.u32 %x3, %a, 1;
    st.shared.v4.u32 [%x1], {%a, %x3, %a, %x3}; st.shared.u8 [%x1+9], %x3; ld.shared.v2.u32 {%d, %e}, [%x1];
    ld.shared.u32 %f, [%x1+8]; ld.shared.s8 %g, [%x1+9]; ld.shared.v2.u16 {%h, %i}, [%x1+4];"""
    outputs = {"d": np.uint32, "e": np.uint32, "f": np.uint32, "g": np.int32, "h": np.uint16, "i": np.uint16}
    a = RNG.integers(0, 1 << 32, 32, dtype=np.uint32)
    d, e, f, g, h, i, _ = lanewise(body, outputs, a=a, shared=512)
    one = a + np.uint32(1)
    np.testing.assert_array_equal(d, a)
    np.testing.assert_array_equal(e, one)
    np.testing.assert_array_equal(f, (a & ~np.uint32(0xFF00)) | ((one & np.uint32(0xFF)) << np.uint32(8)))
    np.testing.assert_array_equal(g, (one & np.uint32(0xFF)).astype(np.uint8).view(np.int8))
    np.testing.assert_array_equal(h, one & np.uint32(0xFFFF))
    np.testing.assert_array_equal(i, one >> np.uint32(16))


def test_uninitialised_shared_memory(lanewise):
    body = SHARED + "setp.lt.u32 %p1, %thread, 20; @%p1 st.shared.u32 [%x1], %a; ld.shared.u32 %d, [%x1];"
    with pytest.raises(PTXError, match=r"uninitialised-read .* tid 20 reads shared offset 80 never written"):
        lanewise(body, {"d": np.uint32}, a=A, shared=128)
    _, launch = lanewise(body, {"d": np.uint32}, a=A, shared=128, options={"fatal": ()})
    assert [kind for kind, _ in launch.reports] == ["uninitialised-read"]


def test_races_within_a_warp_and_between_warps(lanewise):
    other = SHARED + "st.shared.u32 [%x1], %a; {0} xor.b32 %x1, %x1, {1}; ld.shared.u32 %d, [%x1];"
    a = np.arange(64, dtype=np.uint32)
    for distance, missing, enough in ((4, "race-within-warp", "bar.warp.sync -1;"), (128, "race-read-", "bar.sync 0;")):
        with pytest.raises(PTXError, match=missing):
            lanewise(other.format("", distance), {"d": np.uint32}, a=a, shared=256)
        d, _ = lanewise(other.format(enough, distance), {"d": np.uint32}, a=a, shared=256)
        np.testing.assert_array_equal(d, a ^ (distance // 4))
    # A shuffle makes the lanes meet, but orders no memory.
    shuffled = other.format("shfl.sync.idx.b32 %x5, %a, 0, 31, -1;", 4)
    with pytest.raises(PTXError, match="race-within-warp"):
        lanewise(shuffled, {"d": np.uint32}, a=a, shared=256)


def test_write_after_write_between_warps(lanewise):
    """One after the other, and side by side in one instruction."""
    a = np.arange(64, dtype=np.uint32)
    body = "mov.u32 %x1, smem; and.b32 %x2, %thread, 31; mad.lo.u32 %x1, %x2, 4, %x1; mov.u32 %d, 0;"
    with pytest.raises(PTXError, match=r"race-write-after-write"):
        lanewise(body + "st.shared.u32 [%x1], %a;", {"d": np.uint32}, a=a, shared=256)
    after = "setp.lt.u32 %p1, %thread, 32; @%p1 st.shared.u32 [%x1], %a; {0} @!%p1 st.shared.u32 [%x1], %a;"
    with pytest.raises(PTXError, match=r"race-write-after-write .* last written by warp 0 lane 0"):
        lanewise(body + after.format(""), {"d": np.uint32}, a=a, shared=256)
    lanewise(body + after.format("bar.sync 0;"), {"d": np.uint32}, a=a, shared=256)


def test_blocks_must_not_meet_in_global_memory(lanewise):
    everywhere = "ld.param.u64 %y1, [p_a]; mul.wide.u32 %y2, %thread, 4; add.s64 %y1, %y1, %y2;"
    a = np.arange(64, dtype=np.uint32)
    written = everywhere + "st.global.u32 [%y1], %thread; mov.u32 %d, 0;"
    for lanes in (32, 64):  # one block after the other, and side by side
        options = {"options": {"fatal": "all", "lanes": lanes}}
        with pytest.raises(PTXError, match=r"race-between-blocks.*block 1 writes what block 0"):
            lanewise(written, {"d": np.uint32}, a=a, blocks=2, **options)
        ahead = everywhere + "setp.eq.u32 %p1, %ctaid.x, 0; @%p1 st.global.u32 [%y1+128], %thread; mov.u32 %d, 0;"
        with pytest.raises(PTXError, match=r"race-between-blocks"):  # block 1 reads there
            lanewise(ahead, {"d": np.uint32}, a=a, blocks=2, **options)
        shared_read = everywhere + "ld.global.u32 %d, [%y1];"
        d, _ = lanewise(shared_read, {"d": np.uint32}, a=a, blocks=2, **options)
        np.testing.assert_array_equal(d, np.tile(a[:32], 2))
        reduced = "ld.param.u64 %y1, [p_a]; red.global.add.u32 [%y1+4], 1; mov.u32 %d, 0;"
        lanewise(everywhere + "mov.u32 %d, 0;", {"d": np.uint32}, a=a, blocks=2, **options)
        lanewise(reduced, {"d": np.uint32}, a=a, blocks=2, **options)


def test_two_blocks_side_by_side_in_one_store(lanewise):
    body = """ld.param.u64 %y1, [p_d]; mul.wide.u32 %y2, %thread, 4; add.s64 %y1, %y1, %y2; mov.u32 %d, 0;
    st.global.u32 [%y1], %d;"""
    _, launch = lanewise(body, {"d": np.uint32}, threads=32, blocks=2, options={"fatal": ()})
    assert any("two blocks write one place in one instruction" in line for line in launch.reports.values())


def test_device_memory_is_guarded():
    memory = DeviceMemory(1 << 16)
    values = np.arange(10, dtype=np.int16)
    address = memory.upload(values)
    assert address % 256 == 0
    np.testing.assert_array_equal(memory.download(address, (2, 5), np.int16), values.reshape(2, 5))
    assert np.isnan(memory.download(memory.alloc(8), 2, np.float32)).all()
    with pytest.raises(MemoryError):
        memory.alloc(1 << 16)
