"""The training door: `python -m qlora_jax.train [--config NAME_OR_PATH] [key=value ...]`."""

import contextlib
import difflib
import errno
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_jax.errors import UserError
from qlora_jax.training import demo
from qlora_jax.training.commands import command_line
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.console import prepare_console, report_fault, report_mistakes
from qlora_jax.training.help import help_text
from qlora_jax.training.run_folder import RunFolder
from qlora_jax.training.settings import (
    Invocation,
    Setting,
    build_config,
    find_config,
    parse_arguments,
    read_yaml,
    resume_settings,
    with_absolute_paths,
)

if TYPE_CHECKING:
    from qlora_jax.training.preparation import Prepared
    from qlora_jax.training.progress import Progress

INTERRUPTED = 130  # exit code; shells' own for a process that SIGINT ended
_NEEDS_DATA = UserError(
    "data.path is not given",
    why="there is nothing to train on; the demo brings its own rows, but not with --config or model.path",
    fix="data.path=rows.jsonl",
)


@dataclass(frozen=True)
class Job:
    """A checked configuration, its folder, and whether the rows are still to be built."""

    config: TrainConfig
    folder: RunFolder
    builds_rows: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the door and returns its exit code: 0, 2 (a user's mistake), 130 (interrupted), 1 (anything else)."""
    prepare_console()
    invocation = parse_arguments(list(sys.argv[1:] if arguments is None else arguments))
    if "help" in invocation.flags:
        print(help_text())
        return 0
    if "version" in invocation.flags:
        from qlora_jax import __version__

        print(f"qlora_jax {__version__}")
        return 0
    try:
        return dry_run(resolve(invocation)) if "dry-run" in invocation.flags else train(resolve(invocation))
    except UserError as error:
        return report_mistakes(error, debug="debug" in invocation.flags)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted before anything was written", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        return report_fault()


def resolve(invocation: Invocation) -> Job:
    """Settings, stored settings and the demo's become one configuration; nothing is read but YAML, nothing written.

    Raises:
      UserErrors: every mistake in keys, values, paths and output folder.
    """
    settings = dict(invocation.settings)
    if invocation.is_demo:
        settings = read_yaml(find_config(demo.CONFIG)) | settings
    resume = "resume" in settings and str(settings["resume"].value).lower() in ("true", "1", "yes", "on")
    own_folder = invocation.is_demo and "output_dir" not in invocation.settings
    folder = demo.demo_folder(resume=resume) if own_folder else RunFolder(_output_dir(settings))
    settings["output_dir"] = Setting(str(folder.path), "the demo" if own_folder else _source(settings, "output_dir"))
    mistakes = list(invocation.mistakes)
    if resume and folder.config_path.is_file() and not mistakes:
        stored = read_yaml(folder.config_path)
        asked = {key: settings[key] for key in (*invocation.settings, "output_dir")}
        config = build_config(resume_settings(asked, stored))
        folder.check(resume=True)
        return Job(with_absolute_paths(config), folder, builds_rows=False)
    if not invocation.is_demo and _source(settings, "data.path") == "" and not mistakes:  # it may be in what is unread
        mistakes.append(_NEEDS_DATA)
    if invocation.is_demo and resume and not own_folder and not folder.config_path.is_file():
        mistakes.append(_nothing_to_resume(folder))
    try:
        folder.check(resume=resume)
    except UserError as error:
        mistakes.append(error)
    config = build_config(settings, mistakes)
    return Job(with_absolute_paths(config), folder, builds_rows=invocation.is_demo)


def _nothing_to_resume(folder: RunFolder) -> UserError:
    """A folder was named and nothing else: more likely mistyped than meant for the demo."""
    beside = [path.parent.name for path in folder.path.parent.glob("*/config.yaml")]
    near = difflib.get_close_matches(folder.path.name, beside, n=1)
    start = f"output_dir={folder.path} resume=true data.path=rows.jsonl   (starts where there is nothing to resume)"
    return UserError(
        f"output_dir={folder.path} holds no run to resume",
        why=f"{folder.config_path} does not exist, and neither --config, model.path nor data.path says what to train",
        fix=f"did you mean output_dir={folder.path.parent / near[0]}?" if near else start,
    )


def dry_run(job: Job) -> int:
    """Prints what the run would do. Writes nothing but the demo's model into the cache."""
    from qlora_jax.nf4.environment import check_environment
    from qlora_jax.training.preparation import marked_example, prepare
    from qlora_jax.training.starting_adapter import with_adapter

    check_environment()
    with tempfile.TemporaryDirectory() as scratch:
        config = with_adapter(with_model(job.config))
        if job.builds_rows:
            config = with_rows(config, *demo.write_demo_rows(Path(scratch)))
        prepared = prepare(config)
    colour = sys.stdout.isatty()
    print(prepared.plan)
    print(f"\nthe first row; {'green' if colour else 'what stands in [[ ]]'} is trained:\n")
    print(marked_example(prepared.tokenizer, prepared.dataset.train[0], colour=colour))
    return 0


def train(job: Job) -> int:
    """Trains, reports, and says what to type next."""
    from qlora_jax.nf4.environment import check_environment
    from qlora_jax.training.preparation import prepare
    from qlora_jax.training.progress import Progress
    from qlora_jax.training.starting_adapter import with_adapter

    check_environment()
    progress = Progress(every=job.config.log.every)
    folder, config = job.folder, with_adapter(with_model(job.config, progress.say))
    if config.resume and not folder.config_path.exists():
        progress.say(f"{folder.path} holds no run yet: starting at step 0")
        config = config.model_copy(update={"resume": False})
    with contextlib.ExitStack() as stack:
        stack.callback(progress.finish)
        try:
            if job.builds_rows:
                stack.enter_context(folder.locked())
                config = with_rows(config, folder.data / "train.jsonl", folder.data / "eval.jsonl")
                folder.create(config)
                demo.write_demo_rows(folder.data)
            prepared = prepare(config)
            progress.say(prepared.plan)
            if not job.builds_rows:
                stack.enter_context(folder.locked())
                folder.create(config)
            return _train(config, folder, prepared, progress)
        except BaseException as error:
            folder.discard()
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(_kept(folder)) from None
            if _disk_is_full(error):
                raise _disk_full(folder) from error
            raise


def _train(config: TrainConfig, folder: RunFolder, prepared: "Prepared", progress: "Progress") -> int:
    from qlora_jax.training.loop import NonFiniteLossError, run_training
    from qlora_jax.training.report import sample_table, summary

    try:
        result = run_training(config, folder, progress=progress, prepared=prepared)
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if result.already_finished:
        folder.discard()
        return 0
    if result.interrupted:
        saved = f"interrupted: step {result.steps} of {prepared.steps} is saved"
        progress.say(f"{saved}. To go on:\n  {_resume_command(folder)}")
        return INTERRUPTED
    if result.samples:
        progress.say(f"\nheld-out prompts, before and after\n\n{sample_table(result.samples)}")
    # Without --prompt it holds a conversation.
    question = ["--prompt", result.samples[0].prompt] if result.samples else []
    command = command_line("generate", "--run", str(folder.path), *question)
    progress.say(f"\n{summary(folder, result)}\n\nask it something:\n  {command}")
    return 0


def _kept(folder: RunFolder) -> str:
    """What to say after a Ctrl-C that could not be met by saving."""
    if not folder.config_path.exists():
        return "interrupted before the first step; nothing is kept"
    return f"interrupted before it could save; earlier checkpoints are intact. To go on:\n  {_resume_command(folder)}"


def _resume_command(folder: RunFolder) -> str:
    return command_line("train", f"output_dir={folder.path}", "resume=true")


def _disk_full(folder: RunFolder) -> UserError:
    kept = folder.config_path.exists()
    return UserError(
        f"the disk of output_dir={folder.path} is full",
        why="a run writes checkpoints, metrics and its adapter there"
        + ("; what was written before is intact" if kept else ""),
        fix=f"free some space, then {_resume_command(folder)}" if kept else "output_dir=FOLDER on another disk",
    )


def _disk_is_full(error: BaseException) -> bool:
    """Orbax wraps the operating system's error in one of its own, and keeps its text only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return os.strerror(errno.ENOSPC) in str(error)


def with_model(config: TrainConfig, say: Callable[[str], None] = print) -> TrainConfig:
    """The demo's model where none is given; fetched if need be."""
    if config.model.path is not None:
        return config
    path = str(demo.fetch_demo_model(say))
    return config.model_copy(update={"model": config.model.model_copy(update={"path": path})})


def with_rows(config: TrainConfig, train_path: Path, eval_path: Path) -> TrainConfig:
    """The demo's rows."""
    rows = {"path": str(train_path.absolute()), "eval_path": str(eval_path.absolute()), "eval_split": None}
    return config.model_copy(update={"data": config.data.model_copy(update=rows)})


def _source(settings: dict[str, Setting], key: str) -> str:
    """Where a setting came from; "" where it was not given."""
    return settings[key].source if key in settings and settings[key].value is not None else ""


def _output_dir(settings: dict[str, Setting]) -> str:
    given = settings.get("output_dir")
    return str(given.value) if given is not None else TrainConfig.model_fields["output_dir"].default


if __name__ == "__main__":
    code = main()
    if code == INTERRUPTED:
        # Where a second Ctrl-C stopped a save, Orbax's threads would print tracebacks while the interpreter shuts down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
