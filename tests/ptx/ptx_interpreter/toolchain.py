"""nvcc and its companions: found, run, and their results kept between runs.

The compiler of the pip wheels comes first, then CUDA_HOME's, then the PATH's.
"""

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
)
FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr")  # as xla_ffi builds its kernels
_INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]', re.M)


class ToolchainError(Exception):
    """A CUDA tool is missing or failed."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What ptxas gave one kernel: registers per thread, bytes of stack, static shared memory, constants and spills."""

    registers: int
    stack: int
    shared: int
    constant: int
    spill_stores: int
    spill_loads: int


def _folders() -> list[Path]:
    site = {Path(sysconfig.get_paths()[key]) for key in ("purelib", "platlib")}
    folders = [path / "nvidia" / "cu13" / "bin" for path in sorted(site)]
    if os.environ.get("CUDA_HOME"):
        folders.append(Path(os.environ["CUDA_HOME"]) / "bin")
    return folders


def find_tool(name: str) -> Path:
    """The path of nvcc, cuobjdump or another tool. Raises ToolchainError, naming the pip packages, if there is none."""
    for folder in _folders():
        if (folder / name).is_file():
            return folder / name
    found = shutil.which(name)
    if found:
        return Path(found)
    packages = PACKAGES if name == "nvcc" else (f"nvidia-cuda-{name}==13.*",)
    wanted = " ".join(f"'{package}'" for package in packages)
    raise ToolchainError(f"{name} was found neither in site-packages, CUDA_HOME nor PATH; pip install {wanted}")


@functools.cache
def nvcc_version() -> str:
    """The output of nvcc --version."""
    return _run([find_tool("nvcc"), "--version"]).stdout


def _run(command: Sequence[str | Path]) -> subprocess.CompletedProcess:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if result.returncode:
        raise ToolchainError(f"{' '.join(map(str, command))} failed:\n{result.stderr or result.stdout}")
    return result


def _cache_folder() -> Path:
    """Below the .pytest_cache of the project, or where that cannot be written, in the temporary folder."""
    root = next((path for path in Path(__file__).resolve().parents if (path / "pyproject.toml").is_file()), None)
    if root is not None:
        folder = root / ".pytest_cache" / "cuda"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            pass
        else:
            if os.access(folder, os.W_OK):
                return folder
    folder = Path(tempfile.gettempdir()) / f"qlora_jax_cuda_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def project_files(source: Path, include_dirs: Sequence[Path] = ()) -> list[Path]:
    """`source` and, sorted, every file that it includes and that lies beside its includer or in `include_dirs`."""
    source = source.resolve()
    found, queue = {source}, [source]
    while queue:
        current = queue.pop()
        for name in _INCLUDE.findall(current.read_text()):
            for folder in (current.parent, *include_dirs):
                candidate = (folder / name).resolve()
                if candidate.is_file():
                    if candidate not in found:
                        found.add(candidate)
                        queue.append(candidate)
                    break
    return sorted(found)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(source: Path, suffix: str, flags: Sequence[str], include_dirs: Sequence[Path]) -> Path:
    """The cached file that `nvcc flags source` makes, beside a .log of what the compiler said."""
    key = hashlib.sha256()
    for part in (nvcc_version(), suffix, *flags, *map(str, include_dirs)):
        key.update(part.encode() + b"\0")
    for path in project_files(source, include_dirs):
        key.update(str(path).encode() + b"\0" + path.read_bytes())
    target = _cache_folder() / f"{source.stem}-{key.hexdigest()[:24]}.{suffix}"
    if target.exists():
        return target
    with _locked(target.with_suffix(".lock")):
        if target.exists():
            return target
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            includes = [f"-I{folder}" for folder in include_dirs]
            result = _run([find_tool("nvcc"), f"-{suffix}", *flags, *includes, source.resolve(), "-o", made])
            log = made.with_suffix(".log")
            log.write_text(result.stderr + result.stdout)
            log.rename(target.with_suffix(".log"))
            made.rename(target)
    return target


def _flags(arch: str, defines: Sequence[str], flags: Sequence[str]) -> list[str]:
    return [f"-arch={arch}", *(f"-D{define}" for define in defines), *FLAGS, *flags]


def compile_ptx(
    sources: str | Path | Sequence[str | Path],
    arch: str,
    defines: Sequence[str] = (),
    include_dirs: Sequence[Path] = (),
    flags: Sequence[str] = (),
) -> str:
    """The PTX of one .cu file, or of several one after the other, for `arch` (sm_80, sm_90a, ...).

    defines: NAME or NAME=VALUE. Raises ToolchainError if nvcc is missing or refuses.
    """
    files = [sources] if isinstance(sources, str | Path) else list(sources)
    options = _flags(arch, defines, flags)
    return "\n".join(_build(Path(file), "ptx", options, include_dirs).read_text() for file in files)


def cubin(
    source: str | Path,
    arch: str,
    defines: Sequence[str] = (),
    include_dirs: Sequence[Path] = (),
    flags: Sequence[str] = (),
) -> Path:
    """The path of the machine code of one .cu file. Raises ToolchainError."""
    options = [*_flags(arch, defines, flags), "-Xptxas=-v,-warn-spills,-warn-lmem-usage"]
    return _build(Path(source), "cubin", options, include_dirs)


def ptxas_log(cubin_path: Path) -> str:
    """What nvcc and ptxas said while they made a cubin: registers, spills, warnings."""
    return cubin_path.with_suffix(".log").read_text()


def sass(cubin_path: Path) -> str:
    """The disassembly. Raises ToolchainError if cuobjdump is missing."""
    return _run([find_tool("cuobjdump"), "-sass", cubin_path]).stdout


def resource_usage(cubin_path: Path) -> dict[str, Resources]:
    """By kernel, from ptxas's own account."""
    usage = {}
    text = ptxas_log(cubin_path)
    for part in re.split(r"(?=Compiling entry function)", text)[1:]:
        name = re.match(r"Compiling entry function '([^']+)'", part)[1]

        def find(pattern: str, part: str = part) -> int:
            match = re.search(pattern, part)
            return int(match[1]) if match else 0

        usage[name] = Resources(
            registers=find(r"Used (\d+) registers"),
            stack=find(r"(\d+) bytes stack frame"),
            shared=find(r"(\d+) bytes smem"),
            constant=find(r"(\d+) bytes cmem\[0\]"),
            spill_stores=find(r"(\d+) bytes spill stores"),
            spill_loads=find(r"(\d+) bytes spill loads"),
        )
    return usage
