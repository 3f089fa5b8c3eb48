"""The environment variables that decide how weights are stored and multiplied, checked before anything is loaded."""

from collections.abc import Callable

from qlora_jax.errors import UserError, UserErrors
from qlora_jax.nf4.dispatch import CAPABILITY_VARIABLE, compute_capability
from qlora_jax.nf4.kernels import ENVIRONMENT_VARIABLE, asked_kernels, chosen_kernels
from qlora_jax.nf4.placement import LAYOUT_VARIABLE, device_layout


def check_environment() -> None:
    """Checks QLORA_JAX_KERNELS, QLORA_JAX_LAYOUT and QLORA_JAX_COMPUTE_CAPABILITY; empty ones count as unset.

    Raises:
      UserError: a variable holds a word that it does not know, or asks for kernels that this platform does not have.
        UserErrors where several do.
    """
    checks: tuple[tuple[str, Callable[[], object]], ...] = (
        (ENVIRONMENT_VARIABLE, asked_kernels),
        (LAYOUT_VARIABLE, lambda: device_layout((64, 64), 64, "cpu")),
        (CAPABILITY_VARIABLE, compute_capability),
    )
    mistakes = []
    for variable, check in checks:
        try:
            check()
        except ValueError as error:
            mistakes.append(UserError(str(error), fix=f"unset {variable}"))
    if not mistakes:
        try:
            chosen_kernels()
        except RuntimeError as error:
            fix = f"unset {ENVIRONMENT_VARIABLE}; python -m qlora_jax.doctor says which kernels are there"
            mistakes.append(UserError(str(error), fix=fix))
    if mistakes:
        raise mistakes[0] if len(mistakes) == 1 else UserErrors(mistakes)
