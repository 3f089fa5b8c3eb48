"""The other end of `peers.py`: runs in a Python of its own, and makes calls that arrive as JSON lines.

    PYTHON -I peer_main.py peer_linear.py

A line `{"call": name, "arguments": {...}}` on standard input is answered by one line on standard output,
`{"result": ...}` or `{"error": "..."}`; the first answer says whether the file of calls could be loaded. This file and
the files of calls import nothing of qlora_jax, which that Python need not have.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


def main(file: str) -> None:
    # Libraries print, too: what was standard output becomes the answers', and theirs goes to standard error.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for answer in _answers(file):
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _answers(file: str) -> Iterator[dict[str, Any]]:
    try:
        calls = _load(file)
    except Exception as error:
        yield {"error": _short(error)}
        return
    yield {"result": None}
    for line in sys.stdin:
        question = json.loads(line)
        try:
            yield {"result": calls[question["call"]](**question["arguments"])}
        except Exception as error:
            yield {"error": _short(error)}


def _load(file: str) -> dict[str, Callable[..., Any]]:
    """The calls that a file offers. By path: its folder has modules named like libraries."""
    spec = importlib.util.spec_from_file_location("calls", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.CALLS  # type: ignore[no-any-return]


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


if __name__ == "__main__":
    main(sys.argv[1])
