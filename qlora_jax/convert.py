"""The quantizing door: `python -m qlora_jax.convert MODEL OUT`. Quantize once, start in seconds afterwards."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.errors import UserError, UserErrors
from qlora_jax.training.commands import command_line
from qlora_jax.training.console import exit_code
from qlora_jax.training.options import OptionParser, size_in_bytes

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_EPILOG = """\
OUT is a folder in bitsandbytes' format: train, generate, transformers and vLLM read it as it is. It holds the bytes of
a model that is quantized while it is loaded, with the tokenizer, chat template and generation settings of MODEL.
Tensors pass one at a time. OUT appears whole or, after Ctrl-C or a crash, not at all; run the command again then.

examples:
  python -m qlora_jax.convert FOLDER_OR_GGUF FOLDER-nf4
  python -m qlora_jax.train model.path=FOLDER-nf4 data.path=rows.jsonl
  python -m qlora_jax.convert FOLDER FOLDER-loftq --loftq-rank 16 --loftq-iterations 5
  python -m qlora_jax.train model.path=FOLDER-loftq lora.adapter=FOLDER-loftq/adapter data.path=rows.jsonl
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the door and returns its exit code: 0, 2 (a user's mistake), 130 (interrupted), 1 (anything else)."""
    return exit_code(lambda given: run(parse(given)), arguments, interrupted="interrupted; nothing is kept")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the options. UserError: see OptionParser.read."""
    parser = OptionParser(
        "convert",
        description="Quantizes a checkpoint to 4 bits, once, into a folder of its own.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="HF folder, .gguf file or hub name, in 16 or 32 bits; read, never written")
    add("out", metavar="OUT", help="folder to write; one that holds anything is refused")
    add(
        "--quant-type",
        choices=("nf4", "fp4"),
        default="nf4",
        help="nf4 (default), or fp4: coarser where most weights are, only to compare",
    )
    add(
        "--block-size",
        metavar="N",
        type=int,
        choices=_BLOCK_SIZES,
        default=64,
        help="weights that share one scale (64); larger saves a fraction of a bit and rounds more coarsely",
    )
    add("--no-double-quant", action="store_true", help="keep scales in 32 bits: 0.37 bits per weight more")
    add("--shard-size", metavar="SIZE", type=size_in_bytes, default="5GB", help="largest file of weights (5GB)")
    add(
        "--loftq-rank",
        metavar="R",
        type=int,
        help="LoftQ: also write OUT/adapter, an adapter of that rank that starts by making up for what 4 bits lose; "
        "training goes on from it with lora.adapter=OUT/adapter. An SVD for each weight: takes time",
    )
    add("--loftq-alpha", metavar="A", type=float, help="of that adapter (twice its rank)")
    add(
        "--loftq-iterations",
        metavar="N",
        type=int,
        default=1,
        help="1 (default): the base's bytes are those without LoftQ; more: they are chosen together with the adapter",
    )
    options = parser.read(arguments)
    mistakes = []
    if options.loftq_rank is None and (options.loftq_alpha is not None or options.loftq_iterations != 1):
        mistakes.append(UserError("--loftq-alpha or --loftq-iterations without --loftq-rank", fix="--loftq-rank 16"))
    for name, value in (
        ("rank", options.loftq_rank),
        ("alpha", options.loftq_alpha),
        ("iterations", options.loftq_iterations),
    ):
        if value is not None and not 0 < value < float("inf"):
            mistakes.append(UserError(f"--loftq-{name} {value}", why="it has to be above 0", fix="--loftq-rank 16"))
    if mistakes:
        raise UserErrors(mistakes)
    return options


def run(options: argparse.Namespace) -> None:
    """Converts, and says what came of it.

    Raises:
      UserError: a model that cannot be read or is quantized already, or an output folder that cannot be used.
    """
    from qlora_jax.checkpoints.atomic import check_unused
    from qlora_jax.checkpoints.bitsandbytes import BitsandbytesCheckpoint
    from qlora_jax.checkpoints.conversion import convert
    from qlora_jax.checkpoints.loftq import LoftQ
    from qlora_jax.checkpoints.source import open_checkpoint
    from qlora_jax.models.loading import check_model
    from qlora_jax.nf4.environment import check_environment
    from qlora_jax.training.finished import base_model
    from qlora_jax.training.meter import Meter, in_bytes

    out = Path(options.out).expanduser()
    check_unused(out, option="OUT")
    checkpoint = open_checkpoint(base_model(options.model, lambda text: print(text, file=sys.stderr)))
    if isinstance(checkpoint, BitsandbytesCheckpoint):
        raise UserError(
            f"{checkpoint.path} is in 4 bits already",
            why="to quantize it again would add error to error",
            fix=f"model.path={options.model} trains it as it is",
        )
    settings = {
        "quant_type": options.quant_type,
        "block_size": options.block_size,
        "double_quant": not options.no_double_quant,
    }
    check_model(checkpoint, **settings)
    check_environment()
    began = time.monotonic()
    loftq = None
    if options.loftq_rank is not None:
        alpha = options.loftq_alpha or 2.0 * options.loftq_rank
        loftq = LoftQ(options.loftq_rank, alpha, options.loftq_iterations, settings)
    with Meter("writing") as meter:
        made = convert(
            checkpoint,
            out,
            **settings,
            source_sha256=checkpoint.fingerprint() if loftq is None else None,
            shard_bytes=options.shard_size,
            progress=meter.show,
            quantize=loftq.quantize if loftq is not None else None,
            also=(lambda filled: loftq.write(filled, out)) if loftq is not None else None,
        )
    files = f"{len(made.files)} file{'s' * (len(made.files) > 1)}"
    print(
        f"{out}: {in_bytes(made.nbytes)} in {files}, {made.linear_bits:.2f} bits per weight of the linears, "
        f"{time.monotonic() - began:.1f} s"
    )
    if made.wide:
        kept = f"{' and '.join(made.wide)} in 16 bits, with the values that 4 bits stand for"
        print(f"note: {out} has {kept}: transformers has no 4 bits for them", file=sys.stderr)
    if made.missing:
        print(f"note: {checkpoint.path} has no {' and no '.join(made.missing)}, so {out} has none", file=sys.stderr)
    start = []
    if loftq is not None:
        left = loftq.error / loftq.error_plain if loftq.error_plain else 0.0
        print(f"{out / 'adapter'}: with it the linears miss the 16-bit weights by {left:.0%} of what 4 bits alone do")
        start = [f"lora.adapter={out / 'adapter'}"]
    print(f"train it:\n  {command_line('train', f'model.path={out}', *start, 'data.path=rows.jsonl')}")


if __name__ == "__main__":
    sys.exit(main())
