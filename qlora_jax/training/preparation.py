"""Everything about a run that is known before a weight is read: opened, rendered, counted, checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qlora_jax.errors import UserError
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.dataset import Dataset, check_vocabulary, load_dataset
from qlora_jax.training.plan import describe_plan, measure_epoch, measure_model, planned_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_jax.checkpoints.source import Checkpoint
    from qlora_jax.data.rendering import Example, Renderer
    from qlora_jax.data.source_target import SourceTargetRenderer

_TRAINED, _END = "\x1b[1;32m", "\x1b[0m"


@dataclass(frozen=True)
class Prepared:
    """A run ready to load its weights.

    Attributes:
      steps: optimizer steps in all.
      plan: the start-up lines.
    """

    checkpoint: "Checkpoint"
    tokenizer: "PreTrainedTokenizerBase"
    renderer: "Renderer | SourceTargetRenderer"
    dataset: Dataset
    steps: int
    plan: str


def prepare(config: TrainConfig) -> Prepared:
    """Opens the checkpoint (headers only), renders the rows, and measures. Cheap errors come before dear ones.

    Raises:
      UserError: no or a damaged checkpoint, bad rows, a vocabulary mismatch, adapters on layers that are not there.
    """
    from qlora_jax.checkpoints.source import open_checkpoint
    from qlora_jax.checkpoints.t5 import is_t5
    from qlora_jax.models.loading import check_model

    if config.model.path is None:
        raise UserError("model.path is not given", why="there is nothing to finetune", fix="model.path=FOLDER_OR_GGUF")
    checkpoint = open_checkpoint(config.model.path)
    check_model(checkpoint, **config.quant.load_arguments())
    sizes = measure_model(checkpoint, config)
    if config.train.target_len is not None and not is_t5(checkpoint.config):
        raise UserError(
            f"train.target_len={config.train.target_len}, but {config.model.path} is a decoder alone",
            why="it reads prompt and answer as one text, of train.seq_len tokens",
            fix="train.target_len=null",
        )
    tokenizer = checkpoint.tokenizer()
    check_vocabulary(tokenizer, checkpoint.config["vocab_size"], config.model.path)
    renderer = renderer_for(checkpoint, tokenizer, config.data.template)
    dataset = load_dataset(config, renderer)
    epoch = measure_epoch(config, dataset.train)
    return Prepared(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        renderer=renderer,
        dataset=dataset,
        steps=planned_steps(config, epoch),
        plan=describe_plan(config, sizes, dataset, epoch, checkpoint.config.get("max_position_embeddings")),
    )


def renderer_for(
    checkpoint: "Checkpoint", tokenizer: "PreTrainedTokenizerBase", template: Literal["auto", "chat", "plain"]
) -> "Renderer | SourceTargetRenderer":
    """What writes rows and prompts for a model: its template, or source and target apart for an encoder-decoder."""
    from qlora_jax.checkpoints.t5 import is_t5
    from qlora_jax.data.rendering import Renderer
    from qlora_jax.data.source_target import SourceTargetRenderer

    if is_t5(checkpoint.config):
        start_id = checkpoint.config["decoder_start_token_id"]
        return SourceTargetRenderer(tokenizer, start_id=start_id, template=template)
    return Renderer(tokenizer, template)


def marked_example(tokenizer: "PreTrainedTokenizerBase", example: "Example", *, colour: bool) -> str:
    """An example as the model reads it; what it is trained on is green, or between [[ and ]] without colour."""

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    start, end = (_TRAINED, _END) if colour else ("[[", "]]")
    pieces, index, ids, mask = [], 0, example.input_ids.tolist(), example.loss_mask.tolist()
    if example.source_ids is not None:
        pieces.append(f"{decode(example.source_ids.tolist())}\n")
    while index < len(ids):
        stop = index
        while stop < len(ids) and mask[stop] == mask[index]:
            stop += 1
        text = decode(ids[index:stop])
        pieces.append(f"{start}{text}{end}" if mask[index] else text)
        index = stop
    return "".join(pieces)
