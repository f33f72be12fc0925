"""Whose recipe it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetuner.recipe.foreign.base import Foreign
from finetuner.recipe.foreign.trainers import LLAMA_FACTORY, LLAMA_FACTORY_DEFAULTS, TRL, TRL_DEFAULTS
from finetuner.recipe.foreign.translate import MEANINGS
from finetuner.recipe.schema import FACTS


@dataclass(frozen=True)
class Tool:
    """A tool, what its keys mean here, and what its silence means where ours means something else."""

    name: str
    meanings: Mapping[str, Foreign]
    defaults: Mapping[str, Any] = field(default_factory=dict)


AXOLOTL_TOOL = Tool("Axolotl", MEANINGS)
LLAMA_FACTORY_TOOL = Tool("LLaMA-Factory", {**MEANINGS, **LLAMA_FACTORY}, LLAMA_FACTORY_DEFAULTS)
TRL_TOOL = Tool("TRL", {**MEANINGS, **TRL}, TRL_DEFAULTS)


# What other tools and libraries call a key of ours, where one of their words stands in a recipe of ours.
ELSEWHERE: dict[str, str] = {
    **{key: meaning.becomes for table in (LLAMA_FACTORY, TRL) for key, meaning in table.items() if meaning.becomes},
    **{word: key for key, facts in FACTS.items() for word in facts.known_as},
}


def tool_of(values: Mapping[str, Any]) -> Tool:
    """Whose keys these are. Axolotl's are ours as well, so a recipe of ours is one of Axolotl's."""
    if "base_model" in values or "model_name_or_path" not in values:
        return AXOLOTL_TOOL
    own = {"stage", "finetuning_type", "dataset", "template", "cutoff_len"}
    return LLAMA_FACTORY_TOOL if own & set(values) else TRL_TOOL
