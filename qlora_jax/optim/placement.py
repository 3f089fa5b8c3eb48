"""Which optimizer state lives in host memory, and the moves between host and device."""

from typing import Any

import jax

HOST_KIND = "pinned_host"

# Below this size a transfer costs more than the bytes it frees, and empty arrays are refused by the GPU's host memory.
MIN_HOST_BYTES = 4096


def host_kind_available() -> bool:
    """Whether the default device can address pinned host memory, where `paged` puts optimizer state."""
    return any(memory.kind == HOST_KIND for memory in jax.devices()[0].addressable_memories())


def nbytes(array: Any) -> int:
    """Bytes of an array or of its abstract shape and dtype."""
    return int(array.size) * int(array.dtype.itemsize)


def lives_on_host(array: Any) -> bool:
    """True for state arrays that are worth paging; scalars, small and empty arrays stay on the device."""
    return array.ndim > 0 and nbytes(array) >= MIN_HOST_BYTES


def to_host(array: jax.Array) -> jax.Array:
    return jax.device_put(array, jax.memory.Space.Host)


def to_device(array: jax.Array) -> jax.Array:
    return jax.device_put(array, jax.memory.Space.Device)
