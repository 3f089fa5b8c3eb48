"""The README.md that goes with an adapter."""

from pathlib import Path
from typing import Any

from qlora_jax import __version__


def readme(config: dict[str, Any], base_model: str, base_sha256: str, precision: str, folder: Path) -> str:
    """What the adapter is, what it belongs to, and how to load it.

    Args:
      config: adapter_config.json.
      base_model: folder, GGUF file or hub name of the base.
      base_sha256: sha256 of its weights.
      precision: how the base's weights were stored in training ("nf4, blocks of 64").
      folder: where the adapter lies.
    """
    gguf = base_model.endswith(".gguf")
    path = Path(base_model)
    base = f'"{path.parent}", gguf_file="{path.name}"' if gguf else f'"{base_model}"'
    weights = path.name if gguf else "*.safetensors"
    auto = "AutoModelForSeq2SeqLM" if config.get("task_type") == "SEQ_2_SEQ_LM" else "AutoModelForCausalLM"
    return f"""---
library_name: peft
---
# {"DoRA" if config.get("use_dora") else "LoRA"} adapter

Rank {config["r"]}, alpha {config["lora_alpha"]}, on {", ".join(config["target_modules"])}.

- Made by qlora_jax {__version__}
- Base model: `{base_model}`
- sha256 of its weights: `{base_sha256}` (`cat {weights} | sha256sum`)
- Its linear layers in training: {precision}

In PEFT:

```python
import peft, transformers
model = transformers.{auto}.from_pretrained({base}, dtype="bfloat16")
model = peft.PeftModel.from_pretrained(model, "{folder}")
tokenizer = transformers.AutoTokenizer.from_pretrained("{folder}")
```

In JAX:

```python
import qlora_jax
model = qlora_jax.load_adapter(qlora_jax.load_model("{base_model}"), "{folder}")
```
"""
