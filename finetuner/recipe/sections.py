"""The recipe's sections. In YAML all keys are flat; each belongs to exactly one section here.

Names and meanings are Axolotl's where it has the key. Every section is frozen and refuses unknown keys; types are
strict (the text "4" is not the number 4).
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Names = Annotated[tuple[str, ...], Strict(False)]  # a YAML list; its entries stay strict


def _at_home(name: str) -> str:
    try:
        return str(Path(name).expanduser()) if name.startswith("~") else name
    except RuntimeError:  # the home of a user there is not; the file check says so
        return name


DiskName = Annotated[str, AfterValidator(_at_home)]


class Section(BaseModel):
    """Frozen, strict, closed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSection(Section):
    """Which model, and how its attention is computed."""

    base_model: DiskName = Field(min_length=1, description="Hub id or folder of the model to start from.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="auto: flash attention where it is installed and the device is a GPU, else SDPA."
    )


class SpecialTokens(Section):
    """Tokens with a role. A token that the vocabulary lacks is added, and the embeddings grow by it."""

    bos_token: str | None = Field(None, description="Begins a text.")
    eos_token: str | None = Field(None, description="Ends a text.")
    pad_token: str | None = Field(None, description="Fills up short rows; never trained on.")
    unk_token: str | None = Field(None, description="Stands for what the vocabulary cannot say.")


class TokenizerSection(Section):
    """Which tokenizer, and the tokens added to it."""

    tokenizer: DiskName | None = Field(
        None, description="Hub id or folder of the tokenizer; default: base_model's own."
    )
    special_tokens: SpecialTokens = Field(SpecialTokens(), description="Tokens with a role, by role.")
    tokens: Names = Field((), description="Tokens added to the vocabulary.")


class DatasetEntry(Section):
    """One source of rows."""

    path: DiskName = Field(min_length=1, description="A json, jsonl, csv or parquet file, a folder, or a hub id.")
    type: Literal["alpaca", "chat_template"] = Field(
        description="alpaca: columns instruction, input (may be missing), output. chat_template: a list of messages."
    )
    split: str = Field("train", description="Which split of the dataset.")
    name: str | None = Field(None, description="Which configuration of a hub dataset.")
    field_messages: str = Field("messages", description="Column that holds the messages of a chat_template row.")


class DataSection(Section):
    """Which rows are learned, how long they may be, and which are held out."""

    datasets: Annotated[tuple[DatasetEntry, ...], Strict(False)] = Field(
        min_length=1, description="Sources of training rows, joined in this order."
    )
    test_datasets: Annotated[tuple[DatasetEntry, ...], Strict(False)] = Field(
        (), description="Sources of held-out rows."
    )
    val_set_size: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Training rows to hold out: a fraction below 1, or a number of rows."
    )
    sequence_len: Annotated[int, Field(ge=2)] = Field(2048, description="Longest document, in tokens.")
    excess_length_strategy: Literal["drop", "truncate", "raise"] = Field(
        "drop", description="What happens to a longer document."
    )
    train_on_inputs: bool = Field(False, description="Learn the prompts too, not only the answers.")


class AdapterSection(Section):
    """LoRA (arXiv:2106.09685), or full fine-tuning when adapter is not given."""

    adapter: Literal["lora"] | None = Field(None, description="lora; leave out to train every weight.")
    lora_r: PositiveInt = Field(16, description="Rank of the update.")
    lora_alpha: PositiveInt = Field(32, description="The update is scaled by lora_alpha / lora_r.")
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.0, description="Dropout on the adapter's input.")
    lora_target_linear: bool | None = Field(
        None, description="Adapt every linear layer but the head; so it is unless lora_target_modules names some."
    )
    lora_target_modules: Names | None = Field(
        None, description="Names of the layers to adapt, such as q_proj; default: every linear layer but the head."
    )


class BatchSection(Section):
    """How many rows make one step: ranks x micro_batch_size x gradient_accumulation_steps."""

    micro_batch_size: PositiveInt = Field(1, description="Rows in one forward pass on one rank.")
    gradient_accumulation_steps: PositiveInt = Field(1, description="Forward passes per rank before each update.")
    eval_batch_size: PositiveInt | None = Field(None, description="As micro_batch_size, in evaluation; default: equal.")


class ScheduleSection(Section):
    """How long, and with which learning rate."""

    num_epochs: Annotated[float, Field(gt=0.0)] = Field(1.0, description="Passes over the training rows.")
    max_steps: PositiveInt | None = Field(None, description="Updates; when given, num_epochs is not used.")
    learning_rate: Annotated[float, Field(gt=0.0)] = Field(description="Peak learning rate.")
    lr_scheduler: Literal["constant", "linear", "cosine"] = Field("cosine", description="Shape after the warmup.")
    warmup_steps: NonNegativeInt | None = Field(None, description="Steps of linear rise from 0.")
    warmup_ratio: Fraction | None = Field(None, description="The same, as a fraction of all steps.")
    cosine_min_lr_ratio: Fraction = Field(0.0, description="Where the cosine ends, as a fraction of learning_rate.")


class OptimizerSection(Section):
    """The update rule."""

    optimizer: Literal["adamw_torch", "adamw_torch_fused"] = Field(
        "adamw_torch", description="AdamW (arXiv:1711.05101); both use PyTorch's fused kernel where there is one."
    )
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(0.0, description="On matrices only.")
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="Decay of the mean.")
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.999, description="Decay of the variance.")
    adam_epsilon: Annotated[float, Field(gt=0.0)] = Field(1e-8, description="Added to the denominator.")
    max_grad_norm: Annotated[float, Field(ge=0.0)] = Field(1.0, description="Longer gradients are scaled; 0: never.")


class PrecisionSection(Section):
    """Number formats and memory. Trainable weights are always fp32."""

    bf16: Literal["auto"] | bool = Field("auto", description="Compute in bfloat16; auto: where the device has it.")
    fp16: bool = Field(False, description="Compute in float16 with a loss scaler; GPUs only.")
    tf32: bool = Field(False, description="Let GPUs round fp32 matrix products to TF32.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")


class EvaluationSection(Section):
    """When the held-out loss is taken; always after the last step if there are held-out rows."""

    eval_steps: PositiveInt | None = Field(None, description="Every so many steps.")
    evals_per_epoch: PositiveInt | None = Field(None, description="So many times an epoch; default: once.")
    eval_on_start: bool = Field(False, description="Also before the first step.")


class OutputSection(Section):
    """Where everything goes, how often it is saved and logged, and where a run goes on from."""

    output_dir: DiskName = Field("outputs/run", min_length=1, description="Folder for all that the run writes.")
    overwrite_output_dir: bool = Field(False, description="Delete what an earlier run wrote there, and start anew.")
    save_steps: PositiveInt | None = Field(None, description="A checkpoint every so many steps.")
    saves_per_epoch: PositiveInt | None = Field(None, description="So many checkpoints an epoch; default: one.")
    save_total_limit: NonNegativeInt = Field(3, description="Checkpoints kept; the oldest go first. 0: keep all.")
    resume_from_checkpoint: bool | DiskName = Field(
        False, description="true: the newest whole checkpoint in output_dir, if there is one; or a checkpoint's folder."
    )
    logging_steps: PositiveInt = Field(1, description="A line in metrics.jsonl every so many steps.")
    seed: NonNegativeInt = Field(42, description="Order of the rows, dropout, new weights.")
