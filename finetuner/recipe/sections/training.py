"""Batches, length, rate, update rule and number formats."""

from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from finetuner.recipe.optimizers import OPTIMIZERS_IN_WORDS, OptimizerName
from finetuner.recipe.schedules import ScheduleShape
from finetuner.recipe.sections.base import (
    Chance,
    Count,
    Decay,
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
    Unit,
)
from finetuner.recipe.sections.facts import FREE, NOTED, ONLY_HERE, KeyFacts


class BatchRamp(Section):
    """The first steps have fewer rows: the k-th, from 0, start + (global batch - start) x k / steps, rounded down."""

    start: Rows = Field(description="Rows of the first step, over all ranks; fewer than the global batch.")
    steps: Steps = Field(description="After so many steps a step has the full global batch.")


class BatchSection(Section):
    """Rows of one step: ranks x micro_batch_size x gradient_accumulation_steps."""

    micro_batch_size: Annotated[Rows, KeyFacts(resume="free", known_as=("batch_size", "train_batch_size"))] = Field(
        1, description="Rows in one forward pass on one rank."
    )
    gradient_accumulation_steps: Annotated[Count, KeyFacts(resume="free", known_as=("grad_accum",))] = Field(
        1, description="Forward passes per rank before each update."
    )
    rampup_batch_size: Annotated[BatchRamp | None, KeyFacts(resume="must_match", axolotl=ONLY_HERE)] = Field(
        None,
        description="Begin with smaller steps, which grow evenly to the global batch. Megatron's word, but its ramp "
        "counts rows and ours counts steps.",
    )
    eval_batch_size: Annotated[Rows | None, FREE] = Field(
        None, description="As micro_batch_size, in evaluation; default: equal."
    )


class ScheduleSection(Section):
    """The length of the run, and its learning rate."""

    num_epochs: Annotated[Positive, KeyFacts(resume="noted", known_as=("epochs",))] = Field(
        1.0, description="Passes over the training rows."
    )
    max_steps: Annotated[Steps | None, NOTED] = Field(None, description="Updates; when given, num_epochs is not used.")
    max_tokens: Annotated[TokenBudget | None, KeyFacts(resume="noted", axolotl=ONLY_HERE)] = Field(
        None, description="Tokens to train on, in place of num_epochs or max_steps; rounded up to whole steps."
    )
    learning_rate: Annotated[
        Rate,
        KeyFacts(
            resume="noted",
            axolotl="the same peak; the first warmup step has rate 0, as in transformers",
            known_as=("lr",),
        ),
    ] = Field(description="Peak learning rate.")
    lr_scheduler: Annotated[ScheduleShape, KeyFacts(resume="noted", known_as=("scheduler",))] = Field(
        "cosine",
        description="Shape after the warmup, by transformers' names; rex: arXiv:2107.04197, as Axolotl has it.",
    )
    lr_scheduler_kwargs: Annotated[dict[str, int | float | str], NOTED] = Field(
        {}, description="What the shape takes, such as num_decay_steps of warmup_stable_decay, or lr_end of polynomial."
    )
    warmup_steps: Annotated[StepsOrZero | None, NOTED] = Field(None, description="Steps of linear rise from 0.")
    warmup_ratio: Annotated[
        Share | None, KeyFacts(resume="noted", axolotl="there rounded down in some versions; here up")
    ] = Field(None, description="The same, as a fraction of all steps.")
    lr_quadratic_warmup: Annotated[bool, NOTED] = Field(
        False, description="The cosine's warmup rises with the square of the steps."
    )
    cosine_min_lr_ratio: Annotated[Share, NOTED] = Field(
        0.0, description="Where the cosine, or rex, ends, as a fraction of learning_rate."
    )
    cosine_min_lr: Annotated[
        Rate | None, KeyFacts(resume="noted", axolotl="there read by no version known", aliases=("eta_min",))
    ] = Field(None, description="The same, as a rate.")
    cosine_constant_lr_ratio: Annotated[Share | None, NOTED] = Field(
        None, description="When the cosine ends, as a fraction of all steps; the rate then stays at its floor."
    )

    @property
    def lowest_rate(self) -> float:
        """The rate at the end of the cosine, as a fraction of learning_rate."""
        return self.cosine_min_lr_ratio if self.cosine_min_lr is None else self.cosine_min_lr / self.learning_rate


class RateGroup(Section):
    """Weights with a learning rate of their own."""

    name: str = Field("", description="What you call it; errors say it.")
    modules: Names = Field(min_length=1, description="The weights whose names contain one of these texts.")
    lr: Rate = Field(description="Their peak learning rate.")


class RatesSection(Section):
    """Learning rates of their own for some weights. All follow one schedule; learning_rate is what is logged."""

    loraplus_lr_ratio: Annotated[Positive | None, KeyFacts(resume="noted", needs="lora")] = Field(
        None, description="The rate of LoRA's B matrices, as a multiple of learning_rate (LoRA+, arXiv:2402.12354)."
    )
    embedding_lr: Annotated[Rate | None, NOTED] = Field(
        None, description="The rate of embeddings and the head where they are trained."
    )
    embedding_lr_scale: Annotated[Positive | None, NOTED] = Field(
        None, description="The same, as a multiple of learning_rate."
    )
    lr_groups: Annotated[tuple[RateGroup, ...], Strict(False), NOTED] = Field(
        (), description="Other weights with rates of their own, by parts of their names."
    )


class OptimizerSection(Section):
    """The update rule."""

    optimizer: Annotated[OptimizerName, NOTED] = Field(
        "adamw_torch",
        description=OPTIMIZERS_IN_WORDS,
    )
    optim_args: Annotated[str | dict[str, Any], NOTED] = Field(
        {}, description="Further arguments of the optimizer, as a block or as one text, momentum=0.9."
    )
    weight_decay: Annotated[
        NonNegative, KeyFacts(resume="noted", axolotl="there also on embeddings of some models; here on matrices only")
    ] = Field(0.0, description="On matrices only.")
    adam_beta1: Annotated[Decay, NOTED] = Field(0.9, description="AdamW, Lion: decay of the mean.")
    adam_beta2: Annotated[Decay, NOTED] = Field(
        0.999, description="AdamW: decay of the variance; Lion: of its momentum."
    )
    adam_epsilon: Annotated[Positive, KeyFacts(resume="noted", aliases=("adam_eps",))] = Field(
        1e-8, description="Added to the denominator."
    )
    max_grad_norm: Annotated[NonNegative, NOTED] = Field(1.0, description="Longer gradients are scaled; 0: never.")


class RegularizationSection(Section):
    """Terms that keep the model from memorizing the rows, in training only."""

    neftune_noise_alpha: Annotated[Positive | None, KeyFacts(resume="noted", aliases=("noisy_embedding_alpha",))] = (
        Field(None, description="Noise on the input embeddings (NEFTune, arXiv:2310.05914); 5 is usual.")
    )
    label_smoothing_factor: Annotated[Chance, KeyFacts(resume="noted", axolotl=ONLY_HERE)] = Field(
        0.0,
        description="Share of the target that goes to all tokens of the vocabulary alike; the logged loss has it.",
    )
    z_loss_coefficient: Annotated[NonNegative, KeyFacts(resume="noted", axolotl=ONLY_HERE)] = Field(
        0.0,
        description="Times log(sum of exp(logits))^2, added to the loss: keeps logits in place; 1e-4 is usual.",
    )
    loss_weighting: Annotated[Literal["probability", "entropy"] | None, KeyFacts(resume="noted", axolotl=ONLY_HERE)] = (
        Field(
            None,
            description="Weight of each token's loss, in training: its probability (DFT, arXiv:2508.05629), or the "
            "entropy of the likeliest tokens (EAFT). The sum is divided by the number of trained tokens.",
        )
    )
    loss_weighting_exponent: Annotated[Positive, KeyFacts(resume="noted", axolotl=ONLY_HERE)] = Field(
        1.0, description="Power to which loss_weighting's weights are raised."
    )
    loss_weighting_top_k: Annotated[int, Field(ge=2), Unit("tokens"), KeyFacts(resume="noted", axolotl=ONLY_HERE)] = (
        Field(20, description="How many of the likeliest tokens the entropy of loss_weighting is taken over.")
    )
    loss_weighting_entropy_unit: Annotated[Positive, Unit("nats"), KeyFacts(resume="noted", axolotl=ONLY_HERE)] = Field(
        3.0, description="Entropy of a token that weighs 1; LLaMA-Factory has 3, Axolotl 1."
    )


class CompileSection(Section):
    """Compilation by PyTorch: a slow first step, then faster ones, with the same numbers up to rounding."""

    torch_compile: Annotated[Literal["auto"] | bool, FREE] = Field(
        False, description="Compile each decoder layer; auto: on a GPU, where nothing is in the way."
    )
    torch_compile_backend: Annotated[Literal["inductor", "aot_eager", "eager"], FREE] = Field(
        "inductor", description="What compiles; aot_eager and eager only trace, to look for errors."
    )
    torch_compile_mode: Annotated[Literal["default", "max-autotune-no-cudagraphs"] | None, FREE] = Field(
        None, description="How long inductor looks for faster kernels."
    )


class PrecisionSection(Section):
    """Number formats and memory. Trainable weights are always fp32."""

    bf16: Annotated[
        Literal["auto"] | bool,
        KeyFacts(
            resume="noted",
            axolotl="there `full` loads the trained weights in bf16 too; here trained weights are always fp32",
        ),
    ] = Field("auto", description="Compute in bfloat16; auto: where the device has it.")
    fp16: Annotated[bool, NOTED] = Field(False, description="Compute in float16 with a loss scaler; GPUs only.")
    tf32: Annotated[bool, NOTED] = Field(False, description="Let GPUs round fp32 matrix products to TF32.")
    gradient_checkpointing: Annotated[bool, KeyFacts(resume="noted", aliases=("gradient_checkpoint",))] = Field(
        False, description="Recompute activations: less memory, more time."
    )
    activation_offloading: Annotated[
        bool, KeyFacts(resume="noted", axolotl="there also whole activations of adapters; here the layers' inputs")
    ] = Field(
        False,
        description="Where activations are recomputed, keep the layers' inputs in host memory until the backward.",
    )
