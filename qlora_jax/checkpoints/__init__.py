"""Checkpoints in and out: foreign formats (HF folders, GGUF files, PEFT adapters) and our own (Orbax)."""

from qlora_jax.checkpoints.source import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
