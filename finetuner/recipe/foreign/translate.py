"""Rewrites a document with another tool's keys into one with ours, with a note or a problem for each."""

import json
from collections.abc import Mapping
from typing import Any

from finetuner.recipe.foreign.axolotl import AXOLOTL, PLUGINS, UNSUPPORTED_VALUES
from finetuner.recipe.foreign.base import Foreign, blocked, renamed
from finetuner.recipe.foreign.entries import SAME_TEMPLATES, translate_entries
from finetuner.recipe.foreign.rewordings import reword_after, reword_before
from finetuner.recipe.problems import KeyPath, Note, Problem, did_you_mean
from finetuner.recipe.schema import FACTS, KEYS, NOT_YET
from finetuner.recipe.yaml_document import YamlDocument

# Every key that is not ours and still understood.
MEANINGS: dict[str, Foreign] = {
    key: meaning
    for key, meaning in (AXOLOTL | {key: blocked(capability) for key, capability in NOT_YET.items()}).items()
    if key not in KEYS
} | {alias: renamed(key) for key, facts in FACTS.items() for alias in facts.aliases}
ALIASES: dict[str, str] = {key: meaning.becomes for key, meaning in MEANINGS.items() if meaning.becomes}

# Axolotl's older or longer names of values that are ours.
VALUES: Mapping[str, Mapping[Any, Any]] = {
    "optimizer": {
        "adamw_hf": "adamw_torch",
        "adamw_8bit": "adamw_bnb_8bit",
        "ao_adamw_8bit": "adamw_torch_8bit",
        "ao_adamw_4bit": "adamw_torch_4bit",
        "adamw_torch_fp8": "ao_adamw_fp8",
        "paged_adamw": "paged_adamw_32bit",
        "lion_pytorch": "lion_32bit",
        "lion": "lion_32bit",
        "paged_lion": "paged_lion_32bit",
    },
    "lr_scheduler": {"constant_with_warmup": "constant"},
    "bf16": {"full": True},
    "attn_implementation": {
        "xformers": "sdpa",
        "flash_attention": "flash_attention_2",
        # the same attention by other kernels
        **dict.fromkeys(
            (
                "flex_attention",
                "flash_attention_3",
                "flash_attention_4",
                "kernels-community/flash-attn2",
                "kernels-community/flash-attn3",
                "kernels-community/vllm-flash-attn3",
            ),
            "auto",
        ),
    },
    "activation_offloading": {"legacy": True, "hidden_states": True},
    "saves_per_epoch": {0: None},
    "eval_steps": {0: None},
    "save_steps": {0: None},
    "early_stopping_patience": {0: None},
    "tf32": {"auto": True},
    "chat_template": SAME_TEMPLATES,
    "max_steps": {0: None, -1: None},
    "neftune_noise_alpha": {0: None},
    "loss_watchdog_threshold": {0: None},
    # without CUDA graphs, which change the speed alone
    "torch_compile_mode": {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"},
}


# Keys of older recipes that stand in a block now: key -> (block, the block's key).
MOVED_INTO = (
    {"fsdp_final_state_dict_type": ("fsdp_config", "final_state_dict_type")}
    | {
        key: ("bnb_config_kwargs", key)
        for key in (
            "bnb_4bit_quant_type",
            "bnb_4bit_use_double_quant",
            "bnb_4bit_compute_dtype",
            "bnb_4bit_quant_storage",
        )
    }
    | {key: ("overrides_of_model_config", key) for key in ("rope_scaling", "rope_theta")}
)


def translate(document: YamlDocument, meanings: Mapping[str, Foreign] = MEANINGS) -> list[Note]:
    """Rewrite the document's values in place, so that only our keys and unknown ones are left; return the notes."""
    translation = Translation(document)
    reword_before(translation, AXOLOTL if meanings is MEANINGS else None)
    translation.blocks()
    for key in list(document.values):
        if key == "plugins":
            translation.plugins()
        elif key in meanings:
            translation.key((), key, meanings[key])
    translate_entries(translation)
    translation.fsdp1()
    translation.values()
    reword_after(translation)
    return translation.notes


_WORDS_OF_TRUTH = ("yes", "no", "on", "off")


class Translation:
    """The rewriting of one document; `notes` grows as it goes."""

    def __init__(self, document: YamlDocument) -> None:
        self.document = document
        self.notes: list[Note] = []

    def key(self, block: KeyPath, key: str, meaning: Foreign) -> None:
        """Rewrite one key of the block at `block`, which is () for the recipe itself."""
        values = self._block(block)
        path, value = (*block, key), values[key]
        origin = self.document.origin(path, of_key=True)
        if meaning.unsupported is not None:
            if not meaning.is_off(value):
                message = f"'{key}' is not supported yet: {meaning.unsupported}. {meaning.instead}"
                self.document.problems.append(Problem(message, origin))
            else:
                self.notes.append(Note((key,), "left out: it says what holds anyway", origin, quiet=True))
        elif meaning.without_effect is not None:
            loud = meaning.loud and not meaning.is_off(value)
            self.notes.append(Note((key,), f"without effect: {meaning.without_effect}", origin, quiet=not loud))
        elif meaning.becomes is not None:
            self._move(path, (*block, meaning.becomes))
            return
        elif value is not None and meaning.translate is not None:
            try:
                if isinstance(value, str) and value.lower() in _WORDS_OF_TRUTH:
                    raise TypeError  # `bfloat16: off` is a text in YAML 1.2, which would be taken for true
                meant = meaning.translate(value)
            except (AttributeError, KeyError, TypeError):  # a number where the other tool has text, or the like
                self.document.problems.append(Problem(_wrong_value(key, value), origin))
            else:
                del values[key]  # before ours are put in: `max_steps: -1` is a foreign key and one of ours
                self._replace(path, meant)
                return
        del values[key]

    def plugins(self) -> None:
        """Note Axolotl's plugins that have a counterpart here; any other is a problem."""
        named = self.document.values.pop("plugins")
        origin = self.document.origin(("plugins",), of_key=True)
        for i, name in enumerate(named if isinstance(named, list) else [named] if named else []):
            if str(name) in PLUGINS:
                self.notes.append(
                    Note((str(name).rpartition(".")[2],), f"without effect: {PLUGINS[str(name)]}", origin)
                )
            else:
                message = (
                    f"the plugin '{name}' is not supported yet: plugins of other tools are not run here. Remove it."
                )
                place = self.document.origin(("plugins", i))
                self.document.problems.append(Problem(message + did_you_mean(str(name), PLUGINS), place))

    def values(self) -> None:
        """Rewrite values that another tool spells otherwise, and refuse those that it alone can do."""
        for key, refused in UNSUPPORTED_VALUES.items():
            value = self.document.values.get(key)
            if isinstance(value, str) and value in refused:
                message = f"{key}: '{value}' is not supported yet: {refused[value]}."
                self.document.problems.append(Problem(message, self.document.origin((key,))))
                del self.document.values[key]
                if key == "optimizer":
                    self.document.values.pop("optim_args", None)  # they are that optimizer's
        self.fractions()
        self.offloading()
        for key, spellings in VALUES.items():
            value = self.document.values.get(key)
            if isinstance(value, bool | list | dict) or value not in spellings:
                continue
            self.document.values[key] = spellings[value]
            said = str(spellings[value]).lower() if isinstance(spellings[value], bool) else f"'{spellings[value]}'"
            meant = "the default" if spellings[value] is None else said
            self.notes.append(Note((key,), f"'{value}' is read as {meant}", self.document.origin((key,))))

    def blocks(self) -> None:
        """Move keys that older recipes have at the top level, or in another block."""
        self._tokens_with_a_role()
        values = self.document.values
        arguments = values.get("optim_args")
        for key, ours in (("eps", "adam_epsilon"), ("weight_decay", "weight_decay")):
            if isinstance(arguments, dict) and key in arguments:
                self._move(("optim_args", key), (ours,))
        if "model_config" in values and any(values.get(key) is not None for key in ("rope_scaling", "rope_theta")):
            self._move(("model_config",), ("overrides_of_model_config",))  # their block, by its other name
        for key, target in MOVED_INTO.items():
            block = values.get(target[0])
            if key in values and (block is None or isinstance(block, dict)):
                values[target[0]] = {} if block is None else block
                self._move((key,), target)

    def _tokens_with_a_role(self) -> None:
        """`tokens: {pad_token: ...}` -> special_tokens."""
        values = self.document.values
        tokens, special = values.get("tokens"), values.get("special_tokens")
        if isinstance(tokens, dict) and (special is None or isinstance(special, dict)):
            values["special_tokens"] = {} if special is None else special
            for key in list(tokens):
                self._move(("tokens", key), ("special_tokens", key))
            del values["tokens"]

    def fsdp1(self) -> None:
        """Leave out what FSDP1 let people switch off, and FSDP2 always does."""
        config = self.document.values.get("fsdp_config")
        for key in ("use_orig_params", "fsdp_use_orig_params", "limit_all_gathers", "fsdp_limit_all_gathers"):
            if isinstance(config, dict) and config.get(key) is False:
                del config[key]
                where = self.document.origin(("fsdp_config", key), of_key=True)
                self.notes.append(Note((f"fsdp_config.{key}",), "without effect: FSDP2 always does this", where))

    def fractions(self) -> None:
        """Rewrite warmup_steps below 1, which transformers reads as a fraction of all steps."""
        values = self.document.values
        warmup = values.get("warmup_steps")
        if isinstance(warmup, float) and 0 < warmup < 1 and values.get("warmup_ratio") is None:
            self._move(("warmup_steps",), ("warmup_ratio",))

    def offloading(self) -> None:
        """Rewrite `gradient_checkpointing: offload`, the older spelling of what two keys say."""
        values, given = self.document.values, self.document.values.get("gradient_checkpointing")
        if given in ("offload", "unsloth"):
            where = ("gradient_checkpointing",)
            values["gradient_checkpointing"] = True
            self.notes.append(Note(where, f"'{given}' is read as true", self.document.origin(where)))
            self._replace(where, {"activation_offloading": True})

    def _block(self, path: KeyPath) -> dict[Any, Any]:
        block: Any = self.document.values
        for part in path:
            block = block[part]
        return block

    def move(self, path: KeyPath, target: KeyPath) -> None:
        """Give a key another name or place. One that is given under both is a problem."""
        self._move(path, target)

    def replace(self, path: KeyPath, meant: Mapping[str, Any]) -> None:
        """Put keys of ours in the place of the one at `path`, which stays to be deleted."""
        self._replace(path, meant)

    def _move(self, path: KeyPath, target: KeyPath) -> None:
        values, block, key, ours = self._block(path[:-1]), self._block(target[:-1]), path[-1], target[-1]
        origin = self.document.origin(path, of_key=True)
        if block.get(ours) is not None:
            if values[key] is not None:
                other = self.document.origin(target, of_key=True)
                message = f"'{key}' and '{ours}' are the same key. Remove one."
                self.document.problems.append(Problem(message, origin, (other,) if other else ()))
            del values[key]
            return
        block[ours] = values.pop(key)
        for table in (self.document.keys, self.document.places):
            for old in [p for p in table if p[: len(path)] == path]:
                table[(*target, *old[len(path) :])] = table.pop(old)
        if block[ours] is not None:
            self.notes.append(Note((str(key),), f"is read as {'.'.join(map(str, target))}", origin))

    def _replace(self, path: KeyPath, meant: Mapping[str, Any]) -> None:
        """Put our keys in the place of a foreign one (`flash_attention: true` -> attn_implementation).

        A key of ours that is given as well decides, unless both say what to train on.
        """
        origin = self.document.origin(path, of_key=True)
        for key, value in meant.items():
            given = self.document.values.get(key)
            if key == "datasets" and given is not None:
                also = self.document.origin((key,), of_key=True)
                message = f"'{path[-1]}' and '{key}' both say what to train on. Remove one; here it is called {key}."
                self.document.problems.append(Problem(message, origin, (also,) if also else ()))
                return
            said = f"{key}: {value if isinstance(value, str) else json.dumps(value)}"
            if given is not None:
                self.notes.append(Note((str(path[-1]),), f"without effect: {key} is given", origin))
                continue
            self.document.values[key] = value
            if origin is not None:
                self.document.keys[(key,)] = self.document.places[(key,)] = origin
            self.notes.append(Note((str(path[-1]),), f"is read as `{said}`", origin))


def _wrong_value(key: str, value: Any) -> str:
    if isinstance(value, str) and value.lower() in _WORDS_OF_TRUTH:
        return f"{key} is the text '{value}', but must be true or false."
    return f"'{key}' has a value that its tool would not take."
