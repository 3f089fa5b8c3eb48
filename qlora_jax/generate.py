"""The asking door: `python -m qlora_jax.generate --run RUN --prompt "..."`.

Answers alone go to stdout, everything else to stderr.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_jax.errors import UserError, UserErrors
from qlora_jax.training.console import exit_code
from qlora_jax.training.options import OptionParser

if TYPE_CHECKING:
    from qlora_jax.data.formats import Prompt
    from qlora_jax.evaluation.asking import Asker
    from qlora_jax.evaluation.sampling import Sampling
    from qlora_jax.training.config import TrainConfig

_EXAMPLES = """\
examples:
  python -m qlora_jax.generate --run runs/finetune --prompt "What does os.path.join do?"
  python -m qlora_jax.generate --run runs/finetune --base --prompt "..."   what the model said before training
  python -m qlora_jax.generate --run runs/finetune --chat                 a conversation; Ctrl-D ends it
  python -m qlora_jax.generate --run runs/finetune --prompts rows.jsonl --out answers.jsonl
  python -m qlora_jax.generate --model FOLDER_OR_GGUF --adapter ADAPTER --prompt "..." --temperature 0.7 --top-p 0.9
"""
# By the names of Sampling.
_RULES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_STOPPING = "\nCtrl-C: stopping the answer. Once more to leave.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the door and returns its exit code: 0, 2 (a user's mistake), 130 (interrupted), 1 (anything else)."""
    return exit_code(lambda given: answer(parse(given)), arguments)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads `--key value`, `--key=value` and `key=value`.

    Raises:
      UserErrors: an unknown option (with the nearest known one), values that do not fit, and options that exclude each
        other.
    """
    options = _parser().read(arguments)
    mistakes = []
    if options.run is None and options.model is None:
        mistakes.append(
            UserError(
                "neither --run nor --model is given",
                why="there is no model to ask",
                fix="--run runs/smollm2-demo, or --model FOLDER_OR_GGUF",
            )
        )
    for one, other, why in (
        ("--base", "--adapter", "--base means without an adapter"),
        ("--prompts", "--prompt", "one asks each line of a file, the other a text"),
        ("--prompts", "--chat", "the prompts of a file are asked one by one"),
    ):
        if all(getattr(options, name.lstrip("-")) not in (None, False) for name in (one, other)):
            mistakes.append(UserError(f"{one} and {other} are both given", why=why, fix=f"leave out {other}"))
    if options.prompts is None:
        for name, given in (("--out", options.out), ("--batch-size", options.batch_size)):
            if given is not None:
                mistakes.append(UserError(f"{name} without --prompts", why="it is about many answers"))
    for name, least, why in (
        ("--max-new-tokens", options.max_new_tokens, "an answer has at least one token"),
        ("--batch-size", options.batch_size, "at least one prompt is answered at a time"),
    ):
        if least is not None and least < 1:
            mistakes.append(UserError(f"{name} {least}", why=why, fix=f"{name} 8"))
    options.stop = [text.replace("\\n", "\n").replace("\\t", "\t") for text in options.stop]
    if "" in options.stop:
        mistakes.append(UserError("--stop is empty", why="it would end every answer at once", fix="--stop '\\n\\n'"))
    if mistakes:
        raise UserErrors(mistakes)
    return options


def answer(options: argparse.Namespace) -> None:
    """Answers --prompt, --prompts, or stdin where it is no terminal, or holds a conversation.

    Raises:
      UserError: see `parse`; a run, model, file or prompt that cannot be used.
    """
    from qlora_jax.nf4.environment import check_environment

    if not options.model_sampling:
        _sampling(options, {})  # raises before anything is loaded
    source = _find(options)
    prompt, chat = options.prompt, options.chat
    prompts = _read_prompts(options) if options.prompts is not None else None
    if prompt is None and prompts is None and not chat:
        if sys.stdin.isatty():
            chat = True
        else:
            prompt = sys.stdin.read().strip()
    if prompt is not None and not prompt.strip():
        raise UserError("the prompt is empty", fix='--prompt "..."')
    _check_text(prompt or "", "the prompt")
    _check_text(options.system or "", "--system")
    for text in options.stop:
        _check_text(text, "--stop")
    check_environment()
    asker = _load(source, options)
    start = [("system", options.system)] if options.system else []
    if prompts is not None:
        _answer_file(asker, prompts, options)
    elif chat:
        _converse(asker, start, options, first=prompt)
    else:
        assert prompt is not None
        _answer_one(asker, [*start, ("user", prompt)], options)


# (role, content) of each turn.
_Turns = list[tuple[str, str]]


def _answer_one(asker: "Asker", turns: _Turns, options: argparse.Namespace, *, chat: bool = False) -> str:
    """Prints the answer as it comes. In a conversation, Ctrl-C ends the answer alone."""
    from qlora_jax.training.interrupts import first_interrupt_is_a_request

    if chat:
        with first_interrupt_is_a_request(_STOPPING) as interrupt:
            answer = asker.ask(turns, show=_print_piece, is_interrupted=lambda: interrupt.requested)
    else:
        answer = asker.ask(turns, show=_print_piece)
    print(flush=True)
    if answer.finish == "length":
        own = answer.tokens == options.max_new_tokens
        _say(f"(the answer was cut at {f'--max-new-tokens {answer.tokens}' if own else NO_POSITIONS})")
    return answer.text


NO_POSITIONS = "the end of the model's positions"


def _print_piece(piece: str) -> None:
    print(piece, end="", flush=True)


def _converse(asker: "Asker", start: _Turns, options: argparse.Namespace, *, first: str | None) -> None:
    _say("Type a message. Ctrl-C stops an answer, /new begins a new conversation, Ctrl-D ends.")
    turns = start
    while True:
        print("\n> ", end="" if first is None else f"{first}\n", file=sys.stderr, flush=True)
        try:
            message, first = first if first is not None else input(), None
        except EOFError:
            _say("")
            return
        if message.strip() == "/new":
            turns = start
            _say("(a new conversation)")
        if message.strip() in ("", "/new"):
            continue
        try:
            _check_text(message, "the message")
            asked = [*turns, ("user", message)]
            reply = _answer_one(asker, asked, options, chat=True)
        except UserError as error:
            _say(f"error: {error}")
            continue
        if reply:  # else it was stopped before it began
            turns = [*asked, ("assistant", reply)]


def _read_prompts(options: argparse.Namespace) -> "list[Prompt]":
    """The file's prompts. UserError: they, or a place for the answers, are not there."""
    from qlora_jax.data.formats import read_prompts

    out = None if options.out is None else Path(options.out)
    if out is not None and (out.exists() or not out.absolute().parent.is_dir()):
        raise UserError(
            f"--out {out} cannot be written",
            why="there is something of that name, and nothing is replaced" if out.exists() else "no such folder",
            fix="name another file",
        )
    return read_prompts(options.prompts)


def _answer_file(asker: "Asker", prompts: "Sequence[Prompt]", options: argparse.Namespace) -> None:
    from qlora_jax.training.meter import Meter
    from qlora_jax.training.run_folder import write_atomically

    with Meter("answering", "prompts") as meter:
        rows = asker.ask_all(
            prompts,
            Path(options.prompts),
            system=options.system,
            batch_size=options.batch_size or 8,
            progress=meter.show,
        )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if options.out is None:
        print(text, end="", flush=True)
    else:
        write_atomically(Path(options.out), text)
    cut = sum(row["finish"] == "length" for row in rows)
    said = f"; {cut} cut at --max-new-tokens {options.max_new_tokens} or {NO_POSITIONS}" if cut else ""
    _say(f"{len(rows)} answers{f' in {options.out}' if options.out else ''}{said}")


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


def _load(source: _Source, options: argparse.Namespace) -> "Asker":
    """Loads model, adapter and tokenizer."""
    from qlora_jax.checkpoints.generation_config import read_generation_config
    from qlora_jax.checkpoints.peft import load_adapter
    from qlora_jax.checkpoints.source import open_checkpoint
    from qlora_jax.evaluation.answers import Answerer
    from qlora_jax.evaluation.asking import Asker
    from qlora_jax.models.loading import load_model
    from qlora_jax.training.finished import base_model
    from qlora_jax.training.meter import Meter
    from qlora_jax.training.preparation import renderer_for

    config = source.config
    path = base_model(source.model, _say)
    _say(f"loading {path}" + (f" with the adapter {source.adapter}" if source.adapter else ""))
    checkpoint = open_checkpoint(path)
    makers = read_generation_config(checkpoint)
    sampling = _sampling(options, makers.sampling if options.model_sampling else {})
    if options.model_sampling:
        rules = [f"{name} {value:g}" for name, value in sampling._asdict().items() if value is not None]
        _say(f"sampling: {', '.join(rules) or 'none, the likeliest token each time'}")
    renderer = renderer_for(checkpoint, checkpoint.tokenizer(), options.template or config.data.template)
    with Meter("loading", "tensors") as meter:
        model = load_model(
            checkpoint,
            **config.quant.load_arguments(),
            dtype=config.model.dtype,
            progress=meter.show,
        )
    if source.adapter is not None:
        load_adapter(model, source.adapter)
    answerer = Answerer(
        model,
        renderer.tokenizer,
        stop_ids={*renderer.stop_ids, *makers.eos_ids},
        stop_strings=options.stop,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        seed=options.seed,
    )
    return Asker(answerer, renderer)


def _sampling(options: argparse.Namespace, makers: dict[str, float]) -> "Sampling":
    """The rules given, before those of the model's makers.

    Raises:
      UserErrors: values out of range, or rules that have no effect.
    """
    from qlora_jax.evaluation.sampling import Sampling

    given = {name: value for name in _RULES if (value := getattr(options, name)) is not None}
    if given.get("temperature") == 0:
        makers = {name: value for name, value in makers.items() if name == "repetition_penalty"}
    try:
        return Sampling(**{**makers, **given}).checked()  # type: ignore[arg-type]
    except UserErrors as mistakes:
        raise UserErrors([_as_options(mistake) for mistake in mistakes.errors]) from None


def _as_options(mistake: UserError) -> UserError:
    """`top_k=50` as `--top-k 50`."""
    texts = []
    for text in (mistake.problem, mistake.fix):
        name, _, value = text.partition("=")
        texts.append(f"--{name.replace('_', '-')} {value}")
    return UserError(texts[0], why=mistake.why, fix=texts[1])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> OptionParser:
    parser = OptionParser(
        "generate",
        description="Asks a finetuned model. The answer alone is printed on stdout, as it comes. Options are written "
        "--key value, --key=value or key=value.",
        epilog=_EXAMPLES,
    )
    add = parser.add_argument
    add("--run", metavar="RUN", help="run folder of a training: its base model, settings and adapter are used")
    add("--prompt", metavar="TEXT", help="what to ask; without it a conversation on a terminal, else stdin is asked")
    add("--chat", action="store_true", help="a conversation, of which --prompt is the first message")
    add(
        "--prompts",
        metavar="FILE",
        help="ask many: a text with one a line, or JSONL rows as train reads them, whose own answer is left out. "
        'Answers are JSONL: each row with "answer" and "finish" (stop or length)',
    )
    add("--out", metavar="FILE", help="where the answers of --prompts go, when all are there; default: stdout")
    add("--batch-size", metavar="N", type=int, help="prompts of --prompts answered at once (8): faster, more memory")
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
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end an answer before this text, \\n for a line's end; may be given several times. Answers always end at "
        "the end-of-sequence tokens of the tokenizer, the chat template and generation_config.json",
    )
    add(
        "--temperature",
        metavar="T",
        type=float,
        help="0 (default): the likeliest token each time, always the same answer; 1: sampled as the model predicts; "
        "between: less varied",
    )
    add("--top-k", metavar="N", type=int, help="sample among the N likeliest tokens (all)")
    add(
        "--top-p",
        metavar="P",
        type=float,
        help="sample among the likeliest tokens that have probability P together (1)",
    )
    add("--min-p", metavar="P", type=float, help="sample among tokens with P times the largest probability or more (0)")
    add(
        "--repetition-penalty",
        metavar="X",
        type=float,
        help="above 1: tokens of the prompt and the answer so far become less likely (1); transformers' rule",
    )
    add(
        "--model-sampling",
        action="store_true",
        help="take the five above as the model's generation_config.json has them, where they are not given",
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
