"""What a door does to its process before it prints: libraries kept quiet, any text printable."""

import io
import logging
import os
import sys


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
