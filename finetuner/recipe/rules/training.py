"""Rules about batches, length, rate, precision, evaluation and saving."""

from collections.abc import Iterator

from finetuner.recipe.rules.base import Finding, Rule, Values, one_of


def _one_precision(values: Values) -> Iterator[Finding]:
    if values["bf16"] is True and values["fp16"]:
        yield Finding(("fp16",), "bf16 and fp16 are both true: a run computes in one of them. Set one to false.")


def _floor_is_cosines(values: Values) -> Iterator[Finding]:
    if values["cosine_min_lr_ratio"] and values["lr_scheduler"] != "cosine":
        message = f"has no effect with lr_scheduler '{values['lr_scheduler']}'. Write `lr_scheduler: cosine`."
        yield Finding(("cosine_min_lr_ratio",), "cosine_min_lr_ratio " + message)


def _fresh_or_resumed(values: Values) -> Iterator[Finding]:
    if values["overwrite_output_dir"] and values["resume_from_checkpoint"] is not False:
        yield Finding(
            ("overwrite_output_dir",),
            "overwrite_output_dir deletes the checkpoints that resume_from_checkpoint would go on from. Remove one.",
        )


RULES: tuple[Rule, ...] = (
    one_of("warmup_steps", "warmup_ratio", "both say how long the warmup is"),
    one_of("eval_steps", "evals_per_epoch", "both say when to evaluate"),
    one_of("save_steps", "saves_per_epoch", "both say when to save"),
    (("bf16", "fp16"), _one_precision),
    (("cosine_min_lr_ratio", "lr_scheduler"), _floor_is_cosines),
    (("overwrite_output_dir", "resume_from_checkpoint"), _fresh_or_resumed),
)
