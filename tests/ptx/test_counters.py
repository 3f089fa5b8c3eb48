"""Bank conflicts and sectors against numbers worked out by hand."""

import numpy as np
import pytest

LANE = np.arange(32, dtype=np.uint32)


def shared_requests(launch, opcode):
    """[requests, wavefronts, ideal] summed over the instructions that start with `opcode`."""
    rows = [
        numbers
        for pc, numbers in launch.counters.shared.items()
        if launch.kernel.instructions[pc].opcode.startswith(opcode)
    ]
    return np.sum(rows, 0).tolist()


# stride in bytes between lanes, element -> wavefronts of one warp's request, ideal
STRIDES = [
    (4, "u32", "%d", 1, 1),  # 32 banks once
    (8, "u32", "%d", 2, 1),  # 16 banks twice
    (16, "u32", "%d", 4, 1),
    (128, "u32", "%d", 32, 1),  # one bank
    (132, "u32", "%d", 1, 1),  # padded by one word
    (0, "u32", "%d", 1, 1),  # one word for all
    (8, "v2.u32", "{%d, _}", 2, 2),  # 256 bytes: two passes
    (16, "v4.u32", "{%d, _, _, _}", 4, 4),  # 512 bytes: four passes of 8 lanes
    (32, "v4.u32", "{%d, _, _, _}", 8, 4),  # 8 lanes in 4 bank quads
    (80, "v4.u32", "{%d, _, _, _}", 4, 4),  # 5 quads apart: all 8 differ
    (128, "v4.u32", "{%d, _, _, _}", 32, 4),
    (1, "u8", "%h", 1, 1),  # four lanes share a word
]


@pytest.mark.parametrize(("stride", "kind", "target", "wavefronts", "ideal"), STRIDES)
def test_bank_conflicts(lanewise, stride, kind, target, wavefronts, ideal):
    body = f""".reg .b16 %h; mov.u32 %d, 0; mov.u32 %x1, smem; mad.lo.u32 %x1, %thread, {stride}, %x1;
    ld.shared.{kind} {target}, [%x1];"""
    options = {"smem_init": np.zeros(8192, np.uint8)}
    _, launch = lanewise(body, {"d": np.uint32}, a=LANE, shared=8192, options=options)
    assert shared_requests(launch, "ld.shared") == [1, wavefronts, ideal]
    assert launch.conflicts() == wavefronts - ideal
    assert bool(launch.worst()) == (wavefronts > ideal)


@pytest.mark.parametrize(("stride", "wavefronts"), [(16, 4), (64, 16), (80, 4), (128, 32), (144, 4)])
def test_ldmatrix_conflicts(lanewise, stride, wavefronts):
    """Four matrices, 8 rows each: a row stride of 64 bytes leaves 2 of 8 bank quads, 128 bytes leave one."""
    body = f"""mov.u32 %x1, smem; mad.lo.u32 %x1, %thread, {stride}, %x1;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%d, %x2, %x3, %x4}}, [%x1];"""
    options = {"smem_init": np.zeros(8192, np.uint8)}
    _, launch = lanewise(body, {"d": np.uint32}, a=LANE, shared=8192, options=options)
    assert shared_requests(launch, "ldmatrix") == [1, wavefronts, 4]


# lane * stride + offset, element -> sectors of one warp's request, ideal
SECTORS = [
    (4, 0, "u32", 4, 4),
    (4, 16, "u32", 5, 4),  # shifted by half a sector
    (32, 0, "u32", 32, 4),
    (128, 0, "u32", 32, 4),
    (0, 0, "u32", 1, 1),
    (16, 0, "v4.u32", 16, 16),
    (64, 0, "v4.u32", 32, 16),
    (1, 0, "u8", 1, 1),
]


@pytest.mark.parametrize(("stride", "offset", "kind", "sectors", "ideal"), SECTORS)
def test_sectors(lanewise, stride, offset, kind, sectors, ideal):
    target = {"u32": "%d", "u8": "%h", "v4.u32": "{%d, _, _, _}"}[kind]
    body = f""".reg .b16 %h; mov.u32 %d, 0; ld.param.u64 %y1, [p_b]; mul.wide.u32 %y2, %thread, {stride};
    add.s64 %y1, %y1, %y2; ld.global.nc.{kind} {target}, [%y1+{offset}];"""
    _, launch = lanewise(body, {"d": np.uint32}, threads=32, a=LANE, b=np.zeros(4096, np.uint32))
    pc = next(pc for pc in launch.counters.global_ if ".nc." in launch.kernel.instructions[pc].opcode)
    width = {"u32": 4, "u8": 1, "v4.u32": 16}[kind]
    assert launch.counters.global_[pc] == [1, sectors, ideal, 32 * width]


def test_traffic_and_classes(lanewise):
    body = "mul.lo.u32 %d, %a, 3; cvt.rn.f32.u32 %x1, %d; mul.f32 %x1, %x1, 0f40000000; mov.u32 %x2, smem;"
    a = np.arange(128, dtype=np.uint32)
    _, launch = lanewise(body, {"d": np.uint32}, a=a, blocks=2, shared=16)
    traffic = launch.traffic()
    assert traffic["read"] >= 512
    assert traffic["written"] == 512
    assert traffic["sectors"] == traffic["ideal_sectors"]
    classes = launch.classes()
    assert classes["cvt"] == classes["fp"] == classes["st.global"] == 4  # 4 warps
    assert sum(classes.values()) == launch.warp_instr
    assert launch.lane_instr == 32 * launch.warp_instr
