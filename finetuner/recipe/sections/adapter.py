"""What is trained of the model."""

from typing import Literal

from pydantic import Field

from finetuner.recipe.sections.base import Chance, Count, Names, Section


class AdapterSection(Section):
    """LoRA (arXiv:2106.09685), or full fine-tuning when adapter is not given."""

    adapter: Literal["lora", "qlora"] | None = Field(
        None, description="lora; qlora: the same on a base in 4 bits; leave out to train every weight."
    )
    lora_r: Count = Field(16, description="Rank of the update.")
    lora_alpha: Count = Field(32, description="The update is scaled by lora_alpha / lora_r.")
    lora_dropout: Chance = Field(0.0, description="Dropout on the adapter's input.")
    lora_target_linear: bool | None = Field(
        None, description="Adapt every linear layer but the head; so it is unless lora_target_modules names some."
    )
    lora_target_modules: Names | None = Field(
        None, description="Names of the layers to adapt, such as q_proj; default: every linear layer but the head."
    )
