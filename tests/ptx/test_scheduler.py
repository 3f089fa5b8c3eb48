"""Divergence, block barriers, random schedules, and everything that never ends."""

import numpy as np
import pytest
from ptx_interpreter import PTXError

LANE = np.arange(64, dtype=np.uint32)


def test_divergent_loops_meet_again(lanewise):
    body = """and.b32 %x1, %a, 7; mov.u32 %d, 0; setp.eq.u32 %p1, %x1, 0; @%p1 bra OVER;
    AGAIN: add.u32 %d, %d, %x1; sub.u32 %x1, %x1, 1; setp.ne.u32 %p2, %x1, 0; @%p2 bra AGAIN;
    OVER: shfl.sync.bfly.b32 %e, %d, 1, 31, -1;"""
    for seed in (None, 0, 1, 2):
        d, e, launch = lanewise(body, {"d": np.uint32, "e": np.uint32}, a=LANE, options={"seed": seed})
        count = LANE & 7
        np.testing.assert_array_equal(d, count * (count + 1) // 2)
        np.testing.assert_array_equal(e, d[LANE ^ 1])
    assert launch.lane_instr < 32 * launch.warp_instr


def test_early_exit_is_not_waited_for(lanewise):
    """Whole warps, and parts of one, leave before a barrier and before a shuffle."""
    body = "mov.u32 %d, 0; setp.ge.u32 %p1, %thread, LEFT; @%p1 ret; bar.sync 0; shfl.sync.idx.b32 %d, %a, 3, 31, -1;"
    for left in (32, 40):
        d, _ = lanewise(body.replace("LEFT", str(left)), {"d": np.uint32}, a=LANE)
        np.testing.assert_array_equal(d[:left], np.where(np.arange(left) < 32, 3, 35))
        assert (d[left:] == 0xFFFFFFFF).all()


NAMED = """setp.lt.u32 %p1, %thread, 32; mov.u32 %x1, smem; mad.lo.u32 %x1, %thread, 4, %x1; @%p1 bra FIRST;
st.shared.u32 [%x1], %a; bar.arrive 3, COUNT; mov.u32 %d, 0; bra OVER;
FIRST: bar.sync 3, COUNT; ld.shared.u32 %d, [%x1+128]; OVER:"""


def test_named_barriers_arrive_and_sync(lanewise):
    for seed in (None, 0, 1):
        d, _ = lanewise(NAMED.replace("COUNT", "64"), {"d": np.uint32}, a=LANE, shared=256, options={"seed": seed})
        np.testing.assert_array_equal(d, np.where(LANE < 32, LANE + 32, 0))
    with pytest.raises(PTXError, match=r"DEADLOCK: barrier 3 of block slot 0 has 64/96 threads"):
        lanewise(NAMED.replace("COUNT", "96"), {"d": np.uint32}, a=LANE, shared=256)
    with pytest.raises(PTXError, match="barrier thread count wrong or inconsistent"):
        lanewise(NAMED.replace("COUNT", "50"), {"d": np.uint32}, a=LANE, shared=256)
    with pytest.raises(PTXError, match="barrier thread count wrong or inconsistent"):
        lanewise(NAMED.replace("COUNT", "64", 1).replace("COUNT", "96"), {"d": np.uint32}, a=LANE, shared=256)
    with pytest.raises(PTXError, match=r"race-read-after-write|uninitialised-read"):
        lanewise(NAMED.replace("COUNT", "32"), {"d": np.uint32}, a=LANE, shared=256)


def test_a_barrier_that_one_warp_never_reaches(lanewise):
    body = """setp.lt.u32 %p1, %thread, 32; mov.u32 %d, 0; @%p1 bra FIRST; bar.sync 1; bra OVER;
    FIRST: bar.sync 2; OVER:"""
    with pytest.raises(PTXError, match=r"DEADLOCK: barrier 1 .* has 32/64 threads; barrier 2 .* has 32/64 threads"):
        lanewise(body, {"d": np.uint32}, a=LANE)


def test_warp_synchronous_code_in_a_divergent_branch(lanewise):
    body = """mov.u32 %d, 0; mov.u32 %x1, smem; mad.lo.u32 %x1, %thread, 16, %x1; st.shared.u32 [%x1], %a;
    setp.lt.u32 %p1, %thread, 16; @%p1 bra OTHER; bar.sync 0; bra OVER;
    OTHER: ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%d}, [%x1]; OVER:"""
    with pytest.raises(PTXError, match="reached by only part of a warp"):
        lanewise(body, {"d": np.uint32}, a=LANE[:32], shared=512)


def test_an_endless_loop_runs_out_of_steps(lanewise):
    with pytest.raises(PTXError, match="endless loop"):
        lanewise("AGAIN: bra AGAIN; mov.u32 %d, 0;", {"d": np.uint32}, a=LANE, options={"max_steps": 1000})


def test_a_lock_between_lanes_makes_progress(lanewise):
    """The spinning lanes get no more than their turn: the holder, further on, is let run."""
    body = """ld.param.u64 %y1, [p_b]; mov.u32 %d, 0;
    AGAIN: atom.global.cas.b32 %x1, [%y1], 0, 1; setp.ne.u32 %p1, %x1, 0; @%p1 bra AGAIN;
    ld.volatile.global.u32 %d, [%y1+4]; add.u32 %x2, %d, 1; st.volatile.global.u32 [%y1+4], %x2;
    atom.global.exch.b32 %x1, [%y1], 0;"""
    d, _ = lanewise(body, {"d": np.uint32}, a=LANE[:3], b=np.zeros(3, np.uint32), threads=3)
    np.testing.assert_array_equal(np.sort(d), LANE[:3])


@pytest.mark.parametrize("lanes", [64, 256, 1024])
def test_blocks_side_by_side_or_one_by_one(lanewise, lanes):
    body = """mov.u32 %x1, smem; mad.lo.u32 %x1, %thread, 4, %x1; st.shared.u32 [%x1], %a; bar.sync 0;
    xor.b32 %x1, %x1, 128; ld.shared.u32 %d, [%x1];"""
    a = np.arange(64 * 5, dtype=np.uint32)
    for seed in (None, 3):
        options = {"lanes": lanes, "seed": seed}
        d, _ = lanewise(body, {"d": np.uint32}, a=a, blocks=5, shared=256, options=options)
        np.testing.assert_array_equal(d, a ^ 32)
    d, _ = lanewise(body, {"d": np.uint32}, a=a, blocks=5, shared=256, options={"blocks": [(3, 0, 0)]})
    np.testing.assert_array_equal(d[192:256], a[192:256] ^ 32)
    assert (d[:192] == 0xFFFFFFFF).all()


def test_a_trap_stops_the_run(lanewise):
    body = "mov.u32 %d, 0; setp.eq.u32 %p1, %thread, 7; @%p1 trap;"
    with pytest.raises(PTXError, match="trap executed"):
        lanewise(body, {"d": np.uint32}, a=LANE)
