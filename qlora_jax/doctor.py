"""The examining door: `python -m qlora_jax.doctor [--json]`. What was found, what was not and why, and what to do."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from qlora_jax.errors import UserError
from qlora_jax.training.console import prepare_console, report_fault, report_mistakes
from qlora_jax.training.options import hint

if TYPE_CHECKING:
    from qlora_jax.diagnosis.advice import Problem
    from qlora_jax.diagnosis.self_check import Check

_HELP = "python -m qlora_jax.doctor --help lists every option"
_EPILOG = """\
It reports versions, devices, which compiled kernels are loaded or why they are not, which kernel multiplies how many
rows, variables that change what runs, and the error of a small product by each kernel.

Exit codes: 0 usable (also with less than this machine could give), 1 something is broken, 2 a mistyped option."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        words = message.partition("unrecognized arguments: ")[2].split()
        raise UserError(message, fix=hint(words[0], self._option_string_actions, _HELP) if words else _HELP)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the door and returns its exit code: 0 usable, 1 broken, 2 (a user's mistake)."""
    prepare_console()
    try:
        options = _parser().parse_args(arguments)
        report, broken = examine()
    except UserError as error:
        return report_mistakes(error)
    except Exception:
        return report_fault()
    print(json.dumps(report, indent=2) if options.json else as_text(report))
    return int(broken)


def examine() -> tuple[dict[str, Any], bool]:
    """The report, and whether something is broken.

    Returns:
      What findings.collect returns, and `self_check` (what, way, error, bound, passed, failure), `problems` (text, fix,
      broken), `usable`.
    """
    from qlora_jax.diagnosis.advice import problems
    from qlora_jax.diagnosis.findings import collect

    findings = collect()
    checks: list[Check] = []
    if findings["jax_failure"] is None and not findings["dispatch_failure"]:
        from qlora_jax.diagnosis.self_check import run_checks

        checks = run_checks()
    found: list[Problem] = problems(findings, checks)
    broken = any(problem.broken for problem in found)
    report = findings | {
        "self_check": [dataclasses.asdict(check) | {"passed": check.passed} for check in checks],
        "problems": [dataclasses.asdict(problem) for problem in found],
        "usable": not broken,
    }
    return report, broken


def as_text(report: dict[str, Any]) -> str:
    """The report for people, problems last."""
    lines = [
        f"qlora_jax {report['qlora_jax']}, Python {report['python']}, {report['system']}",
        "packages       " + ", ".join(f"{name} {version or 'none'}" for name, version in report["versions"].items()),
        "extras         " + (", ".join(name for name, there in report["extras"].items() if there) or "none"),
    ]
    if report["jax_failure"] is None:
        lines += _device_lines(report) + _kernel_lines(report)
    lines += [f"variable       {name}={value}" for name, value in report["environment"].items()]
    for check in report["self_check"]:
        told = check["failure"] or f"error {check['error']:.1e}, at most {check['bound']:.1e}"
        lines.append(
            f"self-check     {check['what']} by {check['way']}: {'good' if check['passed'] else 'BAD'}, {told}"
        )
    for problem in report["problems"]:
        lines += ["", f"{'broken' if problem['broken'] else 'warning'}: {problem['text']}", f"  fix: {problem['fix']}"]
    return "\n".join([*lines, "", "usable" if report["usable"] else "NOT usable as it is"])


def _device_lines(report: dict[str, Any]) -> list[str]:
    lines = []
    for device in report["devices"]:
        memory = device["memory_bytes"]
        more = [
            device["kind"],
            f"{memory / 2**30:.1f} GiB" if memory else "",
            f"compute capability {device['compute_capability']}" if device["compute_capability"] else "",
        ]
        lines.append(f"device         {device['platform']}: " + ", ".join(filter(None, more)))
    host = "optimizer state can be paged to it" if report["host_memory"] else "not addressed by the device"
    return [*lines, f"host memory    {host}"]


def _kernel_lines(report: dict[str, Any]) -> list[str]:
    instructions = f" ({report['instruction_set']})" if report["instruction_set"] else ""
    architectures = f" (for {', '.join(report['cuda_architectures'])})" if report["cuda_architectures"] else ""
    lines = [
        f"CPU kernels    {report['cpu_library']}{instructions}",
        f"CUDA kernels   {report['cuda_library']}{architectures}",
        f"               on this machine: {report['cuda_kernels']}",
    ]
    dispatch = report["dispatch"]
    if dispatch:
        lines.append(f"kernels asked  {dispatch['asked']} (by {dispatch['asked_by']})")
    cuda = dispatch.get("cuda")
    if cuda:
        lines.append(f"planned for    compute capability {cuda['compute_capability']} (by {cuda['known_by']})")
        for direction, limits in cuda["thresholds"].items():
            ways = f"skinny to {limits['skinny']} rows, tile to {limits['tile']}, dequantize above"
            lines.append(f"               {direction}: {ways}")
    return lines


def _parser() -> argparse.ArgumentParser:
    from qlora_jax import __version__

    parser = _Parser(
        prog="python -m qlora_jax.doctor",
        description="Says what qlora_jax finds on this machine, what it does not and why, and what to do about it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: what to add to a report of a fault")
    parser.add_argument("--version", action="version", version=f"qlora_jax {__version__}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
