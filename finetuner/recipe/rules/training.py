"""Rules about batches, length, rate, precision, compilation and results."""

from collections.abc import Iterator

from finetuner.recipe.optimizers import WORDS, fits
from finetuner.recipe.problems import did_you_mean
from finetuner.recipe.rules.base import Finding, Rule, Values, one_of
from finetuner.recipe.schedules import SCHEDULES, option_mistakes


def _one_precision(values: Values) -> Iterator[Finding]:
    if values["bf16"] is True and values["fp16"]:
        yield Finding(("fp16",), "bf16 and fp16 are both true: a run computes in one of them. Set one to false.")


def _ramp_has_its_steps(values: Values) -> Iterator[Finding]:
    ramp, steps = values["rampup_batch_size"], values["max_steps"]
    if ramp is not None and values["group_by_length"]:
        message = (
            "group_by_length cuts the rows into steps of one size, and rampup_batch_size asks for others. Remove one."
        )
        yield Finding(("rampup_batch_size",), message, (("group_by_length",),))
    if ramp is not None and steps is not None and ramp.steps > steps:
        message = f"the batch grows for {ramp.steps} steps, but max_steps is {steps}. Write `steps: {steps}` at most."
        yield Finding(("rampup_batch_size", "steps"), message, (("max_steps",),))


def _floor_is_cosines(values: Values) -> Iterator[Finding]:
    for key in ("cosine_min_lr_ratio", "cosine_min_lr", "cosine_constant_lr_ratio", "lr_quadratic_warmup"):
        with_rex = values["lr_scheduler"] == "rex" and key.startswith("cosine_min")
        if values[key] and values["lr_scheduler"] != "cosine" and not with_rex:
            message = f"has no effect with lr_scheduler '{values['lr_scheduler']}'. Write `lr_scheduler: cosine`."
            yield Finding((key,), f"{key} {message}")


def _quadratic_warmup_has_no_floor(values: Values) -> Iterator[Finding]:
    # A recipe of Axolotl's with both was trained down to 0, and its author may not know.
    dropped = {
        "cosine_min_lr_ratio": "the lowest rate",
        "cosine_min_lr": "the lowest rate",
        "cosine_constant_lr_ratio": "cosine_constant_lr_ratio",
    }
    for key, what in dropped.items():
        if values["lr_quadratic_warmup"] and values[key]:
            message = f"Axolotl drops {what} where the warmup is quadratic. Say which you mean: remove {key} or this."
            yield Finding(("lr_quadratic_warmup",), message, ((key,),))
            return


def _floor_is_one_rate(values: Values) -> Iterator[Finding]:
    rate, peak = values["cosine_min_lr"], values["learning_rate"]
    if rate is not None and values["cosine_min_lr_ratio"]:
        message = "cosine_min_lr_ratio and cosine_min_lr are both given: both say where the schedule ends. Remove one."
        yield Finding(("cosine_min_lr",), message, (("cosine_min_lr_ratio",),))
    elif rate is not None and rate > peak:
        message = (
            f"cosine_min_lr is {rate:g}, above learning_rate, {peak:g}: the schedule ends at it. Write a lower one."
        )
        yield Finding(("cosine_min_lr",), message, (("learning_rate",),))


def _shape_takes_its_options(values: Values) -> Iterator[Finding]:
    shape, given = values["lr_scheduler"], values["lr_scheduler_kwargs"]
    known, sound = SCHEDULES[shape].options, True
    for key, value in given.items():
        where = ("lr_scheduler_kwargs", key)
        sound = sound and key in known and fits(value, known[key])
        if key not in known:
            takes = f"It takes: {', '.join(known)}." if known else "It takes none."
            yield Finding(where, f"{shape} has no option '{key}'. {takes}{did_you_mean(key, known)}")
        elif not fits(value, known[key]):
            yield Finding(where, f"lr_scheduler_kwargs.{key} is {value!r}, but must be {WORDS[known[key]]}.")
    for key, message in option_mistakes(shape, given, values["learning_rate"]).items() if sound else ():
        yield Finding(("lr_scheduler_kwargs", key) if key else ("lr_scheduler",), message)


def _fresh_or_resumed(values: Values) -> Iterator[Finding]:
    if values["overwrite_output_dir"] and values["resume_from_checkpoint"] is not False:
        yield Finding(
            ("overwrite_output_dir",),
            "overwrite_output_dir deletes the checkpoints that resume_from_checkpoint would go on from. Remove one.",
        )


def _samples_need_the_full_model(values: Values) -> Iterator[Finding]:
    if values["generate_samples"] is None:
        if values["generate_prompt"]:
            message = "generate_prompt has no effect without generate_samples. Add that, or remove this line."
            yield Finding(("generate_prompt",), message)
        return
    for key in ("fsdp", "fsdp_config", "deepspeed"):
        if values[key]:
            message = f"generate_samples needs the full model on a rank, and {key} shards it. Remove it; "
            message += "`finetuner generate` writes text with the result."
            yield Finding(("generate_samples",), message, ((key,),))
            return


def _compiled_how(values: Values) -> Iterator[Finding]:
    for key in ("torch_compile_backend", "torch_compile_mode"):
        if not values["torch_compile"] and values[key] not in (None, "inductor", "default"):
            yield Finding((key,), f"{key} has no effect without `torch_compile: true`. Add that, or remove this line.")


def _offloaded_are_recomputed(values: Values) -> Iterator[Finding]:
    fsdp = values["fsdp_config"]
    recomputes = values["gradient_checkpointing"] or (fsdp is not None and fsdp.activation_checkpointing)
    if values["activation_offloading"] and not recomputes:
        message = (
            "activation_offloading moves the inputs of layers that are recomputed. Add `gradient_checkpointing: true`."
        )
        yield Finding(("activation_offloading",), message)


def _weighted_how(values: Values) -> Iterator[Finding]:
    by = values["loss_weighting"]
    if by is not None and values["label_smoothing_factor"]:
        message = "loss_weighting weighs the loss of the target alone, and label_smoothing_factor mixes in others'. "
        yield Finding(("label_smoothing_factor",), f"{message}Remove one.", (("loss_weighting",),))
    if by is None and values["loss_weighting_exponent"] != 1.0:
        message = "loss_weighting_exponent has no effect without loss_weighting. Add that, or remove this line."
        yield Finding(("loss_weighting_exponent",), message)
    for key, default in (("loss_weighting_top_k", 20), ("loss_weighting_entropy_unit", 3.0)):
        if by != "entropy" and values[key] != default:
            message = f"{key} has no effect without `loss_weighting: entropy`. Add that, or remove this line."
            yield Finding((key,), message)


def _private_where(values: Values) -> Iterator[Finding]:
    if not values["hub_private_repo"] and values["hub_model_id"] is None:
        message = "hub_private_repo has no effect without hub_model_id. Add that, or remove this line."
        yield Finding(("hub_private_repo",), message)


RULES: tuple[Rule, ...] = (
    one_of("max_steps", "max_tokens", "both say how long to train"),
    one_of("warmup_steps", "warmup_ratio", "both say how long the warmup is"),
    one_of("eval_steps", "evals_per_epoch", "both say when to evaluate"),
    one_of("save_steps", "saves_per_epoch", "both say when to save"),
    (("bf16", "fp16"), _one_precision),
    (("rampup_batch_size", "group_by_length", "max_steps"), _ramp_has_its_steps),
    one_of("embedding_lr", "embedding_lr_scale", "both say the rate of embeddings"),
    (
        ("cosine_min_lr_ratio", "cosine_min_lr", "cosine_constant_lr_ratio", "lr_quadratic_warmup", "lr_scheduler"),
        _floor_is_cosines,
    ),
    (("cosine_min_lr_ratio", "cosine_min_lr", "learning_rate"), _floor_is_one_rate),
    (
        ("lr_quadratic_warmup", "cosine_min_lr_ratio", "cosine_min_lr", "cosine_constant_lr_ratio"),
        _quadratic_warmup_has_no_floor,
    ),
    (("lr_scheduler", "lr_scheduler_kwargs", "learning_rate"), _shape_takes_its_options),
    (("generate_samples", "generate_prompt", "fsdp", "fsdp_config", "deepspeed"), _samples_need_the_full_model),
    (("torch_compile", "torch_compile_backend", "torch_compile_mode"), _compiled_how),
    (("hub_model_id", "hub_private_repo"), _private_where),
    (
        (
            "loss_weighting",
            "loss_weighting_exponent",
            "loss_weighting_top_k",
            "loss_weighting_entropy_unit",
            "label_smoothing_factor",
        ),
        _weighted_how,
    ),
    (("activation_offloading", "gradient_checkpointing", "fsdp_config"), _offloaded_are_recomputed),
    (("overwrite_output_dir", "resume_from_checkpoint"), _fresh_or_resumed),
)
