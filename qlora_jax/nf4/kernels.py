"""The compiled kernels: loading, registration with XLA, and the choice between them and pure JAX."""

import contextlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from types import ModuleType

import jax
import jax.numpy as jnp

# How a product runs on a CUDA GPU, and the attribute `route` of the two kernels that multiply.
ROUTES = ("skinny", "tile", "dequantize")
ROUTE_CODES = {"skinny": 0, "tile": 1}
CHOICES = ("auto", "ffi", "xla", *ROUTES)
ENVIRONMENT_VARIABLE = "QLORA_JAX_KERNELS"
# One target name for every platform: XLA picks the handler registered for the platform it compiles for.
MATMUL_TARGET = "qlora_jax_nf4_matmul"
MATMUL_DX_TARGET = "qlora_jax_nf4_matmul_dx"
# On the CPU alone.
QUANTIZE_TARGET = "qlora_jax_nf4_quantize"
ATTENTION_TARGET = "qlora_jax_causal_attention"
ATTENTION_GRADIENTS_TARGET = "qlora_jax_causal_attention_gradients"
OUTER_PRODUCT_TARGET = "qlora_jax_outer_product"
# On CUDA alone.
DEQUANTIZE_TARGET = "qlora_jax_nf4_dequantize"

_MODULES = {"cpu": "_cpu", "cuda": "_cuda"}
# The CUDA plugin takes what was registered for "CUDA", in capitals.
_FFI_PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}
# Any of them makes JAX know the platform "cuda".
_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# Part of the key of JAX's caches: a trace made under one choice is not taken for another.
_override = jax.make_user_context(default_value=None)


def load_module(name: str) -> ModuleType:
    """A compiled module ("_cpu", "_cuda", "_plan"): the one beside this package, else the one that pip installed.

    `python -m qlora_jax.train` inside a clone takes the clone's source folder, which holds no compiled libraries,
    although the installed package does.

    Raises:
      ImportError: it was not built (ModuleNotFoundError), or does not load.
    """
    module_name = f"qlora_jax._lib.{name}"
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as missing:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            stem = module_name.replace(".", "/")
            for file in importlib.metadata.files("qlora-jax") or ():
                if str(file).startswith(stem) and file.name.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES)):
                    spec = importlib.util.spec_from_file_location(module_name, str(file.locate()))
                    if spec is not None and spec.loader is not None:
                        module = importlib.util.module_from_spec(spec)
                        spec.loader.exec_module(module)
                        sys.modules[module_name] = module
                        return module
        raise missing


def _load() -> dict[str, str]:
    """Registers what was built; a module that is missing or does not load leaves its reason."""
    report = {}
    for platform, name in _MODULES.items():
        try:
            module = load_module(name)
            if platform == "cuda" and not any(map(importlib.util.find_spec, _CUDA_PLUGINS)):
                # Then no program is ever compiled for CUDA, and none needs to be traced for it.
                report[platform] = "not loaded: jax has no CUDA plugin here (pip install 'jax[cuda13]')"
                continue
            for target, capsule in module.registrations().items():
                jax.ffi.register_ffi_target(target, capsule, platform=_FFI_PLATFORMS[platform])
        except ModuleNotFoundError as missing:
            # Without a CUDA compiler only the CPU's library is built.
            report[platform] = "not built" if missing.name == f"qlora_jax._lib.{name}" else f"not loaded: {missing}"
        except Exception as error:
            report[platform] = f"not loaded: {error}"
        else:
            report[platform] = "loaded"
    return report


_REPORT = _load()


def kernel_report() -> dict[str, str]:
    """For "cpu" and "cuda": "loaded", "not built", or why the compiled kernels that were built are not there."""
    return dict(_REPORT)


def runs_on(compute_capability: str) -> bool:
    """Whether machine code for such a GPU was compiled in: of its generation and not newer, or exactly its own ("90a").

    Args:
      compute_capability: such as "9.0".
    """
    major, minor = compute_capability.split(".")
    names = load_module("_cuda").architectures().split(", ")
    return f"{major}{minor}a" in names or any(
        name[:-1] == major and name[-1] <= minor for name in names if name.isdecimal()
    )


def cuda_kernels_loaded() -> bool:
    """Whether programs for CUDA GPUs can call the compiled kernels."""
    return _REPORT.get("cuda") == "loaded"


@contextlib.contextmanager
def use_kernels(choice: str) -> Iterator[None]:
    """Overrides the choice of kernels for what is traced inside the block.

    Args:
      choice: "ffi" (the compiled kernels), "xla" (dequantize and multiply in pure JAX) or "auto" (the compiled ones
        where they are loaded). On a CUDA GPU also one route for every product: "skinny", "tile" (the two kernels that
        multiply 4-bit weights) or "dequantize" (one launch, then XLA's product); what the weight or the activations
        do not allow is an error when it is compiled. On other platforms "dequantize" is "xla", and the other two are
        an error. A function that `jax.jit` has compiled already is compiled again where the choice differs.

    Raises:
      ValueError: another word.
    """
    with _override(_check(choice, "use_kernels")):
        yield


def asked_kernels() -> tuple[str, str]:
    """What was asked for, one of CHOICES, and by what: "use_kernels", the environment variable, or "default".

    Raises:
      ValueError: QLORA_JAX_KERNELS holds another word.
    """
    if _override.value is not None:
        return _override.value, "use_kernels"
    if given := os.environ.get(ENVIRONMENT_VARIABLE):
        return _check(given, ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE
    return "auto", "default"


def chosen_kernels(platform: str | None = None) -> str:
    """What runs on a platform: "ffi", "xla" or, on "cuda" alone, the one route that was asked for.

    Args:
      platform: "cpu", "cuda" or another name of XLA's; None: that of JAX's default backend.

    Raises:
      ValueError: QLORA_JAX_KERNELS holds another word.
      RuntimeError: compiled kernels were asked for that this platform does not have.
    """
    platform = platform or platform_name(jax.default_backend())
    choice, _ = asked_kernels()
    status = _REPORT.get(platform, f"no kernels were built for {platform}")
    if choice in ROUTES and platform != "cuda":
        if choice != "dequantize":
            raise RuntimeError(f"the {choice!r} kernel was asked for on {platform}, but it exists for CUDA GPUs only")
        return "xla"
    if choice in ("ffi", *ROUTES) and status != "loaded":
        raise RuntimeError(f"the compiled NF4 kernels were asked for on {platform}, but: {status}")
    if choice == "auto":
        return "ffi" if status == "loaded" else "xla"
    return choice


def cpu_kernels_asked() -> bool:
    """Whether programs for the CPU call the compiled kernels: they are loaded, and nothing else was asked for."""
    return _REPORT["cpu"] == "loaded" and asked_kernels()[0] in ("auto", "ffi")


def cpu_computes_in_tiles(dtype: jax.typing.DTypeLike) -> bool:
    """Whether programs for the CPU call compiled kernels that multiply tiles of `dtype` (AMX: bfloat16)."""
    return dtype == jnp.bfloat16 and cpu_kernels_asked() and load_module("_cpu").computes_in_tiles()


def platform_name(backend: str) -> str:
    """The platform's name in XLA's registry: JAX calls a CUDA backend and its devices "gpu"."""
    return "cuda" if backend == "gpu" else backend


def _check(choice: str, source: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice
