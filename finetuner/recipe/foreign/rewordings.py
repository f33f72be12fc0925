"""Rewrites what a recipe of Axolotl's says in several keys, or in a key that is read with another."""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from finetuner.recipe.foreign.axolotl_defaults import unlike_ours
from finetuner.recipe.foreign.base import Foreign
from finetuner.recipe.fsdp_prefix import drop_fsdp_prefix
from finetuner.recipe.problems import Note, Problem
from finetuner.recipe.schema import FACTS

if TYPE_CHECKING:
    from finetuner.recipe.foreign.translate import Translation

_OTHER_MODELS = ("Classification", "QuestionAnswering", "MaskedLM", "Seq2SeqLM", "RewardModel")
_ROWS_OF_A_PARAMETER = re.compile(r"\[\d*(:\d*)?\]$")  # "^model.embed_tokens.weight$[:32000]"
_SIGNS = 4  # of so many keys that are only Axolotl's, a recipe is one of Axolotl's
_OFF_WHEN_EMPTY = ("adapter", "chat_template", "deepspeed", "fsdp", "fsdp_config", "hub_model_id")
# accelerate's numbers of FSDP1's strategies
_STRATEGIES = {"1": "full_shard", "2": "shard_grad_op", "3": "no_shard", "4": "hybrid_shard", "5": "hybrid_shard_zero2"}
_TEXTS = ("deepspeed",)  # "" is a name of a file there, which is told that there is none
# Blocks in which null may say something: another program's file, and changes of the model's config.
_AS_IT_IS = ("deepspeed", "model_config", "overrides_of_model_config")


def reword_before(translation: "Translation", own: Mapping[str, Foreign] | None) -> None:
    """Rewrite what must be read before single keys are. `own`: Axolotl's keys, if the recipe is one of Axolotl's."""
    for key in drop_empty_values(translation.document.values):
        where = translation.document.origin((key,), of_key=True)
        translation.notes.append(Note((key,), "is empty, so nothing is sharded. FSDP is `fsdp: [full_shard]`", where))
    drop_fsdp_prefix(translation.document)  # a conversion begins here; a run did so before its overrides
    if own is not None:
        _other_defaults(translation, own)
    _more_special_tokens(translation)
    _total_batch(translation)
    _epochs_of_a_stream(translation)
    _parts_of_a_model(translation)


def reword_after(translation: "Translation") -> None:
    """Rewrite what is said in keys of ours."""
    _older_fsdp(translation)
    _no_evaluation(translation)
    _lora_on_4_bits(translation)
    _keys_of_no_adapter(translation)


def drop_empty_values(values: dict[str, Any]) -> list[str]:
    """Let `key:` with nothing behind it mean the default inside blocks too, and an engine's empty block no engine.

    Returns the engines' keys whose block was written empty.
    """
    empty_blocks = [key for key in ("fsdp_config", "deepspeed") if values.get(key) == {}]
    for key, value in values.items():
        if key not in _AS_IT_IS:
            _drop_nulls(value)
    for key in _OFF_WHEN_EMPTY:
        if values.get(key) in (([], {}) if key in _TEXTS else ("", [], {})):
            values[key] = None
    return empty_blocks


def _drop_nulls(value: Any) -> None:
    for key in [key for key in value if value[key] is None] if isinstance(value, dict) else ():
        del value[key]
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _drop_nulls(inner)


def _other_defaults(translation: "Translation", own: Mapping[str, Foreign]) -> None:
    """Note what a recipe of Axolotl's leaves to a default that is another one there."""
    values = translation.document.values
    if sum(key in own for key in values) >= _SIGNS:
        translation.notes += [Note((key,), message) for key, message in unlike_ours(values)]


def _more_special_tokens(translation: "Translation") -> None:
    """`special_tokens: {additional_special_tokens: [...]}` -> tokens."""
    document = translation.document
    special, tokens = document.values.get("special_tokens"), document.values.get("tokens") or []
    more = special.get("additional_special_tokens") if isinstance(special, dict) else None
    if not isinstance(special, dict) or not isinstance(more, list) or not isinstance(tokens, list):
        return
    origin = document.origin(("special_tokens", "additional_special_tokens"), of_key=True)
    del special["additional_special_tokens"]
    document.values["tokens"] = [*tokens, *(one for one in more if one not in tokens)]
    if origin is not None:
        document.keys.setdefault(("tokens",), origin)
        document.places.setdefault(("tokens",), origin)
    translation.notes.append(Note(("additional_special_tokens",), "is read as tokens: words of the vocabulary", origin))


def _total_batch(translation: "Translation") -> None:
    """Rewrite batch_size, which Axolotl divides by micro_batch_size, whatever the number of ranks.

    (utils.config, normalize_config.) One that cannot be divided is left to the table, which refuses it.
    """
    values = translation.document.values
    total, micro = values.get("batch_size"), values.get("micro_batch_size")
    if not isinstance(total, int) or not isinstance(micro, int) or min(total, micro) < 1 or total % micro:
        return
    steps, given = total // micro, values.get("gradient_accumulation_steps")
    if given in (None, steps):
        translation.replace(("batch_size",), {"gradient_accumulation_steps": steps} if given is None else {})
        del values["batch_size"]


def _epochs_of_a_stream(translation: "Translation") -> None:
    """Rewrite saves and evaluations per epoch of a pretraining_dataset as Axolotl does: an epoch is max_steps."""
    values = translation.document.values
    steps, epochs = values.get("max_steps"), values.get("num_epochs") or 1
    if not values.get("pretraining_dataset") or not isinstance(steps, int) or not isinstance(epochs, int | float):
        return
    for key, ours in (("saves_per_epoch", "save_steps"), ("evals_per_epoch", "eval_steps")):
        times = values.get(key)
        if isinstance(times, int) and times > 0 and (ours == "save_steps" or values.get("test_datasets")):
            translation.replace((key,), {ours: max(1, math.ceil(steps / (times * epochs)))})
            del values[key]


def _parts_of_a_model(translation: "Translation") -> None:
    """Refuse a model_type that is no language model, and rows of a parameter to train."""
    document = translation.document
    patterns = document.values.get("unfrozen_parameters")
    for i, pattern in enumerate(patterns if isinstance(patterns, list) else ()):
        if isinstance(pattern, str) and _ROWS_OF_A_PARAMETER.search(pattern):
            message = (
                f"unfrozen_parameters: '{pattern}' is not supported yet: some rows of a parameter. Name all of it."
            )
            document.problems.append(Problem(message, document.origin(("unfrozen_parameters", i))))
    name = document.values.get("model_type")
    if isinstance(name, str) and name.endswith(_OTHER_MODELS):
        message = f"model_type: '{name}' is not supported yet: models other than those of the next token. Remove it."
        document.problems.append(Problem(message, document.origin(("model_type",))))


def _older_fsdp(translation: "Translation") -> None:
    """Read FSDP1's numbers of strategies, and leave out when it gathered, which changes the speed alone."""
    document = translation.document
    config = document.values.get("fsdp_config")
    if not isinstance(config, dict):
        return
    number = str(config.get("sharding_strategy"))
    if number in _STRATEGIES:
        config["sharding_strategy"] = _STRATEGIES[number]
        where = document.origin(("fsdp_config", "sharding_strategy"))
        message = f"{number} is read as {_STRATEGIES[number]}"
        translation.notes.append(Note(("fsdp_config.sharding_strategy",), message, where))
    if "backward_prefetch" in config and str(config["backward_prefetch"]).upper() in (
        "BACKWARD_POST",
        "NO_PREFETCH",
        "NONE",
    ):
        del config["backward_prefetch"]
        where = document.origin(("fsdp_config", "backward_prefetch"), of_key=True)
        message = "without effect: FSDP2 always gathers the next layer early, with the same result"
        translation.notes.append(Note(("fsdp_config.backward_prefetch",), message, where))


def _no_evaluation(translation: "Translation") -> None:
    """`evals_per_epoch: 0` is no evaluation, unless eval_steps says when."""
    values = translation.document.values
    if values.get("evals_per_epoch") == 0 and not isinstance(values["evals_per_epoch"], bool):
        translation.replace(("evals_per_epoch",), {} if values.get("eval_steps") else {"eval_strategy": "no"})
        del values["evals_per_epoch"]


def _keys_of_no_adapter(translation: "Translation") -> None:
    """Leave out an adapter's keys beside an empty `adapter:`, the boilerplate of templates."""
    document = translation.document
    if "adapter" not in document.values or document.values["adapter"] is not None:
        return
    for key in [key for key in document.values if key in FACTS and FACTS[key].needs == "lora"]:
        if document.values.pop(key) not in (None, False):
            message = "without effect: adapter is empty, so every weight is trained"
            translation.notes.append(Note((key,), message, document.origin((key,), of_key=True)))


def _lora_on_4_bits(translation: "Translation") -> None:
    """Write QLoRA for LoRA on a 4-bit base, which Axolotl and others say in two keys."""
    values = translation.document.values
    if values.get("load_in_4bit") is True and values.get("adapter") == "lora":
        values["adapter"] = "qlora"
        message = "'lora' is read as 'qlora': load_in_4bit is true"
        translation.notes.append(Note(("adapter",), message, translation.document.origin(("adapter",))))
