"""Rules about a base in 4 or 8 bits."""

from collections.abc import Iterator

from finetuner.recipe.rules.base import Finding, Rule, Values
from finetuner.recipe.sections import FourBitSection


def _four_bits_are_qlora(values: Values) -> Iterator[Finding]:
    adapter, four_bits = values["adapter"], values["load_in_4bit"]
    if adapter == "qlora" and four_bits is False:
        message = "adapter: qlora trains on a 4-bit base. Remove this line, or write `adapter: lora`."
        yield Finding(("load_in_4bit",), message, (("adapter",),))
    if adapter == "lora" and four_bits:  # a recipe's file is read as qlora (recipe/foreign/rewordings.py)
        message = "LoRA on a 4-bit base is written `adapter: qlora`. Write that, or remove `load_in_4bit`."
        yield Finding(("adapter",), message, (("load_in_4bit",),))
    if adapter is None and four_bits:
        message = "a 4-bit base cannot be trained itself, only an adapter on it. Add `adapter: qlora`, or remove this."
        yield Finding(("load_in_4bit",), message)


def _keys_of_a_4_bit_base(values: Values) -> Iterator[Finding]:
    if values["adapter"] != "qlora":
        if values["bnb_config_kwargs"] != FourBitSection():
            message = "bnb_config_kwargs has no effect without `adapter: qlora`. Write that, or remove the block."
            yield Finding(("bnb_config_kwargs",), message, (("adapter",),))
        if values["quantized_cache"]:
            message = "quantized_cache has no effect without `adapter: qlora`. Write that, or remove this line."
            yield Finding(("quantized_cache",), message, (("adapter",),))
    elif values["peft_use_dora"]:
        message = "DoRA measures the columns of full weights, which a 4-bit base has not. Write `adapter: lora`, or "
        yield Finding(("peft_use_dora",), message + "remove this line.", (("adapter",),))


def _eight_bits_are_loras(values: Values) -> Iterator[Finding]:
    if values["load_in_8bit"] and values["adapter"] == "qlora":
        message = "adapter: qlora trains on a 4-bit base. Write `adapter: lora` for 8 bits, or remove `load_in_8bit`."
        yield Finding(("load_in_8bit",), message, (("adapter",),))
    if values["load_in_8bit"] and values["adapter"] is None:
        message = "an 8-bit base cannot be trained itself, only an adapter on it. Add `adapter: lora`, or remove this."
        yield Finding(("load_in_8bit",), message)


RULES: tuple[Rule, ...] = (
    (("adapter", "load_in_4bit"), _four_bits_are_qlora),
    (("adapter", "bnb_config_kwargs", "quantized_cache", "peft_use_dora"), _keys_of_a_4_bit_base),
    (("adapter", "load_in_8bit"), _eight_bits_are_loras),
)
