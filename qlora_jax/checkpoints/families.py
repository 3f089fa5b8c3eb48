"""The decoder families that are read, by HF's model_type: what each means beside what its config.json says.

A family is what LLaMA is but for the differences listed here; `LlamaConfig` (models/config.py) says what each
difference does to the model.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type.

    Attributes:
      head: HF's class of the whole model.
      defaults: of keys that config.json may leave out: those of HF's configuration class.
      implied: of keys that no config.json of the family has, because HF's code has them built in.
      spellings: what the family calls keys of LLaMA's, by its own names.
      head_weight: name of the tensor of the head that is not tied.
      windows: which layers have `sliding_window`: "none" whatever config.json says, "all", "late": where
        use_sliding_window, those that layer_types says or those from max_window_layers on; or "patterned": those that
        layer_types says, or all but the last of each sliding_window_pattern.
      targets: what PEFT adapts where an adapter's target_modules is null.
    """

    head: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)
    head_weight: str = "lm_head.weight"
    windows: str = "none"
    targets: tuple[str, ...] = ("q_proj", "v_proj")


_QWEN: dict[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA: dict[str, Any] = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}

FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        windows="all",
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", _QWEN, {"attention_bias": True, "attention_output_bias": False}, windows="late"
    ),
    "qwen3": Family("Qwen3ForCausalLM", _QWEN | {"head_dim": 128}, {"qk_norm": True}, windows="late"),
    "gemma": Family(
        "GemmaForCausalLM",
        _GEMMA | {"num_key_value_heads": 16},
        # Of the activation the class takes no heed of what old files say.
        {"unit_offset": True, "scaled_embedding": True, "hidden_act": "gelu_pytorch_tanh"},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA
        | {
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        {"unit_offset": True, "scaled_embedding": True, "post_norms": True},
        spellings={"hidden_activation": "hidden_act"},
        windows="patterned",
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA
        | {
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0,
        },
        {"unit_offset": True, "scaled_embedding": True, "post_norms": True, "qk_norm": True},
        spellings={"hidden_activation": "hidden_act", "rope_local_base_freq": "local_rope_theta"},
        windows="patterned",
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        {"hidden_act": "gelu", "attention_bias": True, "rotary_pct": 0.25, "rotary_emb_base": 10000.0},
        spellings={"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
        head_weight="embed_out.weight",
        targets=("query_key_value",),
    ),
}
_LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")


def normalised(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json of a decoder with the keys that `Checkpoint.config` promises.

    Raises:
      TypeError, ValueError, AttributeError: a value of the wrong kind.
    """
    family = FAMILIES[raw.get("model_type", "llama")]
    defaults = _LLAMA_DEFAULTS | dict(family.defaults)
    config = defaults | raw | dict(family.implied)
    config |= {name: config[own] for own, name in family.spellings.items() if config.get(own) is not None}
    # transformers 5 writes rope_parameters = {rope_type, rope_theta, ...} and dtype; older versions wrote rope_theta,
    # rope_scaling = {type or rope_type, ...} and torch_dtype.
    rope = dict(config.pop("rope_parameters", None) or config.get("rope_scaling") or {})
    if "full_attention" in rope:  # one for each kind of layer
        local = rope.get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters of layers with a window: {local}")
        config["local_rope_theta"] = local.get("rope_theta", config.get("local_rope_theta"))
        rope = dict(rope["full_attention"] or {})
    rope_type = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta = rope.pop("rope_theta", None)
    if share := rope.pop("partial_rotary_factor", None):
        config["partial_rotary_factor"] = share
    config["rope_theta"] = float(theta if theta is not None else config["rope_theta"] or defaults["rope_theta"])
    config["rope_scaling"] = None if rope_type == "default" else {"rope_type": rope_type, **rope}
    dtype = config.pop("dtype", None) or config.get("torch_dtype") or "float32"
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    for key in _FLAGS:
        config[key] = bool(config.get(key, False))
    windowed = _windowed(config, family.windows)
    types = config.pop("layer_types", None)
    if types and set(types) - {_SLIDING, _FULL} and family.windows in ("late", "patterned"):
        raise ValueError(f"layer_types={types}: {_SLIDING} and {_FULL} are read")
    if not any(windowed):
        config.pop("sliding_window", None)
    elif not all(windowed):
        config["layer_types"] = [_SLIDING if slides else _FULL for slides in windowed]
    return config


def _windowed(config: dict[str, Any], windows: str) -> list[bool]:
    """Which layers see a window of tokens alone."""
    layers = range(config["num_hidden_layers"])
    off = windows == "late" and not config.get("use_sliding_window")
    if windows == "none" or off or config.get("sliding_window") is None:
        return [False for _ in layers]
    if windows == "all":
        return [True for _ in layers]
    if types := config.get("layer_types"):
        return [kind == _SLIDING for kind in types]
    if windows == "patterned":
        return [(layer + 1) % config["sliding_window_pattern"] != 0 for layer in layers]
    return [layer >= config["max_window_layers"] for layer in layers]
