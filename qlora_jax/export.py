"""The exporting door: `python -m qlora_jax.export RUN OUT --to peft|merged|bitsandbytes`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_jax.errors import UserError, UserErrors
from qlora_jax.training.console import exit_code
from qlora_jax.training.options import OptionParser, size_in_bytes

if TYPE_CHECKING:
    from qlora_jax.training.exporting import Trained

_EPILOG = """\
peft          the adapter: loads onto the base in PEFT, vLLM and here
merged        base and adapter as one model in 16 bits, in safetensors: loads wherever the base does
bitsandbytes  the base in the very 4 bits that were trained against, and the adapter in OUT/adapter

An adapter corrects the weights it was trained against, errors of 4 bits included: --base dequantized merges it into
those, so that OUT computes what was trained. --base original merges it into the 16-bit weights. Which answers better
differs from model to model.

examples:
  python -m qlora_jax.export runs/mine OUT --to merged --verify
  python -m qlora_jax.export runs/mine OUT --to peft --base-name org/name
"""


_DTYPE_HELP = (
    "of a merged model; default: each tensor's own. bfloat16 rounds what was merged to 8 bits; float16 keeps 11, for "
    "weights below 65504"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the door and returns its exit code: 0, 2 (a user's mistake), 130 (interrupted), 1 (anything else)."""
    return exit_code(lambda given: run(parse(given)), arguments, interrupted="interrupted; nothing is kept")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the options.

    Raises:
      UserErrors: see OptionParser.read; and every option that means nothing with --to.
    """
    parser = OptionParser(
        "export", description="Writes what a run has trained, for other programs to load.", epilog=_EPILOG
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder of a training that has ended, or a folder with a PEFT adapter")
    add("out", metavar="OUT", help="folder to write; one that holds anything is refused")
    add("--to", choices=("peft", "merged", "bitsandbytes"), required=True, help="what to write, see below")
    add("--base", choices=("dequantized", "original"), help="merge into what was trained against (default), or 16 bits")
    add("--model", metavar="PATH", help="the base, where it has moved: HF folder, .gguf file or hub name")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help=_DTYPE_HELP)
    add("--shard-size", metavar="SIZE", type=size_in_bytes, default="5GB", help="largest file of weights (5GB)")
    add("--base-name", metavar="NAME", help="what the adapter is to call its base, such as org/name; default: its path")
    add("--requantize", action="store_true", help="with bitsandbytes: merge, and round the result to 4 bits again")
    add("--verify", action="store_true", help="load what was written and print the largest difference of logits")
    options = parser.read(arguments)
    merges = options.to == "merged" or options.requantize
    checks = [
        (options.base is None or merges, f"--base {options.base}", "nothing is merged", "--to merged"),
        (
            options.dtype is None or options.to == "merged",
            f"--dtype {options.dtype}",
            "only a merged model has a dtype to choose",
            "--to merged",
        ),
        (
            not options.requantize or options.to == "bitsandbytes",
            "--requantize",
            "only what is written in 4 bits can be rounded to them",
            "--to bitsandbytes",
        ),
        (
            options.base_name is None or options.to == "peft",
            "--base-name",
            "an adapter beside its base names that",
            "--to peft",
        ),
    ]
    mistakes = [
        UserError(f"{option} with --to {options.to}", why=why, fix=fix) for good, option, why, fix in checks if not good
    ]
    if mistakes:
        raise UserErrors(mistakes)
    return options


def run(options: argparse.Namespace) -> None:
    """Exports, and says what came of it.

    Raises:
      UserError: no such run, a base that cannot be read or is another, or an output folder that cannot be used.
    """
    from qlora_jax.checkpoints.atomic import check_unused
    from qlora_jax.nf4.environment import check_environment
    from qlora_jax.training import exporting
    from qlora_jax.training.meter import Meter, in_bytes

    out, original = Path(options.out).expanduser(), options.base == "original"
    check_unused(out, option="OUT")
    trained = exporting.open_trained(Path(options.run).expanduser(), options.model, _say)
    if options.to != "peft":
        exporting.check_base(trained, original=original)
    if trained.same_base is False:
        _say(f"note: {trained.base_path} is not the file that was trained on (another sha256)")
    check_environment()
    with Meter("writing") as meter:
        rest = {"shard_bytes": options.shard_size, "progress": meter.show}
        if options.to == "peft":
            exporting.export_peft(trained, out, base_name=options.base_name)
            said = f"an adapter of {len(trained.adapter.linears)} linears"
        elif options.to == "merged":
            made = exporting.export_merged(trained, out, original=original, dtype=options.dtype, **rest)
            said = f"{in_bytes(made.nbytes)}, merged into {_merged_into(trained, original)}"
        elif options.requantize:
            made, cost = exporting.export_requantized(trained, out, original=original, **rest)
            said = (
                f"{in_bytes(made.nbytes)}, merged into {_merged_into(trained, original)} and rounded to 4 bits again: "
                f"the rounding is {cost:.2g} times what the adapter changes"
            )
        else:
            made = exporting.export_bitsandbytes(trained, out, **rest)
            said = f"{in_bytes(made.nbytes)}, the base as trained against, and its adapter in {out / 'adapter'}"
    print(f"{out}: {said}")
    if options.verify:
        from qlora_jax.training.verification import LENGTH, ROWS, compare

        found = compare(trained, out, to="requantized" if options.requantize else options.to, original=original)
        print(
            f"largest logit difference to the run: {found.difference:.2g}, on {ROWS} rows of {LENGTH} random tokens "
            f"(the adapter itself moves them by up to {found.effect:.2g})"
        )


def _merged_into(trained: "Trained", original: bool) -> str:
    if original or not trained.in_4_bits:
        return f"the 16-bit weights of {trained.base_path}"
    return "the dequantized weights it was trained against"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
