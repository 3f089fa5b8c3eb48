"""Our own checkpoints: adapter, optimizer state, data position and the base's fingerprint. Never the base itself.

    FOLDER/<step>/arrays/           Orbax: the leaves of both trees, by name
    FOLDER/<step>/checkpoint.json   step, data, fingerprint; shape and dtype of each leaf; size of each file

A step is written beside its place and renamed into it when whole. So whatever ends the process, and whenever, a folder
whose name is a number is a complete step. The sizes find what was cut short later, by a full disk or a broken copy.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from qlora_jax.checkpoints.atomic import sync
from qlora_jax.errors import UserError
from qlora_jax.optim.placement import HOST_KIND, to_host

_STAGING, _DISCARDED = ".saving-", ".deleting-"
_TREES = ("adapter", "optimizer")


class CheckpointStore:
    """The checkpoints of one training run, one folder for each step.

    Args:
      folder: where they lie; made at the first save.
      keep: how many of the newest steps stay; None: all.
    """

    def __init__(self, folder: str | Path, *, keep: int | None = None) -> None:
        if keep is not None and keep < 1:
            raise UserError(f"keep={keep}", why="resuming needs at least one checkpoint", fix="keep=1, or more")
        self.folder = Path(folder).absolute()
        self.keep = keep

    def steps(self) -> list[int]:
        """The complete steps, oldest first."""
        if not self.folder.is_dir():
            return []
        numbered = (entry for entry in self.folder.iterdir() if entry.name.isdecimal())
        return sorted(int(entry.name) for entry in numbered if not _damage(entry))

    def latest(self) -> int | None:
        """The newest complete step; None where there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, *, adapter: Any, optimizer: Any, data: dict, fingerprint: dict) -> None:
        """Writes one step, then deletes those beyond `keep`. Returns when it is on disk.

        Args:
          step: number of optimizer steps done. A step that exists already is replaced.
          adapter, optimizer: pytrees of arrays, of any memory kind and sharding.
          data: position in the data; what `json` can write.
          fingerprint: what the state belongs to (the base's sha256, the dataset's); what `json` can write.

        Raises:
          UserError: the folder cannot be made.
          TypeError: data or fingerprint is nothing that `json` can write.
        """
        trees = {name: _named_leaves(tree) for name, tree in zip(_TREES, (adapter, optimizer), strict=True)}
        leaves = {name: {key: _describe(leaf) for key, leaf in tree.items()} for name, tree in trees.items()}
        record = {"step": step, "data": data, "fingerprint": fingerprint, "leaves": leaves}
        json.dumps(record)  # before anything is written
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"checkpoints cannot be written to {self.folder}",
                why="the path, or a folder above it, is a file",
                fix="output_dir=ANOTHER FOLDER",
            ) from error
        for leftover in self.folder.glob(".*-*"):  # of a process that was killed
            if leftover.name.startswith((_STAGING, _DISCARDED)):
                shutil.rmtree(leftover)
        staging = self.folder / f"{_STAGING}{step}"
        with _checkpointer() as checkpointer:
            checkpointer.save(staging / "arrays", args=ocp.args.StandardSave(trees))
        written = sorted(path for path in (staging / "arrays").rglob("*") if path.is_file())
        record["files"] = {str(path.relative_to(staging)): path.stat().st_size for path in written}
        with open(staging / "checkpoint.json", "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        place, replaced = self.folder / str(step), self.folder / f"{_DISCARDED}{step}"
        if place.exists():
            place.rename(replaced)
        staging.rename(place)
        sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        if self.keep is not None:
            self._discard(self.steps()[: -self.keep])

    def restore(self, step: int, *, adapter_like: Any, optimizer_like: Any) -> dict[str, Any]:
        """Reads one step back.

        Args:
          step: one of `steps()`.
          adapter_like, optimizer_like: trees of arrays or jax.ShapeDtypeStruct; the result has their structure,
            shardings and memory kinds, which may differ from those that were saved.

        Returns:
          {"adapter", "optimizer": trees, "data", "fingerprint": dicts}.

        Raises:
          UserError: no such complete step, or leaves of other names, shapes or dtypes than asked for.
        """
        place = self.folder / str(step)
        if damage := _damage(place):
            raise UserError(
                f"no complete checkpoint of step {step} in {self.folder}",
                why=damage,
                fix=f"complete steps: {', '.join(map(str, self.steps())) or 'none'}",
            )
        record = json.loads((place / "checkpoint.json").read_text(encoding="utf-8"))
        likes = {name: _named_leaves(tree) for name, tree in zip(_TREES, (adapter_like, optimizer_like), strict=True)}
        for name, tree in likes.items():
            _check(place, name, record["leaves"][name], tree)
        targets = jax.tree.map(_target, likes)
        with _checkpointer() as checkpointer:
            arrays = checkpointer.restore(place / "arrays", args=ocp.args.StandardRestore(targets))
        restored = {}
        for name, like in zip(_TREES, (adapter_like, optimizer_like), strict=True):
            leaves = [_typed_by_its_memory(arrays[name][key]) for key in likes[name]]
            restored[name] = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return {**restored, "data": record["data"], "fingerprint": record["fingerprint"]}

    def _discard(self, steps: Sequence[int]) -> None:
        """Deletes steps, renaming each first: a step half deleted must not look complete."""
        for step in steps:
            doomed = self.folder / f"{_DISCARDED}{step}"
            (self.folder / str(step)).rename(doomed)
            shutil.rmtree(doomed)


def _typed_by_its_memory(array: jax.Array) -> jax.Array:
    """JAX types an array that Orbax read into host memory as one in device memory, until it is put there again."""
    return to_host(array) if array.sharding.memory_kind == HOST_KIND else array


def _damage(place: Path) -> str | None:
    """What is wrong with the files of a step; None where all are there in the size in which they were written."""
    try:
        files = json.loads((place / "checkpoint.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{place / 'checkpoint.json'} cannot be read ({type(error).__name__})"
    for name, size in files.items():
        file = place / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes, {size} were written"
    return None


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.StandardCheckpointHandler())


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by dotted path: what a checkpoint holds does not depend on the classes of the tree's nodes."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}
    if len(named) != len(flat):
        raise ValueError("two leaves of the tree have the same path")
    return named


def _describe(leaf: Any) -> list:
    return [list(leaf.shape), str(leaf.dtype)]


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _check(place: Path, name: str, saved: dict[str, list], asked: dict[str, Any]) -> None:
    wrong = [f"{key}: not in the checkpoint" for key in asked if key not in saved]
    wrong += [f"{key}: only in the checkpoint" for key in saved if key not in asked]
    for key, leaf in asked.items():
        if key in saved and saved[key] != _describe(leaf):
            wrong.append(f"{key}: {saved[key]} in the checkpoint, {_describe(leaf)} asked for")
    if wrong:
        shown = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise UserError(
            f"the {name} in {place} does not fit this run: {shown}",
            why="a run resumes with the adapter and the optimizer it was started with",
            fix="resume with the run's own configuration, or start a new run in another output_dir",
        )
