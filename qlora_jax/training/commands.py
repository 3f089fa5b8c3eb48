"""Commands to paste: run by the interpreter that prints them."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def command_line(door: str, *arguments: str) -> str:
    """`python -m qlora_jax.DOOR ARGUMENTS`, quoted for a shell."""
    return shlex.join([interpreter(), "-m", f"qlora_jax.{door}", *arguments])


def interpreter() -> str:
    """The running Python: `python` or `python3` where the shell finds this very one, else its path.

    Links are not followed: the interpreters of two environments often are links to one file. A path below the current
    folder is relative (`.venv/bin/python`).
    """
    if not sys.executable:
        return "python"
    running = Path(os.path.abspath(sys.executable))
    for name in ("python", "python3"):
        found = shutil.which(name)
        if found is not None and Path(found).absolute().parent == running.parent and os.path.samefile(found, running):
            return name
    here = Path.cwd()
    # A name without a slash is looked for in PATH.
    below = running.parent != here and running.is_relative_to(here)
    return str(running.relative_to(here) if below else running)
