"""Training that goes on from an adapter which exists (`lora.adapter`): its rank, alpha and targets become the run's."""

from pathlib import Path

from qlora_jax.checkpoints.peft_reader import read_adapter_config
from qlora_jax.errors import UserError, UserErrors
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.settings import show


def with_adapter(config: TrainConfig) -> TrainConfig:
    """The configuration with lora.rank, lora.alpha and lora.dropout of the adapter that it starts from.

    Raises:
      UserErrors: no adapter there, one that is not supported, or a rank, alpha or targets given that are not its own.
    """
    lora = config.lora
    if lora.adapter is None:
        return config
    adapter = read_adapter_config(Path(lora.adapter))
    own = {"rank": adapter["r"], "alpha": float(adapter.get("lora_alpha", 8)), "dora": bool(adapter.get("use_dora"))}
    mistakes = [
        UserError(
            f"lora.{key}={show(getattr(lora, key))}, but the adapter {lora.adapter} has {show(value)}",
            why="training goes on from its factors as they are",
            fix=f"leave lora.{key} out, or lora.adapter=null for a fresh adapter",
        )
        for key, value in own.items()
        if key in lora.model_fields_set and getattr(lora, key) != value
    ]
    if lora.targets is not None:
        mistakes.append(
            UserError(
                f"lora.targets={show(lora.targets)}, but lora.adapter is given",
                why="the adapter says which layers it adapts",
                fix="leave lora.targets out",
            )
        )
    if mistakes:
        raise UserErrors(mistakes)
    if "dropout" not in lora.model_fields_set:
        own["dropout"] = float(adapter.get("lora_dropout") or 0.0)
    return config.model_copy(update={"lora": lora.model_copy(update=own)})
