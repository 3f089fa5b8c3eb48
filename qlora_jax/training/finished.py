"""What a run left behind: its settings, its adapter, and the model that it was trained on."""

import difflib
from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import ValidationError

from qlora_jax.errors import UserError
from qlora_jax.training import demo
from qlora_jax.training.commands import command_line
from qlora_jax.training.config import TrainConfig

_DEMO_NAME = "smollm2-demo"


def read_run(folder: Path, *, option: str = "--run") -> TrainConfig:
    """The configuration of a run.

    Args:
      folder: of the run.
      option: what a user names it by.

    Raises:
      UserError: no such folder (with the nearest run beside it), no run in it, or a config.yaml that is none.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        beside = [path.parent.name for path in folder.parent.glob("*/config.yaml")] if folder.parent.is_dir() else []
        close = difflib.get_close_matches(folder.name, beside, n=1, cutoff=0.4)
        raise UserError(
            f"no run at {folder}",
            why=f"{file} does not exist" if folder.exists() else "there is no such folder",
            fix=f"did you mean {option} {folder.parent / close[0]}?"
            if close
            else f"{option} FOLDER, as training printed it",
        )
    try:
        return TrainConfig.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        first = error.errors()[0]["msg"] if isinstance(error, ValidationError) else " ".join(str(error).split())
        raise UserError(f"{file} is not the configuration of a run", why=first) from error


def finished_adapter(folder: Path, *, otherwise: str = "") -> Path:
    """The adapter of a run.

    Args:
      folder: of the run.
      otherwise: what else a user could do.

    Raises:
      UserError: it is not written yet.
    """
    adapter = folder / "adapter"
    if not (adapter / "adapter_config.json").is_file():
        resume = command_line("train", f"output_dir={folder}", "resume=true")
        raise UserError(
            f"the run {folder} has no adapter yet",
            why=f"{adapter} is written when training ends",
            fix=f"{resume}   to finish it{', or ' + otherwise if otherwise else ''}",
        )
    return adapter


def base_model(path: str | None, say: Callable[[str], None]) -> str:
    """The model's path; the demo's is fetched where it is not in its place (another machine, an emptied cache)."""
    name = Path(demo.MODEL_MEMBER).name
    if path is None or path == _DEMO_NAME or (Path(path).name == name and not Path(path).exists()):
        return str(demo.fetch_demo_model(say))
    return path
