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

CHOICES = ("auto", "ffi", "xla")
ENVIRONMENT_VARIABLE = "QLORA_JAX_KERNELS"
# One target name for every platform: XLA picks the handler registered for the platform it compiles for.
MATMUL_TARGET = "qlora_jax_nf4_matmul"
MATMUL_DX_TARGET = "qlora_jax_nf4_matmul_dx"

_MODULES = {"cpu": "qlora_jax._lib._cpu"}
# Part of the key of JAX's caches: a trace made under one choice is not taken for another.
_override = jax.make_user_context(default_value=None)


def _find(module_name: str) -> ModuleType:
    """The extension beside this package, else the one that pip installed.

    `python -m qlora_jax.train` inside a clone takes the clone's source folder, which holds no compiled libraries,
    although the installed package does.
    """
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
    for platform, module_name in _MODULES.items():
        try:
            module = _find(module_name)
            for target, capsule in module.registrations().items():
                jax.ffi.register_ffi_target(target, capsule, platform=platform)
        except Exception as error:
            report[platform] = f"not loaded: {error}"
        else:
            report[platform] = "loaded"
    return report


_REPORT = _load()


def kernel_report() -> dict[str, str]:
    """For each platform "loaded", or why its compiled kernels are not there."""
    return dict(_REPORT)


@contextlib.contextmanager
def use_kernels(choice: str) -> Iterator[None]:
    """Overrides the choice of kernels for what is traced inside the block.

    Args:
      choice: "ffi" (the compiled kernels), "xla" (dequantize and multiply in pure JAX) or "auto". A function that
        `jax.jit` has compiled already is compiled again where the choice differs.

    Raises:
      ValueError: another word.
    """
    with _override(_check(choice, "use_kernels")):
        yield


def chosen_kernels() -> str:
    """Either "ffi" or "xla": the override, else QLORA_JAX_KERNELS, else the compiled kernels where they serve.

    Raises:
      ValueError: QLORA_JAX_KERNELS holds another word.
      RuntimeError: "ffi" was asked for, and the kernels are not there.
    """
    choice = _override.value or _check(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE)
    platform = jax.default_backend()
    status = _REPORT.get(platform, f"no kernels were built for {platform}")
    if choice == "ffi" and status != "loaded":
        raise RuntimeError(f"the compiled NF4 kernels were asked for on {platform}, but: {status}")
    if choice == "auto":
        return "ffi" if status == "loaded" else "xla"
    return choice


def _check(choice: str, source: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice
