"""Text for perplexity that every machine has: the long docstrings of the running Python's standard library."""

import hashlib
import inspect

from qlora_jax.data.docstrings import scan_docstrings

MIN_CHARACTERS = 300


def long_docstrings() -> list[str]:
    """Every ASCII docstring of at least MIN_CHARACTERS once, below the first name that has it.

    In the order of a hash of that name, so that any beginning of the list is a mixture of modules.
    """
    names: dict[str, str] = {}
    for entry in scan_docstrings():
        doc = entry["doc"]
        if doc is not None and len(doc) >= MIN_CHARACTERS and doc.isascii():
            names.setdefault(inspect.cleandoc(doc), entry["name"])
    ordered = sorted(names.items(), key=lambda item: hashlib.sha256(item[1].encode()).hexdigest())
    return [f"{name}\n{doc}" for doc, name in ordered]
