"""Batches, length, rate, update rule and number formats."""

from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from finetuner.recipe.optimizers import OptimizerName
from finetuner.recipe.schedules import Shape
from finetuner.recipe.sections.base import (
    Chance,
    Count,
    Names,
    NonNegative,
    Positive,
    Rate,
    Rows,
    Section,
    Share,
    Steps,
    StepsOrZero,
    TokenBudget,
)


class BatchRamp(Section):
    """The first steps have fewer rows: the k-th, from 0, start + (global batch - start) x k / steps, rounded down."""

    start: Rows = Field(description="Rows of the first step, over all ranks; fewer than the global batch.")
    steps: Steps = Field(description="After so many steps a step has the whole global batch.")


class BatchSection(Section):
    """How many rows make one step: ranks x micro_batch_size x gradient_accumulation_steps."""

    micro_batch_size: Rows = Field(1, description="Rows in one forward pass on one rank.")
    gradient_accumulation_steps: Count = Field(1, description="Forward passes per rank before each update.")
    rampup_batch_size: BatchRamp | None = Field(
        None,
        description="Begin with smaller steps, which grow evenly to the global batch. Megatron's word, but its ramp "
        "counts rows and ours counts steps.",
    )
    eval_batch_size: Rows | None = Field(None, description="As micro_batch_size, in evaluation; default: equal.")


class ScheduleSection(Section):
    """How long, and with which learning rate."""

    num_epochs: Positive = Field(1.0, description="Passes over the training rows.")
    max_steps: Steps | None = Field(None, description="Updates; when given, num_epochs is not used.")
    max_tokens: TokenBudget | None = Field(
        None, description="Tokens to train on, in place of num_epochs or max_steps; rounded up to whole steps."
    )
    learning_rate: Rate = Field(description="Peak learning rate.")
    lr_scheduler: Shape = Field("cosine", description="Shape after the warmup, by transformers' names.")
    lr_scheduler_kwargs: dict[str, int | float | str] = Field(
        {}, description="What the shape takes, such as num_decay_steps of warmup_stable_decay, or lr_end of polynomial."
    )
    warmup_steps: StepsOrZero | None = Field(None, description="Steps of linear rise from 0.")
    warmup_ratio: Share | None = Field(None, description="The same, as a fraction of all steps.")
    cosine_min_lr_ratio: Share = Field(0.0, description="Where the cosine ends, as a fraction of learning_rate.")
    cosine_constant_lr_ratio: Share | None = Field(
        None, description="When the cosine ends, as a fraction of all steps; the rate then stays at its floor."
    )


class RateGroup(Section):
    """Weights with a learning rate of their own."""

    name: str = Field("", description="What you call it; errors say it.")
    modules: Names = Field(min_length=1, description="The weights whose names have one of these texts in them.")
    lr: Rate = Field(description="Their peak learning rate.")


class RatesSection(Section):
    """Learning rates of their own for some weights. All follow one schedule; learning_rate is what is logged."""

    loraplus_lr_ratio: Positive | None = Field(
        None, description="The rate of LoRA's B matrices, as a multiple of learning_rate (LoRA+, arXiv:2402.12354)."
    )
    embedding_lr: Rate | None = Field(None, description="The rate of embeddings and the head where they are trained.")
    embedding_lr_scale: Positive | None = Field(None, description="The same, as a multiple of learning_rate.")
    lr_groups: Annotated[tuple[RateGroup, ...], Strict(False)] = Field(
        (), description="Other weights with rates of their own, by parts of their names."
    )


class OptimizerSection(Section):
    """The update rule."""

    optimizer: OptimizerName = Field(
        "adamw_torch",
        description="adamw_: AdamW (arXiv:1711.05101), by PyTorch's fused kernel where there is one. lion_: Lion "
        "(arXiv:2302.06675). 8bit: with a state in 8 bits (arXiv:2110.02861); paged_: moved to the CPU's memory when a "
        "GPU's is short. adafactor: arXiv:1804.04235, as transformers has it. muon: Muon for hidden matrices, AdamW "
        "for the rest.",
    )
    optim_args: str | dict[str, Any] = Field(
        {}, description="What the optimizer takes beside the keys here, as a block or as one text, momentum=0.9."
    )
    weight_decay: NonNegative = Field(0.0, description="On matrices only.")
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(0.9, description="AdamW, Lion: decay of the mean.")
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.999, description="AdamW: decay of the variance; Lion: of what it remembers."
    )
    adam_epsilon: Positive = Field(1e-8, description="Added to the denominator.")
    max_grad_norm: NonNegative = Field(1.0, description="Longer gradients are scaled; 0: never.")


class RegularisationSection(Section):
    """What training adds so that the model does not learn the rows by heart; evaluation is without it."""

    neftune_noise_alpha: Positive | None = Field(
        None, description="Noise on the input embeddings (NEFTune, arXiv:2310.05914); 5 is usual."
    )
    label_smoothing_factor: Chance = Field(
        0.0, description="Share of the target that is spread over the whole vocabulary; the loss that is logged has it."
    )
    z_loss_coefficient: NonNegative = Field(
        0.0,
        description="Times log(sum of exp(logits))^2, added to the loss: keeps logits in place; 1e-4 is usual.",
    )


class CompileSection(Section):
    """Compilation by PyTorch: a slow first step, then faster ones, with the same numbers but for rounding."""

    torch_compile: Literal["auto"] | bool = Field(
        False, description="Compile each decoder layer; auto: on a GPU, where nothing is in the way."
    )
    torch_compile_backend: Literal["inductor", "aot_eager", "eager"] = Field(
        "inductor", description="What compiles; aot_eager and eager only trace, to look for errors."
    )
    torch_compile_mode: Literal["default", "max-autotune-no-cudagraphs"] | None = Field(
        None, description="How long inductor looks for faster kernels."
    )


class PrecisionSection(Section):
    """Number formats and memory. Trainable weights are always fp32."""

    bf16: Literal["auto"] | bool = Field("auto", description="Compute in bfloat16; auto: where the device has it.")
    fp16: bool = Field(False, description="Compute in float16 with a loss scaler; GPUs only.")
    tf32: bool = Field(False, description="Let GPUs round fp32 matrix products to TF32.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
