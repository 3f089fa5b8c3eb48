"""The GPUs that NVIDIA's driver shows, asked without JAX: they may be there although JAX has no plugin for them."""

import ctypes
from dataclasses import dataclass

# Values of CUdevice_attribute.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, compute capability ("9.0") and bytes of memory."""

    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True)
class Driver:
    """What the driver says: its newest CUDA release ("13.0") and GPUs, or why there are none."""

    cuda: str | None
    gpus: tuple[Gpu, ...]
    why_not: str | None


def ask_driver() -> Driver:
    """Initialises the driver in this process and makes no context: no memory of a GPU is taken."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Driver(None, (), "no NVIDIA driver is installed (libcuda.so.1 is not found)")
    version, count = ctypes.c_int(), ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if code := library.cuInit(0):
        return Driver(cuda, (), f"NVIDIA's driver does not start: {_name_of(library, code)}")
    library.cuDeviceGetCount(ctypes.byref(count))
    gpus = tuple(_gpu(library, ordinal) for ordinal in range(count.value))
    return Driver(cuda, gpus, None if gpus else "NVIDIA's driver shows no GPU (is CUDA_VISIBLE_DEVICES set?)")


def _gpu(library: ctypes.CDLL, ordinal: int) -> Gpu:
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(128), ctypes.c_size_t()
    library.cuDeviceGet(ctypes.byref(device), ordinal)
    library.cuDeviceGetName(name, len(name), device)
    library.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    library.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return Gpu(name.value.decode(), f"{major.value}.{minor.value}", memory.value)


def _name_of(library: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    library.cuGetErrorName(code, ctypes.byref(text))
    return text.value.decode() if text.value else f"error {code}"
