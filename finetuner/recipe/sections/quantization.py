"""The number format of a frozen base model."""

from typing import Annotated, Literal

from pydantic import Field

from finetuner.recipe.sections.base import Section
from finetuner.recipe.sections.facts import MUST_MATCH, ONLY_HERE, KeyFacts

FloatName = Literal["float32", "bfloat16", "float16"]


class FourBitSection(Section):
    """Formats of a 4-bit base (QLoRA, arXiv:2305.14314), in bitsandbytes' words."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        "nf4", description="nf4: sixteen levels made for normally distributed weights; fp4: a 4-bit float."
    )
    bnb_4bit_use_double_quant: bool = Field(
        True, description="Quantize the scale of every 64 weights too: 0.37 bits less for each weight."
    )
    bnb_4bit_compute_dtype: FloatName | None = Field(
        None, description="Number format of the matrix products; default: the run's own."
    )
    bnb_4bit_quant_storage: Literal["uint8", "float32", "bfloat16", "float16"] = Field(
        "uint8",
        description="Format that the packed bytes pass as; only engines that shard nothing but floats need one.",
    )


class QuantizationSection(Section):
    """A base in 4 or 8 bits under a LoRA adapter. `adapter: qlora` means 4 bits."""

    load_in_4bit: Annotated[bool | None, MUST_MATCH] = Field(
        None, description="Keep the base in 4 bits; adapter: qlora means the same."
    )
    load_in_8bit: Annotated[bool, MUST_MATCH] = Field(
        False, description="Keep the base in 8 bits under adapter: lora (LLM.int8)."
    )
    bnb_config_kwargs: Annotated[
        FourBitSection, KeyFacts(resume="must_match", needs="qlora", aliases=("bnb_config",))
    ] = Field(FourBitSection(), description="Formats of the 4-bit base.")
    quantized_cache: Annotated[bool, KeyFacts(resume="free", axolotl=ONLY_HERE)] = Field(
        False, description="Keep the 4-bit base below dataset_prepared_path, so that later starts read a quarter."
    )
