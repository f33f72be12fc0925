"""Rules about the optimizer: its arguments, and the engines that can shard its state."""

from collections.abc import Iterator

from finetuner.recipe.optimizers import OPTIMIZERS, WORDS, fits, read_arguments
from finetuner.recipe.problems import did_you_mean
from finetuner.recipe.rules.base import Finding, Rule, Values
from finetuner.recipe.sections import OptimizerSection


def _arguments_are_known(values: Values) -> Iterator[Finding]:
    given, name = values["optim_args"], values["optimizer"]
    known = OPTIMIZERS[name].arguments
    try:
        arguments = read_arguments(given)
    except ValueError as error:
        message = f"optim_args has '{error}', which is not NAME=VALUE. Write a block of `name: value` lines."
        yield Finding(("optim_args",), message)
        return
    for key, value in arguments.items():
        where = ("optim_args",) if isinstance(given, str) else ("optim_args", key)
        if key not in known:
            takes = f"It takes: {', '.join(known)}." if known else "It takes none."
            yield Finding(where, f"{name} has no argument '{key}' here. {takes}{did_you_mean(key, known)}")
        elif not fits(value, known[key]):
            yield Finding(where, f"optim_args.{key} is {value!r}, but must be {WORDS[known[key]]}.")


def _betas_are_used(values: Values) -> Iterator[Finding]:
    kind = OPTIMIZERS[values["optimizer"]]
    used = {"adam_beta1": kind.uses_betas, "adam_beta2": kind.uses_betas, "adam_epsilon": kind.uses_epsilon}
    for key, has_effect in used.items():
        if not has_effect and values[key] != OptimizerSection.model_fields[key].default:
            message = f"{key} has no effect with `optimizer: {values['optimizer']}`. Remove it, or see optim_args."
            yield Finding((key,), message, (("optimizer",),))


def _engine_can_shard_the_state(values: Values) -> Iterator[Finding]:
    name = values["optimizer"]
    engines = {"fsdp": "FSDP", "fsdp_config": "FSDP", "deepspeed": "DeepSpeed"}
    for key, engine in engines.items():
        why = OPTIMIZERS[name].not_sharded.get(key.partition("_")[0])
        if values[key] and why is not None:
            other = OPTIMIZERS[name].instead.get(key.partition("_")[0], "adamw_torch")
            message = f"optimizer {name} is not supported under {engine}: {why}. Write `optimizer: {other}`."
            if engine == "FSDP" and "deepspeed" not in OPTIMIZERS[name].not_sharded:
                message += " DeepSpeed can shard it: `deepspeed: deepspeed_configs/zero2.json` instead of fsdp."
            yield Finding(("optimizer",), message, ((key,),))
            return


RULES: tuple[Rule, ...] = (
    (("optimizer", "optim_args"), _arguments_are_known),
    (("optimizer", "adam_beta1", "adam_beta2", "adam_epsilon"), _betas_are_used),
    (("optimizer", "fsdp", "fsdp_config", "deepspeed"), _engine_can_shard_the_state),
)
