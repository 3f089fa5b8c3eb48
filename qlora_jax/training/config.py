"""The schema of a training run: every key, its default, and what changing it does.

The descriptions below are what `python -m qlora_jax.train --help` prints. Nothing here imports JAX.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

DEFAULT_EVAL_SPLIT = 0.05
DEFAULT_EPOCHS = 1.0
BLOCK_SIZES = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]


def _not_a_bool(value: Any) -> Any:
    """YAML reads `yes` as true, and true is a number to Python: `lora.rank: yes` would be rank 1."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


def _fill(values: Any, key: str, default: float, *, unless: str) -> Any:
    """Adds `key: default` where neither `key` nor `unless` is given."""
    if isinstance(values, dict) and values.get(key) is None and values.get(unless) is None:
        return {**values, key: default}
    return values


Int = Annotated[int, BeforeValidator(_not_a_bool)]
Float = Annotated[float, BeforeValidator(_not_a_bool)]
Beta = Annotated[Float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Unknown keys are errors, values are fixed once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, coerce_numbers_to_str=True)


class ModelSection(Section):
    path: str | None = Field(
        None,
        description="Base model: a Hugging Face folder, a .gguf file or a hub name (org/name). Read, never written. "
        "Without it the demo's SmolLM2-135M-Instruct is trained.",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="Dtype of activations. float32 doubles their memory and is slower; its losses repeat more exactly.",
    )


class QuantSection(Section):
    type: Literal["nf4", "fp4", "int4", "e2m1", "e3m0", "none"] = Field(
        "nf4",
        description="nf4: the frozen weights take 4 bits (QLoRA). none: they keep 16 bits (LoRA), four times the "
        "memory for a slightly lower loss. fp4, int4, e2m1, e3m0: other 4-bit types, to compare; slower, in pure JAX.",
    )
    block_size: BLOCK_SIZES = Field(  # type: ignore[valid-type]
        64, description="Weights that share one scale. Larger saves a fraction of a bit and rounds more coarsely."
    )
    double_quant: bool = Field(
        True, description="Store the scales in 8 bits too: 0.37 bits per weight less, at no measurable loss."
    )

    def load_arguments(self) -> dict[str, Any]:
        """These settings as arguments of `load_model`, which calls 16-bit weights None."""
        return {**self.model_dump(exclude={"type"}), "quant_type": None if self.type == "none" else self.type}


class LoraSection(Section):
    adapter: str | None = Field(
        None,
        description="Go on from this adapter: a folder that a run, `export` or PEFT has written. Its rank, alpha and "
        "layers are kept, its dropout unless lora.dropout is given. null: start a fresh one.",
    )
    rank: Int = Field(
        16, ge=1, description="Rank of the adapters. Higher can learn more; memory and adapter file grow with it."
    )
    alpha: Float = Field(
        32.0, gt=0, description="The adapters' output is scaled by alpha / rank; acts like a learning rate."
    )
    dropout: Float = Field(
        0.0, ge=0, lt=1, description="Share of the adapters' inputs zeroed while training. 0.05 helps small data."
    )
    dora: bool = Field(
        False,
        description="Train the length of each adapted weight's columns too (DoRA). It can learn more at the same rank; "
        "a step takes longer.",
    )
    targets: list[str] | None = Field(
        None,
        min_length=1,
        description="Which linears get adapters, e.g. [q_proj, v_proj]. null: every linear of a block, which the QLoRA "
        "paper found is needed to match full finetuning.",
    )


class DataSection(Section):
    path: str | None = Field(
        None,
        description="Training rows, JSON or JSONL: instruction/input/output, prompt/response, source/target, "
        "chat `messages`, or ShareGPT `conversations`.",
    )
    eval_path: str | None = Field(None, description="Held-out rows, same formats. null: data.eval_split is held out.")
    eval_split: Float | None = Field(
        None,
        ge=0,
        description="Held out of data.path where there is no data.eval_path: a fraction below 1, or a number of rows. "
        f"null: {DEFAULT_EVAL_SPLIT}. 0: nothing is evaluated.",
    )
    template: Literal["auto", "chat", "plain"] = Field(
        "auto",
        description="auto: the tokenizer's chat template where it has one, else plain. chat: insist on it. plain: "
        "'### Instruction:' headings, for base models. An encoder-decoder reads sources as they are: auto.",
    )

    @model_validator(mode="before")
    @classmethod
    def _hold_some_out_unless_told(cls, values: Any) -> Any:
        return _fill(values, "eval_split", DEFAULT_EVAL_SPLIT, unless="eval_path")

    @model_validator(mode="after")
    def _one_held_out_set(self) -> Self:
        if self.eval_path is not None and self.eval_split is not None:
            raise ValueError(
                f"data.eval_path={self.eval_path} and data.eval_split={self.eval_split:g} both name the held-out rows; "
                "give one"
            )
        if self.eval_split is not None and self.eval_split >= 1 and self.eval_split != int(self.eval_split):
            raise ValueError(f"data.eval_split={self.eval_split:g} is neither a fraction below 1 nor a number of rows")
        return self


class OptimSection(Section):
    learning_rate: Float = Field(
        2e-4, gt=0, description="Peak learning rate of AdamW. Too high and the loss jumps; too low and it hardly falls."
    )
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="After the warm-up: stay at the peak, or fall to 0 by the last step."
    )
    warmup_steps: Int = Field(
        10, ge=0, description="Steps over which the learning rate rises from 0; keeps the start calm."
    )
    weight_decay: Float = Field(0.0, ge=0, description="AdamW's decay of the adapters. Rarely needed.")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="Adam's averaging of gradient and squared gradient.")
    eps: Float = Field(1e-8, gt=0, description="Added to Adam's denominator.")
    clip: Float | None = Field(
        0.3, gt=0, description="Largest global norm of the gradient; longer ones are scaled down. null: never."
    )
    paged: bool = Field(
        True,
        description="Keep optimizer state in host memory and fetch it page by page. Same results; saves 8 bytes of "
        "device memory per adapter parameter. On a CPU it changes nothing.",
    )
    page_bytes: Int = Field(
        64 * 2**20, gt=0, description="Size of a page. Smaller saves device memory, larger moves fewer pieces."
    )


class TrainSection(Section):
    steps: Int | None = Field(
        None, ge=1, description="Optimizer steps. null: train.epochs decides. May be raised when a run is resumed."
    )
    epochs: Float | None = Field(
        None, gt=0, description=f"Passes over the data, where train.steps is not given. null: {DEFAULT_EPOCHS:g}."
    )
    batch_size: Int = Field(
        8, ge=1, description="Rows in one forward pass (packed ones, where packing is on). Memory grows with it."
    )
    accumulation: Int = Field(
        1,
        ge=1,
        description="Forward passes per optimizer step: batch_size x accumulation rows act as one batch, in the memory "
        "of batch_size.",
    )
    seq_len: Int = Field(
        1024, ge=2, description="Tokens per row of the batch. Examples longer than this are dropped, and counted."
    )
    target_len: Int | None = Field(
        None,
        ge=2,
        description="Of an encoder-decoder (T5): tokens of the target per row, its start and end among them; "
        "train.seq_len are the source's then. null: a quarter of train.seq_len.",
    )
    packing: bool = Field(
        True,
        description="Put several examples in one row, none sees another. Off: one example per row, the rest padding, "
        "which is computed too.",
    )
    remat: bool = Field(
        True, description="Recompute each block in the backward pass: a third more work for far less activation memory."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_epoch_unless_told(cls, values: Any) -> Any:
        return _fill(values, "epochs", DEFAULT_EPOCHS, unless="steps")

    @model_validator(mode="after")
    def _one_measure_of_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"train.steps={self.steps} and train.epochs={self.epochs:g} both set the length; give one")
        return self


class EvalSection(Section):
    every: Int = Field(
        50, ge=1, description="Steps between evaluations. Step 0 and the last step are always evaluated."
    )
    rows: Int | None = Field(None, ge=1, description="Evaluate only the first held-out rows, so many. null: all.")
    batch_size: Int = Field(8, ge=1, description="Rows per forward pass of an evaluation: speed and memory only.")
    samples: Int = Field(
        0, ge=0, description="Held-out prompts answered before and after training, to see what changed. Costs time."
    )
    sample_tokens: Int = Field(48, ge=1, description="Longest answer to one of those prompts, in tokens.")


class CheckpointSection(Section):
    every: Int = Field(
        50, ge=1, description="Steps between checkpoints: what a crash can cost you. Ctrl-C and the last step save too."
    )
    keep: Int = Field(2, ge=1, description="Newest checkpoints kept; each has the adapter and its optimizer state.")


class LogSection(Section):
    every: Int = Field(1, ge=1, description="Steps between printed lines. metrics.jsonl has every step anyway.")
    tensorboard: Literal["auto"] | bool = Field(
        "auto", description="Write RUN/tensorboard. auto: where tensorboardX is installed (the `log` extra)."
    )


class TrainConfig(Section):
    """One training run. `TrainConfig(model={"path": ...}, data={"path": ...})` is the smallest useful one."""

    output_dir: str = Field(
        "runs/finetune", description="The run folder. One with a run in it is refused unless resume=true."
    )
    resume: bool = Field(
        False,
        description="Continue the run in output_dir from its newest checkpoint, exactly as if it had never stopped. "
        "Only train.steps, *.every and log.* may differ from before.",
    )
    seed: Int = Field(0, ge=0, lt=2**32, description="Adapters' start, rows' order, dropout. Same seed, same run.")
    model: ModelSection = ModelSection()  # type: ignore[call-arg]
    quant: QuantSection = QuantSection()  # type: ignore[call-arg]
    lora: LoraSection = LoraSection()  # type: ignore[call-arg]
    data: DataSection = DataSection()  # type: ignore[call-arg]
    optim: OptimSection = OptimSection()  # type: ignore[call-arg]
    train: TrainSection = TrainSection()  # type: ignore[call-arg]
    eval: EvalSection = EvalSection()  # type: ignore[call-arg]
    checkpoint: CheckpointSection = CheckpointSection()  # type: ignore[call-arg]
    log: LogSection = LogSection()  # type: ignore[call-arg]
