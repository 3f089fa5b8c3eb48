"""The asking door: `python -m qlora_jax.generate --run RUN --prompt "..."`.

The answer alone goes to stdout, everything else to stderr.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_jax.errors import UserError
from qlora_jax.training.console import exit_code
from qlora_jax.training.options import OptionParser

if TYPE_CHECKING:
    from qlora_jax.data.formats import Message
    from qlora_jax.data.rendering import Renderer
    from qlora_jax.models.decoder import Decoder
    from qlora_jax.training.config import TrainConfig

_EXAMPLES = """\
examples:
  python -m qlora_jax.generate --run runs/finetune --prompt "What does os.path.join do?"
  python -m qlora_jax.generate --run runs/finetune --base --prompt "..."   what the model said before training
  python -m qlora_jax.generate --run runs/finetune                        a conversation; Ctrl-D ends it
  python -m qlora_jax.generate --model FOLDER_OR_GGUF --adapter ADAPTER --prompt "..."
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the door and returns its exit code: 0, 2 (a user's mistake), 130 (interrupted), 1 (anything else)."""
    return exit_code(lambda given: answer(parse(given)), arguments)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads `--key value`, `--key=value` and `key=value`.

    Raises:
      UserError: an unknown option (with the nearest known one), a value that does not fit, or options that exclude
        each other.
    """
    options = _parser().read(arguments)
    if options.run is None and options.model is None:
        raise UserError(
            "neither --run nor --model is given",
            why="there is no model to ask",
            fix="--run runs/smollm2-demo, or --model FOLDER_OR_GGUF",
        )
    if options.base and options.adapter is not None:
        raise UserError("--base and --adapter are both given", why="--base means without an adapter")
    if options.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {options.max_new_tokens}", why="an answer has at least one token")
    if not 0 <= options.temperature < float("inf"):
        raise UserError(
            f"--temperature {options.temperature:g}",
            why="0 takes the likeliest token, above 0 samples",
            fix="--temperature 0",
        )
    return options


def answer(options: argparse.Namespace) -> None:
    """Answers --prompt, or stdin where it is no terminal, or holds a conversation."""
    from qlora_jax.nf4.environment import check_environment

    source = _find(options)
    prompt = options.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    if prompt is not None and not prompt.strip():
        raise UserError("the prompt is empty", fix='--prompt "..."')
    _check_text(prompt or "", "the prompt")
    _check_text(options.system or "", "--system")
    check_environment()
    ask = _load(source, options)
    start = [("system", options.system)] if options.system else []
    if prompt is not None:
        print(ask([*start, ("user", prompt)]))
    else:
        _converse(ask, start)


# (role, content) of each turn.
_Turns = list[tuple[str, str]]


def _converse(ask: Callable[[_Turns], str], turns: _Turns) -> None:
    _say("Type a message; Ctrl-D ends the conversation.")
    while True:
        print("\n> ", end="", file=sys.stderr, flush=True)
        try:
            message = input()
        except EOFError:
            _say("")
            return
        if not message.strip():
            continue
        try:
            _check_text(message, "the message")
            reply = ask([*turns, ("user", message)])
        except UserError as error:
            _say(f"error: {error}")
            continue
        print(reply, flush=True)
        turns = [*turns, ("user", message), ("assistant", reply)]


def _check_text(text: str, what: str) -> None:
    """Python keeps bytes that are not UTF-8 as lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} is not UTF-8 text: character {error.start + 1} is {text[error.start]!a}",
            why="tokenizers read UTF-8",
            fix="iconv -f latin1 -t utf-8 converts a file   (if it is latin1)",
        ) from None


@dataclasses.dataclass(frozen=True)
class _Source:
    """What to load: a base model, how, and the adapter on it (None: without one)."""

    model: str | None
    adapter: Path | None
    config: "TrainConfig"


def _find(options: argparse.Namespace) -> _Source:
    """Looks up the run; loads nothing."""
    from qlora_jax.training.config import TrainConfig
    from qlora_jax.training.finished import finished_adapter, read_run

    config = TrainConfig.model_validate({}) if options.run is None else read_run(Path(options.run))
    adapter = None if options.adapter is None else Path(options.adapter)
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise UserError(
            f"--adapter {adapter} is no adapter",
            why="there is no adapter_config.json in it" if adapter.is_dir() else "there is no such folder",
            fix="--adapter RUN/adapter",
        )
    if adapter is None and options.run is not None and not options.base:
        adapter = finished_adapter(Path(options.run), otherwise="--base to ask the model as it was before")
    return _Source(options.model or config.model.path, adapter, config)


def _load(source: _Source, options: argparse.Namespace) -> Callable[[_Turns], str]:
    """Loads model, adapter and tokenizer; returns the function that answers."""
    from qlora_jax.checkpoints.peft import load_adapter
    from qlora_jax.checkpoints.source import open_checkpoint
    from qlora_jax.data.formats import Message
    from qlora_jax.data.rendering import Renderer
    from qlora_jax.models.decoder import Decoder
    from qlora_jax.models.loading import load_model, refuse_t5
    from qlora_jax.training.finished import base_model
    from qlora_jax.training.meter import Meter

    config = source.config
    path = base_model(source.model, _say)
    _say(f"loading {path}" + (f" with the adapter {source.adapter}" if source.adapter else ""))
    checkpoint = open_checkpoint(path)
    refuse_t5(checkpoint)
    renderer = Renderer(checkpoint.tokenizer(), options.template or config.data.template)
    with Meter("loading", "tensors") as meter:
        model = load_model(
            checkpoint,
            **config.quant.load_arguments(),
            dtype=config.model.dtype,
            progress=meter.show,
        )
    assert isinstance(model, Decoder)
    if source.adapter is not None:
        load_adapter(model, source.adapter)
    return lambda turns: _reply(model, renderer, [Message(*turn) for turn in turns], options)


def _reply(model: "Decoder", renderer: "Renderer", messages: "list[Message]", options: argparse.Namespace) -> str:
    from qlora_jax.evaluation.generation import generate
    from qlora_jax.evaluation.sampling import Sampling

    prompt = renderer.prompt(messages)
    positions = model.config.max_position_embeddings
    limit = min(options.max_new_tokens, positions - len(prompt))
    if limit < 1:
        long = "the conversation" if len(messages) > 2 else "the prompt"
        raise UserError(
            f"{long} takes {len(prompt)} tokens, with the template's own",
            why=f"the model has {positions} positions, and an answer needs some of them",
            fix="begin a new conversation" if len(messages) > 2 else "shorten the prompt",
        )
    tokens = generate(
        model,
        [prompt],
        max_new_tokens=limit,
        sampling=Sampling(temperature=options.temperature),
        seed=options.seed,
        eos_ids=renderer.stop_ids,
    )[0]
    if len(tokens) == limit:
        cut = f"--max-new-tokens {limit}" if limit == options.max_new_tokens else "the end of the model's positions"
        _say(f"(the answer was cut at {cut})")
    return str(renderer.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> OptionParser:
    parser = OptionParser(
        "generate",
        description="Asks a finetuned model. The answer alone is printed on stdout. Options are written --key value, "
        "--key=value or key=value.",
        epilog=_EXAMPLES,
    )
    add = parser.add_argument
    add("--run", metavar="RUN", help="run folder of a training: its base model, settings and adapter are used")
    add("--prompt", metavar="TEXT", help="what to ask; without it a conversation on a terminal, else stdin is asked")
    add("--system", metavar="TEXT", help="system message; without it the chat template's own, if it has one")
    add("--model", metavar="PATH", help="base model instead of a run's: HF folder, .gguf file or hub name")
    add("--adapter", metavar="DIR", help="PEFT adapter instead of RUN/adapter")
    add("--base", action="store_true", help="without an adapter: the model as it was before training")
    add(
        "--max-new-tokens",
        metavar="N",
        type=int,
        default=256,
        help="longest answer (256); it says so where an answer was cut",
    )
    add(
        "--temperature",
        metavar="T",
        type=float,
        default=0.0,
        help="0 (default): the likeliest token each time, always the same answer; 1: sampled as the model predicts; "
        "between: less varied",
    )
    add("--seed", metavar="N", type=int, default=0, help="decides what is sampled (0); same seed, same answer")
    add(
        "--template",
        choices=("auto", "chat", "plain"),
        help="how messages are written; default: as the run was trained",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
