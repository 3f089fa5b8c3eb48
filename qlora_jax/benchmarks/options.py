"""The options of the timing door, and the refusals that need nothing but them."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from qlora_jax.errors import UserError
from qlora_jax.training.options import hint

WHAT = {
    "kernels": "nf4_matmul and its input gradient, beside XLA, cuBLAS and bitsandbytes' CUDA kernels (the default)",
    "cpu": "nf4_matmul beside bitsandbytes' Linear4bit and torch on the CPU (--peers)",
    "step": "an optimizer step of a small LLaMA beside transformers + peft + bitsandbytes (--peers) and Qwix (--qwix)",
    "demo": "the demo's optimizer step (its model is fetched the first time); --peers: beside transformers, as step",
    "datatypes": "perplexity of the demo's model for each 4-bit type",
}
_HELP = "python -m qlora_jax.bench --help lists every option"
_EXAMPLES = """\
examples:
  python -m qlora_jax.bench                                    the kernels of this machine's device, beside XLA
  python -m qlora_jax.bench kernels --device cpu --shapes 4096x4096 --rows 1 128
  python -m qlora_jax.bench kernels --bitsandbytes libbitsandbytes_cuda130.so --out h100.json
  python -m qlora_jax.bench cpu --peers .venv-peers/bin/python make bench-cpu does this, and makes the environment
  python -m qlora_jax.bench step --peers .venv-peers/bin/python
  python -m qlora_jax.bench demo                               the demo's training step
  python -m qlora_jax.bench datatypes --out datatypes.json     NF4, FP4, int4 ... on SmolLM2

Exit codes: 0 done (whether or not bars hold), 2 something you can mend, 130 interrupted, 1 anything else."""
# What each kind of report takes beside the options of all.
_OWN = {
    "kernels": {"device", "shapes", "rows", "minutes", "bitsandbytes"},
    "cpu": {"shapes", "rows", "minutes", "peers", "threads"},
    "step": {"peers", "qwix", "threads"},
    "demo": {"peers", "threads"},
    "datatypes": {"windows"},
}


class Parser(argparse.ArgumentParser):
    """Mistakes become UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, fix=_HELP)

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options.

        Raises:
          UserError: an unknown option (the nearest one is named), a bad value, or one that this report does not take.
        """
        for argument in arguments:
            name = argument.partition("=")[0]
            if name.startswith("--") and name not in self._option_string_actions:
                raise UserError(f"unknown option {name}", fix=hint(name, self._option_string_actions, _HELP))
        options = self.parse_args(arguments)
        for name in set().union(*_OWN.values()) - _OWN[options.what]:
            if getattr(options, name) is not None:
                takers = [what for what, own in _OWN.items() if name in own]
                raise UserError(f"{options.what} has no --{name}", why=f"it is for {', '.join(takers)}", fix=_HELP)
        if options.out is not None:
            _check_out(options.out)
        return options


def _check_out(path: Path) -> None:
    """Refuses before minutes are spent."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be written: {path.parent} is no folder"
        raise UserError(f"--out {path} {what}", why="the report is one JSON file", fix="--out bench.json")
    # Written beside, then renamed.
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--out {path} cannot be written", why="no permission", fix="--out bench.json")


def _shape(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: INxOUT, such as 4096x11008")
    in_features, out_features = text.split("x")
    return int(in_features), int(out_features)


def _positive(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number: 1, 2, ...")
    return int(text)


def _minutes(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes")
    return float(text)


def make_parser() -> Parser:
    """The parser of the door."""
    from qlora_jax import __version__

    parser = Parser(
        prog="python -m qlora_jax.bench",
        description="Times NF4 kernels and training steps beside their peers, and compares the 4-bit types.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "what",
        nargs="?",
        choices=tuple(WHAT),
        default="kernels",
        help="; ".join(f"{name}: {text}" for name, text in WHAT.items()),
    )
    add(
        "--device",
        choices=("cpu", "gpu"),
        help="where the kernels run; default: JAX's own choice. The same code and the same JSON on both",
    )
    add(
        "--shapes",
        metavar="INxOUT",
        nargs="+",
        type=_shape,
        help="weights; default of kernels: every linear of LLaMA 7B, 65B, 8B, 70B and 13B on a GPU, of SmolLM2-135M "
        "and one of 4096x4096 on a CPU; of cpu: 4096x4096 and 4096x11008",
    )
    add(
        "--rows",
        metavar="M",
        nargs="+",
        type=_positive,
        help="rows of the activations; default of kernels: 1 to 16384 on a GPU, what tells most first, 1 to 768 on a "
        "CPU; of cpu: 1 to 2048",
    )
    add(
        "--minutes",
        metavar="N",
        type=_minutes,
        help="begin no case after so long (9; cpu: 30); what was left out is counted in the report",
    )
    add(
        "--bitsandbytes",
        metavar="FILE",
        type=Path,
        help="bitsandbytes' libbitsandbytes_cuda130.so: its kernels and cuBLAS become peers (torch is not needed)",
    )
    add(
        "--peers",
        metavar="PYTHON",
        type=Path,
        help="a Python with torch, transformers, peft and bitsandbytes, which are measured in turns with ours",
    )
    add("--qwix", metavar="PYTHON", type=Path, help="a Python with qwix, which is measured in turns with ours")
    add(
        "--threads",
        metavar="N",
        type=_positive,
        help="of ours and of the peers, on as many cores; default: all cores that this process may run on",
    )
    add(
        "--windows",
        metavar="N",
        type=_positive,
        help="windows of 512 tokens that perplexity is measured on; default: 128",
    )
    add("--json", action="store_true", help="print JSON in place of the tables")
    add("--out", type=Path, metavar="FILE", help="write the JSON to FILE as well, again after every case")
    add(
        "--quick",
        action="store_true",
        help="small shapes, few repeats, windows and types: a smoke test, not a measurement",
    )
    add("--version", action="version", version=f"qlora_jax {__version__}")
    return parser
