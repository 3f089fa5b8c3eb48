"""How much memory a run has needed."""

import resource
import sys

import jax


def peak_memory_bytes() -> int:
    """Peak bytes in use on the default device where its runtime counts them, else this process's peak resident size."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB, on macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
