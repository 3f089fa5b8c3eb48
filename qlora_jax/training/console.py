"""How doors print: libraries kept quiet, any text printable, mistakes and faults told apart."""

import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from qlora_jax.errors import UserError, UserErrors


def exit_code(
    act: Callable[[list[str]], None], arguments: Sequence[str] | None, *, interrupted: str = "interrupted"
) -> int:
    """Runs a door that is asked for one thing, and says how it ended.

    Args:
      act: does it, given the arguments.
      arguments: None: those of the command line.
      interrupted: what is printed after Ctrl-C.

    Returns:
      0, 2 (a user's mistake), 130 (interrupted), 141 (stdout was closed, as a shell has it) or 1 (anything else).
    """
    prepare_console()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        act(given)
    except UserError as error:
        return report_mistakes(error, debug="--debug" in given)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads stdout has had enough, such as `head`
        # What is still buffered would else be written at exit, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception:
        return report_fault()
    return 0


def report_mistakes(error: UserError, *, debug: bool = False) -> int:
    """Prints a user's mistakes, with the traceback only where asked for; returns the exit code 2."""
    if debug:
        traceback.print_exc()
    for mistake in error.errors if isinstance(error, UserErrors) else [error]:
        print(f"error: {mistake}", file=sys.stderr)
    return 2


def report_fault() -> int:
    """Prints the exception being handled as ours; returns the exit code 1."""
    traceback.print_exc()
    print("error: a fault of qlora_jax, not of your settings; please report the lines above", file=sys.stderr)
    return 1


def prepare_console() -> None:
    """To be called before libraries are imported. Their errors still arrive, as exceptions."""
    # "PyTorch was not found": transformers is here for its tokenizers, which do without.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Orbax logs the traceback of each thread whose write failed, and then raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # A model may answer in any script; a terminal that cannot show it must not end a run.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
