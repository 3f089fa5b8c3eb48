"""The digest that names the weights a run was trained on."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def sha256_of(files: Iterable[Path]) -> str:
    """sha256 (hex) of the files' bytes, one after the other: what `cat FILES | sha256sum` prints."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
