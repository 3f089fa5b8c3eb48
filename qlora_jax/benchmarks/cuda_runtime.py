"""CUDA's runtime and cuBLAS through ctypes: work that XLA does not do, recorded as a CUDA graph and timed like XLA's.

They are libraries of JAX's own CUDA wheels (or of a toolkit), so nothing else has to be installed. Device pointers are
those of JAX arrays: XLA and the runtime use one context, the device's primary one.
"""

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.errors import UserError

# Values of CUDA's enumerations.
_NON_BLOCKING_STREAM = 1
_RELAXED_CAPTURE = 2
_COPY_BY_ADDRESS = 4  # cudaMemcpyDefault
_DATA_TYPES = {"bfloat16": 14, "float16": 2, "float32": 0}
_COMPUTE_FLOAT32 = 68
_DEFAULT_ALGORITHM = -1
_NOT_TRANSPOSED, _TRANSPOSED = 0, 1
# What NVIDIA advises for Hopper; without one of its own cuBLAS would allocate while a graph is recorded.
_WORKSPACE_BYTES = 32 * 2**20


def load_library(name: str, folders: Sequence[Path] = ()) -> ctypes.CDLL:
    """A shared library from the given folders, else from NVIDIA's pip wheels, else as the system finds it.

    Libraries that are loaded later and need one of this name get this one.

    Raises:
      OSError: none loads.
    """
    spec = importlib.util.find_spec("nvidia")
    wheels = [Path(place) for place in (spec.submodule_search_locations if spec else None) or ()]
    found = [folder / name for folder in folders]
    found += [file for place in wheels for file in sorted(place.glob(f"*/lib/{name}"))]
    for file in found:
        if file.exists():
            return ctypes.CDLL(str(file))
    return ctypes.CDLL(name)


class CudaRuntime:
    """A stream of its own, and what can be put on it.

    Args:
      major: of the CUDA release, 12 or 13.
      folders: looked in first.

    Raises:
      UserError: the libraries are not there, or there is no GPU.
    """

    def __init__(self, major: int, folders: Sequence[Path] = ()) -> None:
        try:
            self._cuda = load_library(f"libcudart.so.{major}", folders)
            # cuBLAS is bound to cublasLt when it is loaded.
            load_library(f"libcublasLt.so.{major}", folders)
            self._cublas = load_library(f"libcublas.so.{major}", folders)
        except OSError as error:
            raise UserError(
                "CUDA's runtime or cuBLAS cannot be loaded", why=str(error), fix=f"pip install 'jax[cuda{major}]'"
            ) from error
        self._cuda.cudaGetErrorString.restype = ctypes.c_char_p
        self._cuda.cudaMemcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._stream = ctypes.c_void_p()
        try:
            self._call("cudaStreamCreateWithFlags", ctypes.byref(self._stream), _NON_BLOCKING_STREAM)
        except RuntimeError as error:
            raise UserError(
                "CUDA does not run here", why=str(error), fix="python -m qlora_jax.doctor says more"
            ) from error
        self._handle = ctypes.c_void_p()
        self._blas("cublasCreate_v2", ctypes.byref(self._handle))
        self._blas("cublasSetStream_v2", self._handle, self._stream)
        self._workspace = jax.block_until_ready(jax.numpy.zeros(_WORKSPACE_BYTES, np.uint8))
        workspace = ctypes.c_void_p(pointer(self._workspace))
        self._blas("cublasSetWorkspace_v2", self._handle, workspace, ctypes.c_size_t(_WORKSPACE_BYTES))

    @property
    def stream(self) -> ctypes.c_void_p:
        return self._stream

    def wait(self) -> None:
        """For the stream; an error of an earlier kernel shows here."""
        self._call("cudaStreamSynchronize", self._stream)

    def wait_for_device(self) -> None:
        """For all streams."""
        self._call("cudaDeviceSynchronize")

    def read(self, array: jax.Array) -> np.ndarray:
        """What lies in an array's buffer now: JAX does not know that a kernel of others wrote there."""
        values = np.empty(array.shape, array.dtype)
        target = values.ctypes.data_as(ctypes.c_void_p)
        self._call("cudaMemcpy", target, pointer(array), ctypes.c_size_t(values.nbytes), _COPY_BY_ADDRESS)
        return values

    def multiply(
        self, x: int, weight: int, y: int, rows: int, features: int, outputs: int, *, dtype: str, by_rows: bool
    ) -> None:
        """cuBLAS on the stream: y `[rows, outputs]` = x `[rows, features]` times a weight.

        Args:
          x, weight, y: device pointers.
          by_rows: the weight is `[outputs, features]`, else `[features, outputs]`.
        """
        # cuBLAS counts by columns: what it computes is the transpose of everything.
        transpose = _TRANSPOSED if by_rows else _NOT_TRANSPOSED
        one, zero, kind = ctypes.c_float(1), ctypes.c_float(0), _DATA_TYPES[dtype]
        self._blas(
            "cublasGemmEx",
            self._handle,
            *(transpose, _NOT_TRANSPOSED, outputs, rows, features),
            ctypes.byref(one),
            *(ctypes.c_void_p(weight), kind, features if by_rows else outputs),
            *(ctypes.c_void_p(x), kind, features),
            ctypes.byref(zero),
            *(ctypes.c_void_p(y), kind, outputs),
            *(_COMPUTE_FLOAT32, _DEFAULT_ALGORITHM),
        )

    def add(self, scaled: float, ones: int, sums: int, size: int) -> None:
        """cuBLAS on the stream: float32 sums `[size]` += scaled * ones."""
        factor, one = ctypes.c_float(scaled), 1
        vectors = (ctypes.c_void_p(ones), one, ctypes.c_void_p(sums), one)
        self._blas("cublasSaxpy_v2", self._handle, size, ctypes.byref(factor), *vectors)

    def record(self, put: Callable[[], None]) -> "CudaGraph":
        """What `put` puts on the stream, as a graph; done once beforehand, so that kernels are loaded."""
        put()
        self.wait()
        self._call("cudaStreamBeginCapture", self._stream, _RELAXED_CAPTURE)
        try:
            put()
        finally:
            graph = ctypes.c_void_p()
            self._call("cudaStreamEndCapture", self._stream, ctypes.byref(graph))
        executable = ctypes.c_void_p()
        self._call("cudaGraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        self._call("cudaGraphDestroy", graph)
        return CudaGraph(self, executable)

    def launch(self, graph: ctypes.c_void_p) -> None:
        self._call("cudaGraphLaunch", graph, self._stream)

    def forget(self, graph: ctypes.c_void_p) -> None:
        self._call("cudaGraphExecDestroy", graph)

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._cuda, name)(*arguments):
            raise RuntimeError(f"{name}: {self._cuda.cudaGetErrorString(code).decode()}")

    def _blas(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._cublas, name)(*arguments):
            raise RuntimeError(f"{name}: cuBLAS status {code}")


class CudaGraph:
    """A recorded graph; freed with the object."""

    def __init__(self, runtime: CudaRuntime, executable: ctypes.c_void_p) -> None:
        self._runtime, self._executable = runtime, executable

    def run(self, times: int) -> None:
        """Launches the graph that often and waits."""
        for _ in range(times):
            self._runtime.launch(self._executable)
        self._runtime.wait()

    def __del__(self) -> None:
        self._runtime.forget(self._executable)


def pointer(array: jax.Array) -> int:
    """Address of an array's buffer on its device."""
    return int(array.unsafe_buffer_pointer())
