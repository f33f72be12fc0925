"""The modules of a model that an adapter adapts, and those that are trained in full (modules_to_save)."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from finetuner.errors import ModelError
from finetuner.models.embeddings import is_tied
from finetuner.recipe.problems import did_you_mean
from finetuner.recipe.sections.adapter import PEFT_DEFAULT, AdapterSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the output head


@dataclass(frozen=True)
class LoraTargets:
    """Arguments of PEFT's LoraConfig: `modules` are adapted, `modules_to_save` are trained in full.

    `fan_in_fan_out` says how the adapted layers store their weights, `tied_head` that embedding and head are one
    tensor of which one is among `modules_to_save`: the other then follows it. `blocks` are the numbers of the decoder
    layers to adapt, counted in the lists that `block_lists` names.
    """

    modules: str | list[str]
    modules_to_save: list[str]
    fan_in_fan_out: bool
    tied_head: bool
    blocks: list[int] | None
    block_lists: list[str] | None


def choose_targets(model: "PreTrainedModel", section: AdapterSection) -> LoraTargets:
    """Find the recipe's targets in a model. Raises ModelError for a name, an expression or a block that matches
    nothing, and for layers that one adapter cannot have together."""
    names = None if section.lora_target_linear else section.lora_target_modules
    if names == PEFT_DEFAULT or names == (PEFT_DEFAULT,):
        names = default_targets(model)
    modules = target_modules(model, names)
    blocks = _blocks(section)
    if blocks is not None and modules == ALL_LINEAR:  # PEFT counts blocks only where layers have names
        modules = _endings(_adaptable(model))
    pattern = section.peft_layers_pattern
    block_lists = [pattern] if isinstance(pattern, str) else list(pattern) if pattern else None
    saved = modules_to_save(model, section.lora_modules_to_save or ())
    adapted = _adapted_layers(model, modules, blocks, block_lists)
    fan_in_fan_out = _fan_in_fan_out(model, adapted, section.lora_fan_in_fan_out)
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = is_tied(model) and any(model.get_submodule(n) in tables for n in saved)
    if tied:
        saved = [name for name in saved if model.get_submodule(name) not in tables]
        saved.append(_tied_name(model))
    return LoraTargets(modules, _as_peft_finds_them(model, saved), fan_in_fan_out, tied, blocks, block_lists)


def _fan_in_fan_out(model: "PreTrainedModel", adapted: list[nn.Module], wanted: bool | None) -> bool:
    """Return whether the adapted layers store (in, out). Raises ModelError if they differ, or the recipe says the
    other."""
    stored = {_stores_in_out(layer) for layer in adapted}
    if len(stored) > 1:
        raise ModelError(
            "the adapted layers store their weights in both orders, (in, out) and (out, in), which one adapter cannot "
            "have. Name layers of one kind in lora_target_modules."
        )
    found = stored == {True}
    if wanted is not None and wanted != found:
        raise ModelError(
            f"lora_fan_in_fan_out is {str(wanted).lower()}, but the adapted layers of {type(model).__name__} store "
            f"{'(in, out)' if found else '(out, in)'}: it must be {str(found).lower()}. Remove the key."
        )
    return found


def target_modules(model: "PreTrainedModel", names: tuple[str, ...] | str | None) -> str | list[str]:
    """Return `names` as PEFT takes them: ALL_LINEAR, a regular expression, or the endings of layers' names.

    Raises ModelError for a name that matches no linear layer, or a head that is tied.
    """
    if names is None or names in (ALL_LINEAR, "all_linear") or list(names) in ([ALL_LINEAR], ["all_linear"]):
        return ALL_LINEAR
    linear = _linear(model)
    if isinstance(names, str):
        _require_linear_layers_only(model, names, linear)
    else:
        for name in names:
            _require_a_linear_layer(name, linear)
    head = model.get_output_embeddings()
    for layer in _matching(linear, names) if is_tied(model) else ():
        if model.get_submodule(layer) is head:
            raise ModelError(
                f"'{layer}' is tied to the embedding: an adapter on it alone could not be merged. Remove it from "
                "lora_target_modules."
            )
    return names if isinstance(names, str) else list(names)


def default_targets(model: "PreTrainedModel") -> tuple[str, ...] | str:
    """Return the layers that PEFT adapts in this architecture when none are named: q_proj and v_proj of a Llama.

    Raises ModelError for an architecture that PEFT has no default for.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    kind = str(model.config.model_type)
    if kind not in DEFAULTS:
        raise ModelError(
            f"lora_target_modules is {PEFT_DEFAULT}, and PEFT has no default layers for the architecture '{kind}'.\n"
            f"Name them: the model's linear layers are {', '.join(_endings(_adaptable(model)))}."
        )
    names = DEFAULTS[kind]
    return names if isinstance(names, str) else tuple(names)


def _require_a_linear_layer(name: str, linear: list[str]) -> None:
    """Raise ModelError unless some linear layer's name ends with `name`."""
    if not any(_ends_with(layer, name) for layer in linear):
        endings = _endings(linear)
        raise ModelError(
            f"lora_target_modules names '{name}', but no linear layer of the model ends with that."
            f"{did_you_mean(name, endings)}\nIts linear layers are: {', '.join(endings)}."
        )


def _require_linear_layers_only(model: "PreTrainedModel", expression: str, linear: list[str]) -> None:
    """Raise ModelError unless the expression matches a linear layer's full name, and no other module's."""
    endings = _endings(linear)
    matched = [name for name, _ in model.named_modules() if re.fullmatch(expression, name)]
    if not set(matched) & set(linear):
        raise ModelError(
            f"lora_target_modules is the text '{expression}', a regular expression that the whole name of a layer has "
            f"to match, and no linear layer does.\nTheir names end in: {', '.join(endings)}. For one ending write "
            f"a list: [{endings[0]}]."
        )
    others = [name for name in matched if name not in linear]
    if others:
        raise ModelError(
            f"lora_target_modules '{expression}' matches '{others[0]}' too, which is not a linear layer. End the "
            f"expression with the layers' own names: {', '.join(endings)}."
        )


def modules_to_save(model: "PreTrainedModel", names: tuple[str, ...]) -> list[str]:
    """Return the full names of the modules that `names` are the endings of. Raises ModelError for a name that no module
    ends with."""
    modules = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    found: dict[str, None] = {}
    for name in names:
        matching = [module for module in modules if _ends_with(module, name)]
        if not matching:
            endings = _endings(modules)
            raise ModelError(
                f"lora_modules_to_save names '{name}', but no module of the model ends with that."
                f"{did_you_mean(name, endings)}\nIts modules with weights are: "
                f"{', '.join(e for e in endings if not e.isdecimal())}."
            )
        found |= dict.fromkeys(matching)
    return list(found)


def _tied_name(model: "PreTrainedModel") -> str:
    """Return the embedding's name in a tied pair. Raises ModelError for a name by which PEFT does not know it: it would
    silently train the two apart."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    if name.rpartition(".")[2] != "embed_tokens":
        raise ModelError(
            f"the head of {type(model).__name__} is tied to '{name}', and PEFT can train a tied pair whole only where "
            "that is called embed_tokens. Remove it from lora_modules_to_save."
        )
    return name


def _as_peft_finds_them(model: "PreTrainedModel", names: list[str]) -> list[str]:
    """Return the endings of full `names`, which read better in a file, or the names themselves where PEFT, which takes
    "norm" for "input_layernorm" too, would find more."""
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    reached = [name for name, _ in model.named_modules() if name.endswith(tuple(short))]
    return short if short and sorted(reached) == sorted(names) else names


def _blocks(section: AdapterSection) -> list[int] | None:
    """The recipe's block numbers, each once; None: all blocks."""
    blocks = section.peft_layers_to_transform
    return None if blocks is None else [blocks] if isinstance(blocks, int) else sorted(set(blocks))


def _adapted_layers(
    model: "PreTrainedModel", modules: str | list[str], blocks: list[int] | None, block_lists: list[str] | None
) -> list[nn.Module]:
    """Return the layers that get an adapter. Raises ModelError for a block that the model does not have."""
    names = _adaptable(model) if modules == ALL_LINEAR else _matching(_linear(model), modules)
    if blocks is not None:
        numbers = {name: _block_number(name, block_lists) for name in names}
        known = sorted({number for number in numbers.values() if number is not None})
        missing = [block for block in blocks if block not in known]
        if missing:
            where = f" under peft_layers_pattern {', '.join(block_lists)}" if block_lists else ""
            raise ModelError(
                f"peft_layers_to_transform names block {missing[0]}, but the layers to adapt{where} are in blocks "
                f"{f'{known[0]} to {known[-1]}' if known else 'none'}."
            )
        names = [name for name in names if numbers[name] in blocks]
    return [model.get_submodule(name) for name in names]


def _matching(names: list[str], wanted: str | list[str] | tuple[str, ...]) -> list[str]:
    """Those of `names` that the expression matches in full, or that one of the endings ends."""
    if isinstance(wanted, str):
        return [name for name in names if re.fullmatch(wanted, name)]
    return [name for name in names if any(_ends_with(name, ending) for ending in wanted)]


def _block_number(name: str, block_lists: list[str] | None) -> int | None:
    """Return the block that PEFT counts a layer to: the first number in its name, or the one after a named list of
    blocks. None: no block."""
    patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in block_lists or ()] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for pattern in patterns if (match := re.match(pattern, name))), None)
    return int(found[1]) if found else None


def _linear(model: "PreTrainedModel") -> list[str]:
    """Full names of the linear layers, the head among them."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or _stores_in_out(module)]


def _adaptable(model: "PreTrainedModel") -> list[str]:
    """Full names of the linear layers without the head."""
    head = model.get_output_embeddings()
    return [name for name in _linear(model) if model.get_submodule(name) is not head]


def _stores_in_out(module: nn.Module) -> bool:
    """Return whether it is one of GPT-2's layers, which store (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _endings(names: list[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)
