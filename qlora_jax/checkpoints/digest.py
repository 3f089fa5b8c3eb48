"""The digest that names the weights a run was trained on."""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def quantized_from(sha256: str, quant_type: str | None, block_size: int, double_quant: bool) -> str | None:
    """What names 4-bit weights by the weights they were made of: two such folders, or a folder and a model quantized
    while it is read, have the same bytes where this is the same. None: not in 4 bits.
    """
    scales = "double" if double_quant else "single"
    return None if quant_type is None else f"{sha256} {quant_type} {block_size} {scales}"


def sha256_of(files: Iterable[Path]) -> str:
    """sha256 (hex) of the files' bytes, one after the other: what `cat FILES | sha256sum` prints."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
