"""Rules about when to evaluate, to save, and to stop."""

from collections.abc import Iterator

from finetuner.recipe.rules.base import Finding, Rule, Values


def _strategy_and_steps_agree(what: str) -> Rule:
    """Return the rule that a strategy and its steps do not contradict each other; `what`: eval or save."""
    strategy, steps, per_epoch = f"{what}_strategy", f"{what}_steps", f"{what}s_per_epoch"

    def rule(values: Values) -> Iterator[Finding]:
        chosen = values[strategy]
        given = [key for key in (steps, per_epoch) if values[key] is not None]
        if chosen == "steps" and not given:
            yield Finding((strategy,), f"`{strategy}: steps` does not say how often. Add {steps} or {per_epoch}.")
        if chosen in ("no", "epoch", "best") and given:
            yield Finding(
                (given[0],), f"{given[0]} has no effect with `{strategy}: {chosen}`. Remove one.", ((strategy,),)
            )

    return (strategy, steps, per_epoch), rule


def _held_out_loss_is_taken(values: Values) -> Iterator[Finding]:
    wanted = {
        "early_stopping_patience": values["early_stopping_patience"] is not None,
        "load_best_model_at_end": values["load_best_model_at_end"],
        "save_strategy": values["save_strategy"] == "best",
    }
    for key in (key for key, asked in wanted.items() if asked):
        if not values["val_set_size"] and not values["test_datasets"]:
            yield Finding((key,), f"{key} looks at the held-out loss: add `val_set_size: 0.05` or test_datasets.")
        elif values["eval_strategy"] == "no":
            message = f"{key} looks at the held-out loss, and `eval_strategy: no` takes none. Remove one."
            yield Finding((key,), message, (("eval_strategy",),))


def _the_best_is_saved(values: Values) -> Iterator[Finding]:
    if values["load_best_model_at_end"] and values["save_strategy"] == "no":
        message = "load_best_model_at_end saves the best weights, and `save_strategy: no` saves none. Write `best`."
        yield Finding(("save_strategy",), message, (("load_best_model_at_end",),))


def _no_resuming_without_an_optimizer(values: Values) -> Iterator[Finding]:
    if values["save_only_model"] and values["resume_from_checkpoint"] is True:
        message = "no run can go on from what save_only_model saves. Remove it, or resume_from_checkpoint."
        yield Finding(("save_only_model",), message, (("resume_from_checkpoint",),))


def _patience_has_a_measure(values: Values) -> Iterator[Finding]:
    if values["loss_watchdog_patience"] is not None and values["loss_watchdog_threshold"] is None:
        message = "loss_watchdog_patience has no effect without loss_watchdog_threshold. Add that, or remove this."
        yield Finding(("loss_watchdog_patience",), message)
    if values["early_stopping_threshold"] and values["early_stopping_patience"] is None:
        message = "early_stopping_threshold has no effect without early_stopping_patience. Add that, or remove this."
        yield Finding(("early_stopping_threshold",), message)


RULES: tuple[Rule, ...] = (
    _strategy_and_steps_agree("eval"),
    _strategy_and_steps_agree("save"),
    (
        (
            "early_stopping_patience", "load_best_model_at_end", "save_strategy", "eval_strategy", "val_set_size",
            "test_datasets",
        ),
        _held_out_loss_is_taken,
    ),
    (("load_best_model_at_end", "save_strategy"), _the_best_is_saved),
    (("save_only_model", "resume_from_checkpoint"), _no_resuming_without_an_optimizer),
    (
        (
            "loss_watchdog_patience", "loss_watchdog_threshold", "early_stopping_threshold",
            "early_stopping_patience",
        ),
        _patience_has_a_measure,
    ),
)  # fmt: skip
