"""The same finetuning in transformers + PEFT + bitsandbytes, on the CPU: what our losses are compared with.

    python tests/real/peft_peer.py --model HF_FOLDER --rows FOLDER --weights nf4 --seed 0 --steps 40 --eval-at 0 40

`--rows` holds train.jsonl and eval.jsonl with `instruction` and `output`. Prints one JSON object: eval losses by step,
the median step time, versions. The settings are those of compare_with_peft.py. The model stays in train() mode:
bitsandbytes' CPU inference path repacks its weights in place.
"""

import argparse
import json
import random
import time
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
END_OF_TURN = "<|im_end|>"


def build_model(folder: str, weights: str, rank: int, alpha: int):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if weights == "nf4":
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name.rsplit(".", 1)[-1] in LINEARS:
                quantized = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                quantized.weight = bnb.nn.Params4bit(
                    module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
                )
                parent, leaf = name.rsplit(".", 1)
                setattr(model.get_submodule(parent), leaf, quantized.to("cpu"))
        model.is_loaded_in_4bit = True
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=LINEARS, task_type="CAUSAL_LM")
    return get_peft_model(model, config).train()


def read_rows(path: Path, tokenizer, seq_len: int) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids) of the rows that fit."""
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        message = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
        answer = tokenizer(row["output"] + END_OF_TURN)
        if len(prompt["input_ids"]) + len(answer["input_ids"]) <= seq_len:
            rows.append((prompt["input_ids"], answer["input_ids"]))
    return rows


def loss_sum(model, rows, pad: int) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy and number of answer tokens; the head is computed at those positions only."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), width), pad)
    labels, attention = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
        attention[i, :end] = 1
    base = model.get_base_model()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = base.model(input_ids=ids, attention_mask=attention).last_hidden_state
        chosen = labels[:, 1:] != -100
        logits = base.lm_head(hidden[:, :-1][chosen]).float()
    return functional.cross_entropy(logits, labels[:, 1:][chosen], reduction="sum"), int(chosen.sum())


@torch.no_grad()
def evaluate(model, rows, pad: int) -> float:
    ordered = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    parts = [loss_sum(model, ordered[i : i + 32], pad) for i in range(0, len(ordered), 32)]
    return sum(float(loss) for loss, _ in parts) / sum(count for _, count in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--weights", choices=["nf4", "bf16"], required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--eval-at", type=int, nargs="+", default=[0, 40])
    parser.add_argument("--eval-rows", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=96)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--warmup-steps", type=int, default=10)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = build_model(arguments.model, arguments.weights, arguments.rank, arguments.alpha)
    train = read_rows(arguments.rows / "train.jsonl", tokenizer, arguments.seq_len)
    held_out = read_rows(arguments.rows / "eval.jsonl", tokenizer, arguments.seq_len)[: arguments.eval_rows]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=arguments.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)

    shuffle = random.Random(arguments.seed)
    order, position = list(range(len(train))), 0
    shuffle.shuffle(order)
    eval_loss, step_seconds = {}, []
    for step in range(arguments.steps + 1):
        if step in arguments.eval_at:
            eval_loss[step] = evaluate(model, held_out, tokenizer.pad_token_id)
        if step == arguments.steps:
            break
        if position + arguments.batch_size > len(order):
            shuffle.shuffle(order)
            position = 0
        batch = [train[i] for i in order[position : position + arguments.batch_size]]
        position += arguments.batch_size
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * min(1.0, (step + 1) / arguments.warmup_steps)
        loss, count = loss_sum(model, batch, tokenizer.pad_token_id)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trainable, arguments.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step_seconds.append(time.perf_counter() - started)
    versions = {"torch": torch.__version__, "bitsandbytes": bnb.__version__}
    print(
        json.dumps(
            {
                "eval_loss": eval_loss,
                "median_step_seconds": sorted(step_seconds)[len(step_seconds) // 2],
                "versions": versions,
            }
        )
    )


if __name__ == "__main__":
    main()
