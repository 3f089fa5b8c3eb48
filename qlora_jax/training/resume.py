"""Where a run continues, and whether what it finds there is its own."""

import hashlib
from collections.abc import Callable, Mapping

from qlora_jax.checkpoints.state import CheckpointStore
from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.dataset import Dataset
from qlora_jax.training.run_folder import RunFolder


def first_step(
    config: TrainConfig, folder: RunFolder, store: CheckpointStore, say: Callable[[str], None]
) -> int | None:
    """The newest complete checkpoint of a run to be resumed; None: start anew."""
    if not config.resume:
        return None
    latest = store.latest()
    if latest is None:
        say(f"{folder.path} has no complete checkpoint: starting at step 0")
    else:
        say(f"Resuming {folder.path} after step {latest}")
    return latest


def dataset_sha256(dataset: Dataset) -> str:
    """sha256 of every token and mask, trained and held out: changes with the rows, the tokenizer and the template."""
    digest = hashlib.sha256()
    for examples in (dataset.train, dataset.evaluation):
        digest.update(len(examples).to_bytes(8, "little"))
        for example in examples:
            digest.update(len(example.input_ids).to_bytes(8, "little"))
            digest.update(example.input_ids.astype("<i4").tobytes())
            digest.update(example.loss_mask.astype("u1").tobytes())
            if example.source_ids is not None:
                digest.update(len(example.source_ids).to_bytes(8, "little"))
                digest.update(example.source_ids.astype("<i4").tobytes())
    return digest.hexdigest()


def check_fingerprint(saved: Mapping[str, str], now: Mapping[str, str], config: TrainConfig) -> None:
    """Refuses a checkpoint made from another base or other rows.

    Raises:
      UserError: naming what changed.
    """
    causes = {
        "base_sha256": f"the weights of model.path={config.model.path}",
        "data_sha256": f"the rows of data.path={config.data.path}, or their tokenizer or template,",
    }
    changed = [cause for name, cause in causes.items() if saved.get(name) != now[name]]
    if changed:
        raise UserError(
            f"{config.output_dir} cannot be resumed: {' and '.join(changed)} changed since its checkpoint",
            why="a resumed run continues exactly, on the same base and the same rows",
            fix="put the old files back, or start anew with another output_dir",
        )
