"""The kernels of xla_ffi/cuda, compiled and disassembled for every architecture."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ptx_interpreter import toolchain

from kernel_gates.sass import Kernel, parse

SOURCES = Path(__file__).parents[3] / "xla_ffi" / "cuda"
# Those of xla_ffi/cmake/CudaKernels.cmake, compiled with its flags.
ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120")
FLAGS = ("--expt-relaxed-constexpr",)
_PROCESSES = 2


@dataclass(frozen=True)
class Built:
    kernel: Kernel
    resources: toolchain.Resources


def compiler_version() -> str:
    return toolchain.nvcc_version().split(", V")[-1].split()[0]


def kernel_sources() -> list[Path]:
    """The files that define kernels: all but the one that launches them."""
    return sorted(path for path in SOURCES.glob("*.cu") if "cudaLaunchKernel" not in path.read_text())


def compile_kernels() -> dict[str, dict[str, Built]]:
    """Every kernel by architecture and name; two compilers at a time, results kept between runs.

    Raises:
      toolchain.ToolchainError: no CUDA compiler or disassembler, or a source that does not compile.
    """
    jobs = [(architecture, source) for architecture in ARCHITECTURES for source in kernel_sources()]
    result: dict[str, dict[str, Built]] = {architecture: {} for architecture in ARCHITECTURES}
    with ThreadPoolExecutor(_PROCESSES) as pool:
        for (architecture, _), built in zip(jobs, pool.map(lambda job: _compile(*job), jobs), strict=True):
            result[architecture] |= built
    return result


def _compile(architecture: str, source: Path) -> dict[str, Built]:
    cubin = toolchain.cubin(source, f"sm_{architecture}", flags=FLAGS)
    listing = cubin.with_suffix(".sass")
    if not listing.exists():
        unfinished = listing.with_suffix(f".{architecture}.part")
        unfinished.write_text(toolchain.sass(cubin))
        unfinished.replace(listing)
    usage = toolchain.resource_usage(cubin)
    return {name: Built(kernel, usage[name]) for name, kernel in parse(listing.read_text()).items()}
