"""`python donation.py plain|paged`: steps that donate state in host memory; "right" for each with the right results.

Run apart from the tests: where donation goes wrong the process aborts.
"""

import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.optim import paged_jit

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
SHAPE = (8, 30, 16)


def values() -> dict[str, Any]:
    """Parameters, state and updates of one shape, which is what jit pairs buffers by."""
    p, s, u = (jnp.full(SHAPE, x) for x in (1.0, 2.0, 4.0))
    return {"p": p, "s": jax.device_put(s, HOST), "u": u}


def step(order: str, results: str, *args: Any) -> tuple[Any, ...]:
    given = dict(zip(order, args, strict=True))
    s = jax.device_put(given["s"], DEVICE) + given["u"]
    out = {"p": given["p"] - s, "s": jax.device_put(s, HOST)}
    return tuple(out[name] for name in results)


def run(how: str, order: str, results: str, donated: str) -> None:
    args = [values()[name] for name in order]
    donate = tuple(order.index(name) for name in donated)
    fun = lambda *args: step(order, results, *args)  # noqa: E731
    jitted = paged_jit(fun, *args, donate_argnums=donate) if how == "paged" else jax.jit(fun, donate_argnums=donate)
    out = dict(zip(results, jitted(*args), strict=True))
    kinds = {name: array.sharding.memory_kind for name, array in out.items()}
    if (
        kinds == {"p": "device", "s": "pinned_host"}
        and np.all(out["p"] == -5.0)
        and np.all(np.asarray(out["s"]) == 6.0)
    ):
        print("right", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "plain":
        run("plain", "psu", "ps", "s")
    else:
        for order in map("".join, itertools.permutations("psu")):
            for results, donated in itertools.product(("ps", "sp"), ("s", "p", "ps", "us")):
                run("paged", order, results, donated)
