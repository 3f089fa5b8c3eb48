"""Flax NNX modules over the 4-bit data type: dense layers, adapters, model surgery, scanned stacks."""

from qlora_jax.nn.adapters import add_lora, trainable
from qlora_jax.nn.dense import nf4_dense
from qlora_jax.nn.dora import attach_dora, dora_dense
from qlora_jax.nn.lora import lora_a_init
from qlora_jax.nn.report import QuantizeReport, Swap
from qlora_jax.nn.scan import scan_layers, scan_layers_with
from qlora_jax.nn.surgery import quantize_model
from qlora_jax.nn.variables import FrozenParam, NF4Param, ReplacedParam

__all__ = [
    "FrozenParam",
    "NF4Param",
    "QuantizeReport",
    "ReplacedParam",
    "Swap",
    "add_lora",
    "attach_dora",
    "dora_dense",
    "lora_a_init",
    "nf4_dense",
    "quantize_model",
    "scan_layers",
    "scan_layers_with",
    "trainable",
]
