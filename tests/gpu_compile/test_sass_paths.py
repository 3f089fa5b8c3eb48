"""The reader of SASS on small listings: which way a warp goes where nothing is ragged."""

import pytest
from kernel_gates.sass import parse

pytestmark = pytest.mark.gpu_compile


def listing(*lines: str) -> str:
    body = "\n".join(f"        /*{16 * i:04x}*/   {line} ;   /* 0x0 */" for i, line in enumerate(lines))
    return f"\t\tFunction : k\n{body}\n"


def path(*lines: str) -> list[str]:
    return [i.opcode for i in parse(listing(*lines))["k"].main_path()]


def test_a_loop_is_found_and_its_slow_way_is_not_taken() -> None:
    got = path(
        "S2R R0, SR_TID.X",
        "ISETP.GE.AND P0, PT, R0, R1, PT",  # 10: loop
        "@P0 BRA 0x50",
        "LDGSTS.E.BYPASS.128 [R2], [R4.64]",
        "BRA 0x70",
        "LDG.E.U16 R5, [R4.64]",  # 50: slow
        "@!P1 BRA 0x50",
        "HMMA.16816.F32.BF16 R8, R8, R12, R8",  # 70
        "@P2 BRA 0x10",
        "EXIT",
    )
    assert got == ["ISETP", "BRA", "LDGSTS", "BRA", "HMMA", "BRA"]


def test_a_loop_may_be_left_by_a_call_and_closed_by_a_jump() -> None:
    got = path("NOP", "HMMA.16816.F32 R8, R8, R12, R8", "@P4 CALL.REL.NOINC 0x40", "BRA 0x10", "EXIT")
    assert got == ["HMMA", "CALL", "BRA"]


def test_code_for_parted_warps_lies_outside() -> None:
    got = path(
        "DEPBAR.LE SB0, 0x2",
        "BRA.DIV UR7, 0x50",
        "HMMA.16816.F32 R8, R8, R12, R8",
        "@!P4 BRA 0x0",
        "EXIT",
        "WARPSYNC.COLLECTIVE R32, 0x60",
        "BRA 0x20",
    )
    assert got == ["DEPBAR", "BRA", "HMMA", "BRA"]


def test_without_tensor_cores_the_whole_kernel_is_the_path() -> None:
    got = path("@P0 BRA 0x30", "STG.E.128 [R2.64], R4", "EXIT", "STG.E [R2.64], R4", "@P1 BRA 0x30", "EXIT")
    assert got == ["BRA", "STG", "EXIT"]


def test_what_is_not_understood_is_refused() -> None:
    with pytest.raises(ValueError, match="computed address"):
        path("BRX R2 -0x10", "EXIT")
    with pytest.raises(ValueError, match="outside of any loop"):
        path("HMMA.16816.F32 R8, R8, R12, R8", "EXIT")
    with pytest.raises(ValueError, match="no instructions"):
        parse("\t\tFunction : k\n")
