"""Folders that appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qlora_jax.errors import UserError


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to fill; when the block ends it takes the place of `folder`, on disk.

    Where the block raises, `folder` stays as it was. Where it exists, it is renamed aside before the new one is renamed
    into place, and deleted after: at no moment does it hold files of both.

    Raises:
      UserError: the path, or a folder above it, is a file.
    """
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise FileExistsError
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} cannot be written",
            why="the path, or a folder above it, is a file",
            fix="output_dir=ANOTHER FOLDER",
        ) from error
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        filled, aside = staging / "new", staging / "old"
        filled.mkdir()
        yield filled
        for path in [*filled.rglob("*"), filled]:
            sync(path)
        if folder.exists():
            folder.rename(aside)
        try:
            filled.rename(folder)
        except BaseException:
            if aside.exists():
                aside.rename(folder)
            raise
        sync(folder.parent)
    finally:
        shutil.rmtree(staging)


def sync(path: Path) -> None:
    """Brings a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
