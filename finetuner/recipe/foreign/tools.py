"""The tools whose recipes are read, and the recognition of a recipe's tool by its keys."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetuner.errors import RecipeError
from finetuner.recipe.foreign.base import Foreign
from finetuner.recipe.foreign.llama_factory import LLAMA_FACTORY, LLAMA_FACTORY_DEFAULTS
from finetuner.recipe.foreign.llama_factory_groups import rewrite_llama_factory
from finetuner.recipe.foreign.rewriting import Rewriting
from finetuner.recipe.foreign.translate import MEANINGS
from finetuner.recipe.foreign.trl import TRL, TRL_DEFAULTS
from finetuner.recipe.foreign.trl_groups import rewrite_trl
from finetuner.recipe.schema import FACTS, KEYS


@dataclass(frozen=True)
class Tool:
    """A tool: the meaning of its keys here, and its defaults where ours are others.

    rewrite: takes the keys that mean something only together out of the document, before `meanings` is read.
    """

    name: str
    meanings: Mapping[str, Foreign]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rewrite: Callable[[Rewriting], None] = lambda rewriting: None


AXOLOTL_TOOL = Tool("Axolotl", MEANINGS)
LLAMA_FACTORY_TOOL = Tool("LLaMA-Factory", {**MEANINGS, **LLAMA_FACTORY}, LLAMA_FACTORY_DEFAULTS, rewrite_llama_factory)
TRL_TOOL = Tool("TRL", {**MEANINGS, **TRL}, TRL_DEFAULTS, rewrite_trl)


# Words of other tools and libraries -> our key, for errors about one that stands in a recipe of ours.
ELSEWHERE: dict[str, str] = {
    **{key: meaning.becomes for table in (LLAMA_FACTORY, TRL) for key, meaning in table.items() if meaning.becomes},
    **{word: key for key, facts in FACTS.items() for word in facts.known_as},
}

# Keys that one of the two tools on transformers' TrainingArguments has, and neither the other nor we.
_ONLY_LLAMA_FACTORY = {
    "stage", "finetuning_type", "dataset", "template", "cutoff_len", "dataset_dir", "eval_dataset", "lora_rank",
    "lora_target", "quantization_bit", "val_size", "flash_attn", "neat_packing", "enable_liger_kernel", "mask_history",
    "train_on_prompt", "preprocessing_num_workers", "overwrite_cache", "plot_loss", "adapter_name_or_path",
    "pref_loss", "pref_beta", "tokenized_path", "mix_strategy",
}  # fmt: skip
_ONLY_TRL = {
    "dataset_name", "dataset_config", "dataset_mixture", "dataset_mixer", "dataset_splits", "dataset_train_split",
    "dataset_test_split", "dataset_text_field", "dataset_num_proc", "dataset_kwargs", "use_peft", "lora_r",
    "lora_target_modules", "max_length", "assistant_only_loss", "completion_only_loss", "model_revision",
    "chat_template_path", "reward_funcs", "num_generations", "max_completion_length", "max_prompt_length", "beta",
}  # fmt: skip

# Recipes of tools that are not read: the name, and whether these values are its.
_OTHER_TOOLS: tuple[tuple[str, Callable[[Mapping[str, Any]], bool]], ...] = (
    ("LLaMA-Factory's v1 engine", lambda v: "train_dataset" in v and "model" in v),
    ("torchtune", lambda v: any(isinstance(b, dict) and "_component_" in b for b in v.values())),
    ("NeMo AutoModel", lambda v: any(isinstance(b, dict) and "_target_" in b for b in v.values())),
    ("LitGPT", lambda v: "checkpoint_dir" in v and {"data", "train", "precision"} & set(v) != set()),
    ("mlx-lm", lambda v: "iters" in v and "model" in v),
    ("AutoTrain", lambda v: str(v.get("task")).startswith("llm") and "data" in v),
    ("Oumi", lambda v: isinstance(v.get("training"), dict) and isinstance(v.get("model"), dict)),
    ("Ludwig", lambda v: v.get("model_type") == "llm" and "input_features" in v),
    ("ms-swift", lambda v: "model" in v and ("train_type" in v or "tuner_type" in v)),
    ("verl", lambda v: "actor_rollout_ref" in v or (isinstance(v.get("trainer"), dict) and "optim" in v)),
    ("Unsloth Studio", lambda v: isinstance(v.get("training"), dict) and isinstance(v.get("lora"), dict)),
)  # fmt: skip


def tool_of(values: Mapping[str, Any]) -> Tool:
    """Return the tool whose keys these are. A recipe of ours is one of Axolotl's, whose keys are ours as well.

    Raises RecipeError for the recipe of a tool that is not read.
    """
    if not isinstance(values.get("base_model"), str | None):
        return AXOLOTL_TOOL
    if "base_model" not in values or "task" in values:
        for name, is_its in _OTHER_TOOLS:
            if is_its(values):
                raise RecipeError(
                    f"this is a recipe of {name}, which is not read here: recipes of Axolotl, LLaMA-Factory and TRL "
                    "are. Write it anew: `finetuner schema --markdown` lists all keys."
                )
    if "base_model" in values:
        return AXOLOTL_TOOL
    named = set(values) if "model_name_or_path" in values else set(values) - set(KEYS) - set(MEANINGS)
    of_llama_factory, of_trl = len(_ONLY_LLAMA_FACTORY & named), len(_ONLY_TRL & named)
    if of_llama_factory > of_trl:
        return LLAMA_FACTORY_TOOL
    return TRL_TOOL if of_trl or "model_name_or_path" in values else AXOLOTL_TOOL
