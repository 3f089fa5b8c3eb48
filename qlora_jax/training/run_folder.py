"""The folder of a run: what is in it, when it may be written, and how its files survive a crash.

config.yaml  environment.json  metrics.jsonl  checkpoints/<step>/  adapter/  report.json  loss.png  tensorboard/
"""

import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig

_PACKAGES = ("qlora-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")
_VARIABLES = ("XLA_", "JAX_", "QLORA_")


class RunFolder:
    """Paths and small files of one run. Making the object touches nothing on disk; `create` does."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._made: list[Path] = []

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
        """The first unused of PATH, PATH-2, PATH-3, ..."""
        number, path = 1, self.path
        while path.exists():
            number += 1
            path = self.path.with_name(f"{self.path.name}-{number}")
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
            raise UserError(f"output_dir={self.path} cannot be written", why=f"no permission to write in {nearest}")
        used = self.path.exists() and any(self.path.iterdir())
        if used and not (resume and self.config_path.exists()):
            what = "holds a run" if self.config_path.exists() else "holds files, but no run"
            going_on = "resume=true to continue it, or " if self.config_path.exists() else ""
            raise UserError(
                f"output_dir={self.path} {what}",
                why="a new run would mix its files with those",
                fix=f"{going_on}output_dir={self.numbered_sibling().path}",
            )

    def create(self, config: TrainConfig) -> None:
        """Makes the folder and writes config.yaml (resolved; `resume` always false) and environment.json.

        Raises:
          UserError: see `check`.
        """
        self.check(resume=config.resume)
        self._made = [place for place in (self.path, *self.path.parents) if not place.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        values = config.model_dump(mode="json") | {"resume": False}
        write_atomically(self.config_path, yaml.safe_dump(values, sort_keys=False))
        write_atomically(self.environment_path, json.dumps(describe_environment(), indent=2) + "\n")

    def discard(self) -> None:
        """Undoes `create` for a run that never began. A folder that existed before, or has metrics, is left alone."""
        if self.path in self._made and not self.metrics_path.exists():
            shutil.rmtree(self.path)
            for parent in self._made:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
        self._made = []

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """Writes one line to metrics.jsonl and flushes it. Keys whose value is None are left out.

        Raises:
          ValueError: a value is NaN or infinite, which JSON cannot hold.
        """
        text = json.dumps({key: value for key, value in line.items() if value is not None}, allow_nan=False)
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

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
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def describe_environment() -> dict[str, Any]:
    """What a run's numbers depend on: versions, devices, which kernels are loaded, the CPU."""
    import jax

    from qlora_jax.nf4 import kernel_report

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
