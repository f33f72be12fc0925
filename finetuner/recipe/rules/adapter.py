"""Rules about the adapter, and about the parameters that are trained without one."""

import re
from collections.abc import Iterator

from finetuner.recipe.problems import KeyPath
from finetuner.recipe.rules.base import Finding, Rule, Values
from finetuner.recipe.sections.adapter import PEFT_DEFAULT


def _one_way_to_name_targets(values: Values) -> Iterator[Finding]:
    if values["lora_target_linear"] is False and values["lora_target_modules"] is None:
        message = "no layer is named. Write lora_target_modules: [q_proj, v_proj], or remove this line for all of them."
        yield Finding(("lora_target_linear",), message)
    if values["lora_target_modules"] in ((), ""):
        yield Finding(
            ("lora_target_modules",), "no layer is named: nothing would be trained. Name some, or remove the key."
        )


_TABLES = frozenset({"lm_head", "embed_out", "embed_tokens", "embed_in", "wte", "wpe", "word_embeddings"})


def _linear_layers_alone(values: Values) -> Iterator[Finding]:
    """lora_target_linear stands above names, of which those of linear layers are among it already."""
    named = values["lora_target_modules"]
    if not values["lora_target_linear"] or not isinstance(named, tuple):
        return
    for name in named:
        if name.rpartition(".")[2] in _TABLES:
            message = (
                f"lora_target_linear adapts every linear layer but the head, so '{name}' would be left out. Train it "
                f"in full (lora_modules_to_save: [{name}]), or remove lora_target_linear and name every layer."
            )
            yield Finding(("lora_target_modules",), message, (("lora_target_linear",),))


def _one_way_to_choose_blocks(values: Values) -> Iterator[Finding]:
    blocks, targets = values["peft_layers_to_transform"], values["lora_target_modules"]
    if blocks == ():
        yield Finding(("peft_layers_to_transform",), "no block is numbered. Write [0, 1], or remove the key for all.")
    if values["peft_layers_pattern"] is not None and blocks is None:
        message = "peft_layers_pattern has no effect without peft_layers_to_transform. Add that, or remove this."
        yield Finding(("peft_layers_pattern",), message)
    if blocks is not None and isinstance(targets, str) and targets not in ("all-linear", "all_linear", PEFT_DEFAULT):
        message = "a regular expression in lora_target_modules already says which blocks. Remove one of the two."
        yield Finding(("peft_layers_to_transform",), message, (("lora_target_modules",),))


def _expressions_compile(values: Values) -> Iterator[Finding]:
    places: list[tuple[KeyPath, str]] = []
    if isinstance(values["lora_target_modules"], str):
        places.append((("lora_target_modules",), values["lora_target_modules"]))
    places += [(("unfrozen_parameters", i), text) for i, text in enumerate(values["unfrozen_parameters"] or ())]
    for where, text in places:
        try:
            re.compile(text)
        except re.error as error:
            yield Finding(where, f"'{text}' is not a regular expression: {error}.")


def _unfrozen_parameters_without_an_adapter(values: Values) -> Iterator[Finding]:
    if values["unfrozen_parameters"] is None:
        return
    if values["adapter"] is not None:
        message = (
            "unfrozen_parameters is not supported beside an adapter: an adapter leaves all of it frozen. Remove one "
            "(lora_modules_to_save trains whole modules beside an adapter)."
        )
        yield Finding(("unfrozen_parameters",), message, (("adapter",),))
    elif values["unfrozen_parameters"] == ():
        message = "no parameter is named: nothing would be trained. Name some, or remove the key."
        yield Finding(("unfrozen_parameters",), message)


RULES: tuple[Rule, ...] = (
    (("lora_target_linear", "lora_target_modules"), _one_way_to_name_targets),
    (("lora_target_linear", "lora_target_modules"), _linear_layers_alone),
    (("peft_layers_to_transform", "peft_layers_pattern", "lora_target_modules"), _one_way_to_choose_blocks),
    (("lora_target_modules", "unfrozen_parameters"), _expressions_compile),
    (("adapter", "unfrozen_parameters"), _unfrozen_parameters_without_an_adapter),
)
