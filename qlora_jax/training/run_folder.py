"""The folder of a run: what is in it, when it may be written, and how its files survive a crash.

config.yaml  environment.json  metrics.jsonl  checkpoints/<step>/  adapter/  report.json  loss.png  tensorboard/
"""

import contextlib
import fcntl
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig

_PACKAGES = ("qlora-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
_VARIABLES = ("XLA_", "JAX_", "QLORA_")
_ELSEWHERE = "output_dir=FOLDER that can be written"


class RunFolder:
    """Paths and small files of one run. Making the object touches nothing on disk; `create` does."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._made: list[Path] = []
        self._replaced: dict[Path, bytes] = {}

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment_path(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def data(self) -> Path:
        """Rows that the run made for itself (the demo's)."""
        return self.path / "data"

    @property
    def samples_path(self) -> Path:
        return self.path / "samples.json"

    @property
    def report_path(self) -> Path:
        return self.path / "report.json"

    @property
    def plot_path(self) -> Path:
        return self.path / "loss.png"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def numbered_sibling(self) -> "RunFolder":
        """The first unused of PATH, PATH-2, PATH-3, ...; of PATH/run where PATH has no name of its own (".", "/")."""
        first = self.path if self.path.name not in ("", "..") else self.path / "run"
        number, path = 1, first
        while path.exists():
            number += 1
            path = first.with_name(f"{first.name}-{number}")
        return RunFolder(path)

    def check(self, *, resume: bool = False) -> None:
        """Whether a run may write here. Touches nothing.

        Raises:
          UserError: the path is, or lies under, a file; it cannot be written; or it is not empty and no run to resume.
        """
        for place in (self.path, *self.path.parents):
            if place.exists() and not place.is_dir():
                where = "is a file" if place == self.path else f"lies under {place}, which is a file"
                raise UserError(
                    f"output_dir={self.path} {where}",
                    why="a run needs a folder to write to",
                    fix=f"output_dir={place.with_name(place.stem + '-run')}",
                )
        nearest = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
        if not os.access(nearest, os.W_OK):
            raise UserError(
                f"output_dir={self.path} cannot be written", why=f"no permission to write in {nearest}", fix=_ELSEWHERE
            )
        used = self.path.exists() and any(self.path.iterdir())
        if used and not (resume and self.config_path.exists()):
            what = "holds a run" if self.config_path.exists() else "holds files, but no run"
            going_on = "resume=true to continue it, or " if self.config_path.exists() else ""
            raise UserError(
                f"output_dir={self.path} {what}",
                why="a new run would mix its files with those",
                fix=f"{going_on}output_dir={self.numbered_sibling().path}",
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and keeps other processes out of it. The lock ends with the process, however that ends.

        Raises:
          UserError: another process is training into it, or it cannot be made.
        """
        self._make()
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"output_dir={self.path} is in use",
                    why="another process is training into it",
                    fix=f"wait until it ends, or output_dir={self.numbered_sibling().path}",
                ) from error
            except OSError:
                pass  # a file system without locks
            yield
        finally:
            os.close(descriptor)

    def create(self, config: TrainConfig) -> None:
        """Makes the folder and writes config.yaml (resolved; `resume` always false) and environment.json.

        Raises:
          UserError: see `check`; or the folder cannot be made.
        """
        self.check(resume=config.resume)
        self._make()
        values = config.model_dump(mode="json") | {"resume": False}
        texts = {
            self.config_path: yaml.safe_dump(values, sort_keys=False),
            self.environment_path: json.dumps(describe_environment(), indent=2) + "\n",
        }
        self._replaced = {path: path.read_bytes() for path in texts if path.exists()}
        for path, text in texts.items():
            write_atomically(path, text)

    def discard(self) -> None:
        """Undoes what was made and written for a run, or a resumed one, that did not get to a line of metrics."""
        for path, content in self._replaced.items():
            write_atomically(path, content.decode())
        if self.path in self._made:
            shutil.rmtree(self.path)
        for place in self._made:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
        self._keep()

    def _make(self) -> None:
        for place in reversed([place for place in (self.path, *self.path.parents) if not place.exists()]):
            try:
                place.mkdir()
            except FileExistsError:  # made by another process in this moment
                continue
            except OSError as error:
                self.discard()
                raise UserError(f"output_dir={self.path} cannot be made", why=str(error), fix=_ELSEWHERE) from error
            self._made.insert(0, place)

    def _keep(self) -> None:
        """From here on `discard` has nothing to undo."""
        self._made, self._replaced = [], {}

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Writes one line to metrics.jsonl and flushes it. Keys whose value is None are left out.

        Raises:
          ValueError: a value is NaN or infinite, which JSON cannot hold.
        """
        text = json.dumps({key: value for key, value in line.items() if value is not None}, allow_nan=False)
        self._keep()
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint is never newer than its lines, also after a power cut

    def finished_at(self) -> int | None:
        """The last step of a run that ended and left its adapter and report; None: it did not, or they are gone."""
        if not (self.adapter / "adapter_config.json").exists() or not self.report_path.exists():
            return None
        return json.loads(self.report_path.read_text(encoding="utf-8")).get("steps")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line torn by a crash is left out.

        Raises:
          UserError: another line is not JSON.
        """
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_text(encoding="utf-8").split("\n")
        found = []
        for number, line in enumerate(lines[:-1], start=1):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{self.metrics_path}:{number} is not JSON: {line[:80]!r}", why=str(error)) from error
        return found

    def truncate_metrics(self, step: int) -> None:
        """Drops the lines past `step`, atomically: what a resumed run will write again."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        if self.metrics_path.exists():
            write_atomically(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file whole: a crash leaves the old one or the new one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def describe_environment() -> dict[str, Any]:
    """What a run's numbers depend on: versions, devices, which kernels are loaded and when each runs, the CPU."""
    import jax

    from qlora_jax.nf4 import dispatch_report, kernel_report

    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed as a distribution"
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "versions": versions,
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "kernels": kernel_report(),
        "dispatch": dispatch_report(),
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_VARIABLES)},
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
