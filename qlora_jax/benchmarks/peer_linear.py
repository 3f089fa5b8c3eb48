"""Calls of peer_main.py: one linear layer in torch and bitsandbytes, forward and input gradient, on the CPU."""

import importlib.util
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch


class State:
    """What is loaded: a weight, `copies` times in each form, and activations for it."""

    dense: Sequence[torch.Tensor] = ()  # [out, in]
    layers: Sequence[Any] = ()  # in train() mode
    repacked: Sequence[Any] = ()  # in eval() mode
    x: Sequence[torch.Tensor] = ()
    dy: Sequence[torch.Tensor] = ()
    runs: Mapping[str, Callable[[], torch.Tensor]] = MappingProxyType({})


def start(threads: int) -> dict[str, str]:
    """Returns the versions."""
    torch.set_num_threads(threads)
    return {"python": platform.python_version(), "torch": torch.__version__, "bitsandbytes": bnb.__version__}


def load_weight(path: str, copies: int) -> dict[str, Any]:
    """Takes a weight: bfloat16 bits, uint16 `[out, in]`.

    Returns:
      `eval_kernel`: what eval() mode multiplies with: "kernels" (of the package of that name), "bitsandbytes" (its own,
      on repacked weights), or None where there is neither and eval() does what train() does.
    """
    weight = _bfloat16(path)
    State.dense = State.layers = State.repacked = State.x = State.dy = ()
    State.runs = {}
    State.dense = [weight.clone() for _ in range(copies)]
    State.layers = [_linear(weight).train() for _ in range(copies)]
    State.repacked = [_linear(weight).eval() for _ in range(copies)]
    with torch.no_grad():
        for layer in State.repacked:  # repacks at the first call
            layer(torch.zeros(1, weight.shape[1], dtype=torch.bfloat16))
    if not getattr(State.repacked[0].weight.quant_state, "packing_format_for_cpu", False):
        return {"eval_kernel": None}
    return {"eval_kernel": "kernels" if importlib.util.find_spec("kernels") else "bitsandbytes"}


def load_activations(x: str, dy: str, float32_rows: int) -> None:
    """Takes bfloat16 bits, uint16 `[rows, in]` and `[rows, out]`; the float32 product takes the first rows of x."""
    copies = len(State.dense)
    State.x = [_bfloat16(x) for _ in range(copies)]
    State.dy = [_bfloat16(dy) for _ in range(copies)]
    State.runs = {
        "forward torch": _forward_dense,
        "forward bnb_train": lambda: _forward(State.layers),
        "forward bnb_eval": lambda: _forward(State.repacked),
        "dx torch": _dx_dense,
        "dx bnb_train": _prepare_dx(),
        "float32": _prepare_float32(float32_rows),
        "quantize": _quantize,
    }


def seconds(name: str, times: int) -> float:
    """How long so many runs take, one after another; each of them is as many products as there are copies."""
    run = State.runs[name]
    began = time.perf_counter()
    for _ in range(times):
        run()
    return time.perf_counter() - began


def save_result(name: str, path: str) -> None:
    """Writes the last product of a run, float32."""
    np.save(path, State.runs[name]().detach().float().numpy())


CALLS = {
    call.__name__: call
    for call in (start, load_weight, load_activations, seconds, save_result)  # type: ignore[attr-defined]
}


def _bfloat16(path: str) -> torch.Tensor:
    return torch.from_numpy(np.load(path).view(np.int16)).view(torch.bfloat16)


def _linear(weight: torch.Tensor) -> Any:
    """As bitsandbytes' users have it: NF4 with double quantization, computing in bfloat16."""
    out_features, in_features = weight.shape
    layer = bnb.nn.Linear4bit(
        in_features, out_features, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    return layer.to("cpu")


@torch.no_grad()
def _forward_dense() -> torch.Tensor:
    for x, weight in zip(State.x, State.dense, strict=True):
        y = torch.nn.functional.linear(x, weight)
    return y


@torch.no_grad()
def _forward(layers: Sequence[Any]) -> torch.Tensor:
    for x, layer in zip(State.x, layers, strict=True):
        y = layer(x)
    return y


@torch.no_grad()
def _dx_dense() -> torch.Tensor:
    for dy, weight in zip(State.dy, State.dense, strict=True):
        dx = dy @ weight
    return dx


def _prepare_dx() -> Callable[[], torch.Tensor]:
    """Graphs of forward passes, of which only the backward pass is run."""
    inputs = [x.clone().requires_grad_() for x in State.x]
    outputs = [layer(x) for x, layer in zip(inputs, State.layers, strict=True)]

    def run() -> torch.Tensor:
        for x, y, dy in zip(inputs, outputs, State.dy, strict=True):
            (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        return dx

    return run


def _prepare_float32(rows: int) -> Callable[[], torch.Tensor]:
    x, weight = State.x[0][:rows].float(), State.dense[0].float().T.contiguous()
    return lambda: x @ weight


def _quantize() -> torch.Tensor:
    for weight in State.dense:
        packed, _ = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return packed
