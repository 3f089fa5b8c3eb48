"""cp.async, bulk copies and mbarriers: what lands when, and what happens to those who do not wait."""

import numpy as np
import pytest
from ptx_interpreter import PTXError

RNG = np.random.default_rng(7)
A = RNG.integers(0, 1 << 32, 32 * 4, dtype=np.uint32)
PLACES = """mov.u32 %x1, smem; mad.lo.u32 %x1, %thread, 16, %x1; ld.param.u64 %y1, [p_a]; mul.wide.u32 %y2, %thread, 16;
add.s64 %y1, %y1, %y2;"""
LOAD = "ld.shared.v4.u32 {%d, %e, %f, %g}, [%x1];"
WAIT = "cp.async.commit_group; cp.async.wait_group 0;"
OUT = dict.fromkeys("defg", np.uint32)


def run(lanewise, body, a=A, **options):
    *columns, launch = lanewise(PLACES + body, OUT, threads=32, shared=1024, a=a, **options)
    return np.stack(columns, 1), launch


@pytest.mark.parametrize(
    "copies",
    [
        "cp.async.cg.shared.global [%x1], [%y1], 16;",
        "cp.async.ca.shared.global.L2::128B [%x1], [%y1], 16;",
        "cp.async.ca.shared.global [%x1], [%y1], 8; cp.async.ca.shared.global [%x1+8], [%y1+8], 8, 8;",
        "".join(f"cp.async.ca.shared.global [%x1+{i}], [%y1+{i}], 4;" for i in (0, 4, 8, 12)),
        "cp.async.cg.shared.global.L2::cache_hint [%x1], [%y1], 16, %y9;",
    ],
)
def test_copies_of_every_width(lanewise, copies):
    got, launch = run(lanewise, copies + WAIT + LOAD)
    np.testing.assert_array_equal(got, A.reshape(32, 4))
    assert launch.traffic()["read"] == 512 + 128  # the harness loads a word of each lane too
    assert launch.classes()["cp.async"] > 0


@pytest.mark.parametrize("size", [4, 16])
def test_the_rest_of_a_short_source_becomes_zero(lanewise, size):
    kind = "ca" if size == 4 else "cg"
    fill = "st.shared.v4.u32 [%x1], {%thread, %thread, %thread, %thread};"
    short = f"rem.u32 %x2, %thread, {size + 1}; cp.async.{kind}.shared.global [%x1], [%y1], {size}, %x2;"
    got, _ = run(lanewise, fill + short + WAIT + LOAD)
    wanted = np.repeat(np.arange(32, dtype=np.uint32), 4).reshape(32, 4).view(np.uint8)
    source = A.view(np.uint8).reshape(32, 16)
    for lane in range(32):
        kept = lane % (size + 1)
        wanted[lane, :size] = 0
        wanted[lane, :kept] = source[lane, :kept]
    np.testing.assert_array_equal(got, wanted.view(np.uint32))


def test_an_ignored_or_empty_source_is_not_read(lanewise):
    outside = "add.s64 %y1, %y1, 65536; setp.ne.u32 %p1, %thread, 99;"
    got, _ = run(lanewise, outside + "cp.async.cg.shared.global [%x1], [%y1], 16, %p1;" + WAIT + LOAD)
    np.testing.assert_array_equal(got, 0)
    got, _ = run(lanewise, outside + "cp.async.cg.shared.global [%x1], [%y1], 16, 0;" + WAIT + LOAD)
    np.testing.assert_array_equal(got, 0)


def test_a_short_source_is_checked_for_what_it_reads(lanewise):
    short = "sub.u32 %x2, 32, %thread; min.u32 %x2, %x2, 16; cp.async.cg.shared.global [%x1], [%y1], 16, %x2;"
    run(lanewise, short + WAIT + LOAD, a=A[:-3])  # the last lane reads one byte only
    with pytest.raises(PTXError, match=r"global read out of bounds: tid 31 .* 1 bytes"):
        run(lanewise, short + WAIT + LOAD, a=A[:-4])
    with pytest.raises(PTXError, match="src-size larger than cp-size"):
        run(lanewise, "mov.u32 %x2, 17; cp.async.cg.shared.global [%x1], [%y1], 16, %x2;" + WAIT + LOAD)
    with pytest.raises(PTXError, match=r"misaligned global access \(16 bytes\)"):
        run(lanewise, "cp.async.cg.shared.global [%x1], [%y1+4], 16, 4;" + WAIT + LOAD)


TWO_GROUPS = """cp.async.ca.shared.global [%x1], [%y1], 8; cp.async.commit_group;
cp.async.ca.shared.global [%x1+8], [%y1+8], 8; cp.async.commit_group;"""


def test_groups_land_in_order_and_not_before_their_wait(lanewise):
    older = "ld.shared.v2.u32 {%d, %e}, [%x1]; mov.u32 %f, 0; mov.u32 %g, 0;"
    got, _ = run(lanewise, TWO_GROUPS + "cp.async.wait_group 1;" + older)
    np.testing.assert_array_equal(got[:, :2], A.reshape(32, 4)[:, :2])
    options = {"options": {"fatal": ()}}
    fill = "st.shared.v4.u32 [%x1], {%thread, %thread, %thread, %thread};"
    got, launch = run(lanewise, fill + TWO_GROUPS + "cp.async.wait_group 1;" + LOAD, **options)
    assert [kind for kind, _ in launch.reports] == ["in-flight-read"]
    assert (got[:, 2:] == 0xFFFFFFFF).all()  # NaN until it has landed, whatever was there
    got, _ = run(lanewise, TWO_GROUPS.replace("cp.async.commit_group;", "") + "cp.async.wait_all;" + LOAD)
    np.testing.assert_array_equal(got, A.reshape(32, 4))
    uncommitted = "cp.async.cg.shared.global [%x1], [%y1], 16; cp.async.wait_group 0;" + LOAD
    with pytest.raises(PTXError, match="in-flight-read"):
        run(lanewise, uncommitted)


def test_other_threads_need_a_barrier_too(lanewise):
    copied = "cp.async.cg.shared.global [%x1], [%y1], 16;" + WAIT
    with pytest.raises(PTXError, match="race-within-warp"):
        run(lanewise, copied + "xor.b32 %x1, %x1, 16;" + LOAD)
    got, _ = run(lanewise, copied + "bar.sync 0; xor.b32 %x1, %x1, 16;" + LOAD)
    np.testing.assert_array_equal(got, A.reshape(32, 4)[np.arange(32) ^ 1])


def test_writing_where_a_copy_is_under_way(lanewise):
    twice = "cp.async.cg.shared.global [%x1], [%y1], 16; st.shared.u32 [%x1], %a;" + WAIT + LOAD
    with pytest.raises(PTXError, match="in-flight-write"):
        run(lanewise, twice)


INIT = """mov.u32 %x3, smem; add.u32 %x3, %x3, 512; setp.eq.u32 %p1, %thread, 0;
@%p1 mbarrier.init.shared.b64 [%x3], COUNT; bar.sync 0;"""


def waiting(parity):
    return f"""AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%x3], {parity}; @%p2 bra OVER; bra AGAIN; OVER:"""


def test_copies_that_arrive_on_an_mbarrier(lanewise):
    for increments, count in ((".noinc", 32), ("", 1)):
        arrive = f"cp.async.mbarrier.arrive{increments}.shared::cta.b64 [%x3];"
        # Without .noinc the arrival raises the pending count first, so thread 0's own arrival must come last.
        own = "" if increments else "bar.sync 0; @%p1 mbarrier.arrive.shared.b64 _, [%x3];"
        body = INIT.replace("COUNT", str(count)) + "cp.async.cg.shared.global [%x1], [%y1], 16;" + arrive + own
        got, _ = run(lanewise, body + waiting(0) + "xor.b32 %x1, %x1, 16;" + LOAD)
        np.testing.assert_array_equal(got, A.reshape(32, 4)[np.arange(32) ^ 1])


BULK = """@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%x3], EXPECT;
@%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%x1], [%y1], 512, [%x3];"""


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_bulk_copy_to_shared_memory(lanewise, seed):
    body = INIT.replace("COUNT", "1") + BULK.replace("EXPECT", "512") + waiting(0) + LOAD
    got, launch = run(lanewise, body, options={"seed": seed})
    np.testing.assert_array_equal(got, A.reshape(32, 4))
    pc = next(pc for pc in launch.counters.global_ if "bulk" in launch.kernel.instructions[pc].opcode)
    assert launch.counters.global_[pc] == [1, 16, 16, 512]  # requests, sectors, ideal, bytes
    assert launch.classes()["cp.async.bulk"] > 0


def test_bulk_copy_without_a_wait_and_with_wrong_counts(lanewise):
    copy = INIT.replace("COUNT", "1") + BULK
    with pytest.raises(PTXError, match="in-flight-read"):
        run(lanewise, copy.replace("EXPECT", "512") + LOAD)
    with pytest.raises(PTXError, match="DEADLOCK: 32 threads wait on mbarrier"):
        run(lanewise, copy.replace("EXPECT", "528") + waiting(0) + LOAD)
    with pytest.raises(PTXError, match="DEADLOCK: 32 threads wait on mbarrier"):
        run(
            lanewise, copy.replace("EXPECT", "512") + waiting(0) + waiting(1).replace("AGAIN", "B").replace("OVER", "C")
        )
    with pytest.raises(PTXError, match="size must be a multiple of 16"):
        run(lanewise, copy.replace("EXPECT", "512").replace("512, [", "500, [") + waiting(0) + LOAD)
    with pytest.raises(PTXError, match=r"was not initialised"):
        run(lanewise, "mov.u32 %x3, smem; setp.eq.u32 %p1, %thread, 0;" + BULK.replace("EXPECT", "512") + LOAD)
    unordered = INIT.replace("COUNT", "1").replace("bar.sync 0;", "") + "setp.eq.u32 %p1, %thread, 32;"
    with pytest.raises(PTXError, match="race-mbarrier-init"):
        lanewise(
            "mov.u32 %d, 0;" + unordered + "@%p1 mbarrier.arrive.shared.b64 _, [%x3];",
            {"d": np.uint32},
            threads=64,
            shared=1024,
            a=A,
        )


def test_bulk_copy_over_generic_writes_wants_a_fence(lanewise):
    store = "st.shared.v4.u32 [%x1], {%a, %a, %a, %a}; FENCE bar.sync 0;"
    body = INIT.replace("COUNT", "1") + store + BULK.replace("EXPECT", "512") + waiting(0) + LOAD
    with pytest.raises(PTXError, match="missing-proxy-fence"):
        run(lanewise, body.replace("FENCE", ""))
    got, _ = run(lanewise, body.replace("FENCE", "fence.proxy.async.shared::cta;"))
    np.testing.assert_array_equal(got, A.reshape(32, 4))


STORE = """st.shared.v4.u32 [%x1], {%a, %a, %a, %a}; FENCE bar.sync 0; setp.eq.u32 %p1, %thread, 0;
ld.param.u64 %y3, [p_b]; @%p1 cp.async.bulk.global.shared::cta.bulk_group [%y3], [%x1], 512;
@%p1 cp.async.bulk.commit_group; WAITING bar.sync 0;
add.u32 %d, %a, 1; st.shared.u32 [%x1], %d; mul.wide.u32 %y2, %thread, 16; add.s64 %y3, %y3, %y2;
ld.global.u32 %e, [%y3+8]; mov.u32 %f, 0; mov.u32 %g, 0;"""


def test_bulk_copy_to_global_memory(lanewise):
    fenced = STORE.replace("FENCE", "fence.proxy.async;")
    waited = fenced.replace("WAITING", "@%p1 cp.async.bulk.wait_group.read 0;")
    b = np.zeros_like(A)
    got, _ = run(lanewise, waited, b=b)
    np.testing.assert_array_equal(got[:, 1], A[:32])
    with pytest.raises(PTXError, match="write-under-wgmma"):
        run(lanewise, fenced.replace("WAITING", ""), b=b)
    with pytest.raises(PTXError, match="missing-proxy-fence"):
        run(lanewise, STORE.replace("FENCE", "").replace("WAITING", "@%p1 cp.async.bulk.wait_group 0;"), b=b)


def test_mbarrier_orders_what_lies_before_the_arrival(lanewise):
    """64 threads arrive twice; state tokens and parities."""
    body = """mov.u32 %x1, smem; mad.lo.u32 %x1, %thread, 4, %x1; st.shared.u32 [%x1], %a;
    mbarrier.arrive.shared.b64 %y1, [%x3];
    A1: mbarrier.test_wait.shared.b64 %p2, [%x3], %y1; @!%p2 bra A1;
    xor.b32 %x1, %x1, 128; ld.shared.u32 %d, [%x1]; mbarrier.arrive.shared.b64 _, [%x3], 1;
    A2: mbarrier.try_wait.parity.shared.b64 %p2, [%x3], 1; @!%p2 bra A2; st.shared.u32 [%x1], %d;
    mbarrier.inval.shared.b64 [%x3];"""
    a = np.arange(64, dtype=np.uint32)
    d, _ = lanewise(INIT.replace("COUNT", "64") + body, {"d": np.uint32}, a=a, shared=1024)
    np.testing.assert_array_equal(d, a ^ 32)
    again = INIT.replace("COUNT", "32") + "mbarrier.arrive.shared.b64 _, [%x3], 40; mov.u32 %d, 0;"
    with pytest.raises(PTXError, match="more arrivals than its count"):
        lanewise(again, {"d": np.uint32}, a=a, shared=1024)
