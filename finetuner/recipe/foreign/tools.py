"""The tools whose recipes are read, and the recognition of a recipe's tool by its keys."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetuner.recipe.foreign.base import Foreign
from finetuner.recipe.foreign.llama_factory import LLAMA_FACTORY, LLAMA_FACTORY_DEFAULTS
from finetuner.recipe.foreign.translate import MEANINGS
from finetuner.recipe.foreign.trl import TRL, TRL_DEFAULTS
from finetuner.recipe.schema import FACTS


@dataclass(frozen=True)
class Tool:
    """A tool: the meaning of its keys here, and its defaults where ours are others."""

    name: str
    meanings: Mapping[str, Foreign]
    defaults: Mapping[str, Any] = field(default_factory=dict)


AXOLOTL_TOOL = Tool("Axolotl", MEANINGS)
LLAMA_FACTORY_TOOL = Tool("LLaMA-Factory", {**MEANINGS, **LLAMA_FACTORY}, LLAMA_FACTORY_DEFAULTS)
TRL_TOOL = Tool("TRL", {**MEANINGS, **TRL}, TRL_DEFAULTS)


# Words of other tools and libraries -> our key, for errors about one that stands in a recipe of ours.
ELSEWHERE: dict[str, str] = {
    **{key: meaning.becomes for table in (LLAMA_FACTORY, TRL) for key, meaning in table.items() if meaning.becomes},
    **{word: key for key, facts in FACTS.items() for word in facts.known_as},
}


def tool_of(values: Mapping[str, Any]) -> Tool:
    """Return the tool whose keys these are. A recipe of ours is one of Axolotl's, whose keys are ours as well."""
    if "base_model" in values or "model_name_or_path" not in values:
        return AXOLOTL_TOOL
    own = {"stage", "finetuning_type", "dataset", "template", "cutoff_len"}
    return LLAMA_FACTORY_TOOL if own & set(values) else TRL_TOOL
