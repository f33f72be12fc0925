"""Rules about what is trained."""

from collections.abc import Iterator

from finetuner.recipe.rules.base import Finding, Rule, Values


def _one_way_to_name_targets(values: Values) -> Iterator[Finding]:
    if values["lora_target_linear"] is False and values["lora_target_modules"] is None:
        message = "no layer is named. Write lora_target_modules: [q_proj, v_proj], or remove this line for all of them."
        yield Finding(("lora_target_linear",), message)
    if values["lora_target_modules"] == ():
        yield Finding(
            ("lora_target_modules",), "no layer is named: nothing would be trained. Name some, or remove the key."
        )


RULES: tuple[Rule, ...] = ((("lora_target_linear", "lora_target_modules"), _one_way_to_name_targets),)
