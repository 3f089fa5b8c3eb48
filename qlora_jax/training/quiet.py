"""What libraries would print between a door's own lines."""

import logging
import os


def quiet_libraries() -> None:
    """To be called before they are imported. Their errors still arrive, as exceptions."""
    # "PyTorch was not found": transformers is here for its tokenizers, which do without.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Orbax logs the traceback of each thread whose write failed, and then raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
