"""The adapter, or the parameters that are trained without one."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from finetuner.recipe.sections.base import Chance, Count, CountOrZero, DiskName, Names, Section
from finetuner.recipe.sections.facts import MUST_MATCH, KeyFacts

PEFT_DEFAULT = "peft-default"  # the layers that PEFT adapts in an architecture when none are named
LayerNumbers = Annotated[tuple[CountOrZero, ...], Strict(False)]
ADAPTER_MUST_MATCH = KeyFacts(resume="must_match", needs="lora")


class AdapterSection(Section):
    """LoRA (arXiv:2106.09685), or full fine-tuning if `adapter` is not given."""

    adapter: Annotated[
        Literal["lora", "qlora"] | None,
        KeyFacts(resume="must_match", axolotl="there qlora needs load_in_4bit as well; here it says it by itself"),
    ] = Field(None, description="lora; qlora: the same on a base in 4 bits; leave out to train every weight.")
    lora_r: Annotated[Count, KeyFacts(resume="must_match", needs="lora", known_as=("r", "rank"))] = Field(
        16, description="Rank of the update."
    )
    lora_alpha: Annotated[Count, KeyFacts(resume="must_match", needs="lora", known_as=("alpha",))] = Field(
        32, description="The update is scaled by lora_alpha / lora_r."
    )
    lora_dropout: Annotated[Chance, KeyFacts(resume="noted", needs="lora", known_as=("dropout",))] = Field(
        0.0, description="Dropout on the adapter's input."
    )
    lora_target_linear: Annotated[bool | None, ADAPTER_MUST_MATCH] = Field(
        None, description="Adapt every linear layer but the head; so it is unless lora_target_modules names some."
    )
    lora_target_modules: Annotated[
        Names | str | None, KeyFacts(resume="must_match", needs="lora", known_as=("target_modules",))
    ] = Field(
        None,
        description="Names of the layers to adapt, such as q_proj, or one regular expression that a layer's whole name "
        "matches, or all-linear, or peft-default: those that PEFT adapts when none are named, q_proj and v_proj of "
        "most architectures; default: every linear layer but the head.",
    )
    lora_modules_to_save: Annotated[Names | None, ADAPTER_MUST_MATCH] = Field(
        None,
        description="Modules of which all weights are trained, besides the adapter, such as embed_tokens and "
        "lm_head; a tied pair stays tied.",
    )
    lora_fan_in_fan_out: Annotated[bool | None, ADAPTER_MUST_MATCH] = Field(
        None, description="The adapted layers store (in, out), as GPT-2's do; default: as the layers are."
    )
    lora_model_dir: Annotated[DiskName | None, ADAPTER_MUST_MATCH] = Field(
        None, description="Folder of an adapter to go on from, instead of a fresh one; of the same rank and layers."
    )
    peft_use_rslora: Annotated[bool, ADAPTER_MUST_MATCH] = Field(
        False, description="Scale by lora_alpha / sqrt(lora_r) instead (arXiv:2312.03732)."
    )
    peft_use_dora: Annotated[bool, ADAPTER_MUST_MATCH] = Field(
        False, description="Train each output's size apart from its direction (DoRA, arXiv:2402.09353)."
    )
    peft_init_lora_weights: Annotated[Literal[True, "gaussian"], ADAPTER_MUST_MATCH] = Field(
        True, description="How A starts: true is Kaiming's uniform, gaussian is normal / lora_r; B starts at zero."
    )
    peft_layers_to_transform: Annotated[LayerNumbers | CountOrZero | None, ADAPTER_MUST_MATCH] = Field(
        None, description="Numbers of the blocks to adapt, from 0; default: all."
    )
    peft_layers_pattern: Annotated[Names | str | None, ADAPTER_MUST_MATCH] = Field(
        None, description="Name of the list of blocks that peft_layers_to_transform counts, such as layers."
    )
    unfrozen_parameters: Annotated[Names | None, MUST_MATCH] = Field(
        None,
        description="Regular expressions for the names of the parameters to train, matched from their beginning; all "
        "others are frozen. Without an adapter only.",
    )
