"""Calls of peer_main.py: a QLoRA step in transformers, PEFT and bitsandbytes, on the CPU.

NF4 with double quantization, float32 adapters under bfloat16 autocast, AdamW, the gradient's norm clipped. The model
stays in train() mode, and no activations are recomputed.
"""

import platform
import time
from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import transformers
from torch.nn import functional

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class State:
    """A model in training, and the batch of its next step."""

    model: Any = None
    optimizer: Any = None
    trainable: Sequence[torch.Tensor] = ()
    clip: float = 1.0
    batch: dict[str, torch.Tensor]


def start(threads: int) -> dict[str, str]:
    """Returns the versions."""
    torch.set_num_threads(threads)
    libraries = {module.__name__: module.__version__ for module in (torch, transformers, peft, bnb)}
    return {"python": platform.python_version(), **libraries}


def build(
    folder: str | None, config: dict[str, Any], rank: int, alpha: float, learning_rate: float, clip: float
) -> dict[str, Any]:
    """Makes the model: of an HF folder, else with random weights from HF's keys of a LLaMA.

    Returns:
      `trainable`: how many numbers are trained.
    """
    torch.manual_seed(0)
    model: Any
    if folder is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).bfloat16()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in LINEARS:
            parent, leaf = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), leaf, _quantized(module))
    model.is_loaded_in_4bit = True
    lora = peft.LoraConfig(r=rank, lora_alpha=int(alpha), target_modules=LINEARS, task_type="CAUSAL_LM")
    State.model = peft.get_peft_model(model, lora).train()
    State.trainable = [parameter for parameter in State.model.parameters() if parameter.requires_grad]
    State.optimizer = torch.optim.AdamW(State.trainable, lr=learning_rate, weight_decay=0.0)
    State.clip = clip
    return {"trainable": sum(parameter.numel() for parameter in State.trainable)}


def load_batch(rows: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> None:
    """Takes token ids and which of them are trained, a pair for each row; pads to the longest row."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    labels, attention = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (tokens, trained) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        labels[i, : len(tokens)] = torch.where(torch.tensor(trained), torch.tensor(tokens), -100)
        attention[i, : len(tokens)] = 1
    State.batch = {"input_ids": ids, "labels": labels, "attention_mask": attention}


def seconds(name: str, times: int) -> float:
    """How long so many optimizer steps on the batch take. `name`: how the loss is computed.

    "peft": by the model, from `labels`. "peft_answers": through the head at the trained positions alone.
    """
    began = time.perf_counter()
    for _ in range(times):
        step(name)
    return time.perf_counter() - began


def step(name: str) -> float:
    """One optimizer step; the loss before it."""
    State.optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = State.model(**State.batch).loss if name == "peft" else _answers_loss()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(State.trainable, State.clip)
    State.optimizer.step()
    return float(loss)


CALLS = {call.__name__: call for call in (start, build, load_batch, seconds, step)}  # type: ignore[attr-defined]


def _answers_loss() -> torch.Tensor:
    base = State.model.get_base_model()
    batch = State.batch
    hidden = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    trained = batch["labels"][:, 1:] != -100
    logits = base.lm_head(hidden[:, :-1][trained]).float()
    return functional.cross_entropy(logits, batch["labels"][:, 1:][trained])


def _quantized(linear: torch.nn.Linear) -> torch.nn.Module:
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
    )
    layer.weight = bnb.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    return layer.to("cpu")
