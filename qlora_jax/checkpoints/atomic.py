"""Folders that appear whole or not at all."""

import contextlib
import fcntl
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
    _clear_leftovers(folder)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-writing-", dir=folder.parent))
    lock = _lock(staging)
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
        if lock is not None:
            os.close(lock)


def check_unused(folder: Path, *, option: str) -> None:
    """Whether a new folder can be written there. Touches nothing.

    Args:
      folder: the output folder.
      option: what a user names it by.

    Raises:
      UserError: it is, or lies under, a file; it holds something; or its parent cannot be written to.
    """
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            where = "is a file" if place == folder else f"lies under {place}, which is a file"
            raise UserError(f"{option} {folder} {where}", why="a folder is written", fix="name another folder")
    if folder.exists() and any(folder.iterdir()):
        number = 2
        while (other := folder.with_name(f"{folder.name}-{number}")).exists():
            number += 1
        raise UserError(
            f"{option} {folder} is not empty",
            why="nothing that is there is replaced or mixed with new files",
            fix=f"name another folder, such as {other}, or delete this one",
        )
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(nearest, os.W_OK):
        raise UserError(f"{option} {folder} cannot be written", why=f"no permission to write in {nearest}")


def _clear_leftovers(folder: Path) -> None:
    """Removes what processes that were killed left beside a folder; one that still writes holds a lock on its own."""
    for leftover in folder.parent.glob(f".{folder.name}-writing-*"):
        if not leftover.is_dir() or not {path.name for path in leftover.iterdir()} <= {"new", "old"}:
            continue
        lock = _lock(leftover)
        if lock is None:
            continue
        if (leftover / "old").exists() and not folder.exists():  # killed between the two renames
            (leftover / "old").rename(folder)
        shutil.rmtree(leftover, ignore_errors=True)
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that keeps others from locking the folder until it is closed; None: it is locked, or cannot be."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def sync(path: Path) -> None:
    """Brings a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
