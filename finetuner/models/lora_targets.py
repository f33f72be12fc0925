"""Which modules of a model an adapter changes, and which are trained whole."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from finetuner.errors import ModelError
from finetuner.recipe.problems import did_you_mean
from finetuner.recipe.sections import AdapterSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the output head


@dataclass(frozen=True)
class Targets:
    """What PEFT is told: `modules` are adapted, `whole` are trained whole.

    `fan_in_fan_out` says how the adapted layers store their weights, `tied_head` that embedding and head are one
    tensor of which one is among `whole`: the other then follows it.
    """

    modules: str | list[str]
    whole: list[str]
    fan_in_fan_out: bool
    tied_head: bool
    blocks: list[int] | None
    block_lists: list[str] | None


def choose_targets(model: "PreTrainedModel", section: AdapterSection) -> Targets:
    """Raises ModelError for a name, an expression or a block that matches nothing in the model."""
    names = None if section.lora_target_linear else section.lora_target_modules
    modules = target_modules(model, names)
    blocks = _blocks(section)
    if blocks is not None and modules == ALL_LINEAR:  # PEFT counts blocks only where layers have names
        modules = _endings(_adaptable(model))
    pattern = section.peft_layers_pattern
    block_lists = [pattern] if isinstance(pattern, str) else list(pattern) if pattern else None
    whole = whole_modules(model, section.lora_modules_to_save or ())
    adapted = _matched(model, modules, blocks, block_lists)
    stored = {_fans_in(layer) for layer in adapted}
    if len(stored) > 1:
        raise ModelError(
            "the adapted layers store their weights in both orders, (in, out) and (out, in), which one adapter cannot "
            "have. Name layers of one kind in lora_target_modules."
        )
    wanted, found = section.lora_fan_in_fan_out, stored == {True}
    if wanted is not None and wanted != found:
        raise ModelError(
            f"lora_fan_in_fan_out is {str(wanted).lower()}, but the adapted layers of {type(model).__name__} store "
            f"{'(in, out)' if found else '(out, in)'}: it must be {str(found).lower()}. Remove the key."
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = is_tied(model) and any(model.get_submodule(n) in (embedding, head) for n in whole)
    if tied:
        whole = [name for name in whole if model.get_submodule(name) not in (embedding, head)]
        whole.append(_tied_name(model))
    return Targets(modules, _as_peft_finds_them(model, whole), found, tied, blocks, block_lists)


def target_modules(model: "PreTrainedModel", names: tuple[str, ...] | str | None) -> str | list[str]:
    """`names` as PEFT takes them: ALL_LINEAR, a regular expression, or the ends of layers' names.

    Raises ModelError for a name that matches no linear layer, or a head that is tied.
    """
    if names is None or names in (ALL_LINEAR, "all_linear") or list(names) in ([ALL_LINEAR], ["all_linear"]):
        return ALL_LINEAR
    linear = _linear(model)
    endings = _endings(linear)
    wanted: str | list[str] = names if isinstance(names, str) else list(names)
    for name in wanted if isinstance(wanted, list) else ():
        if not any(_ends_with(layer, name) for layer in linear):
            raise ModelError(
                f"lora_target_modules names '{name}', but no linear layer of the model ends with that."
                f"{did_you_mean(name, endings)}\nIts linear layers are: {', '.join(endings)}."
            )
    if isinstance(wanted, str):
        reached = [name for name, _ in model.named_modules() if re.fullmatch(wanted, name)]
        if not set(reached) & set(linear):
            raise ModelError(
                f"lora_target_modules is the text '{wanted}', a regular expression that the whole name of a layer has "
                f"to match, and no linear layer does.\nTheir names end in: {', '.join(endings)}. For one ending write "
                f"a list: [{endings[0]}]."
            )
        others = [name for name in reached if name not in linear]
        if others:
            raise ModelError(
                f"lora_target_modules '{wanted}' matches '{others[0]}' too, which is not a linear layer. End the "
                f"expression with the layers' own names: {', '.join(endings)}."
            )
    head = model.get_output_embeddings()
    for layer in linear if is_tied(model) else ():
        named = re.fullmatch(wanted, layer) if isinstance(wanted, str) else any(_ends_with(layer, n) for n in wanted)
        if model.get_submodule(layer) is head and named:
            raise ModelError(
                f"'{layer}' is tied to the embedding: an adapter on it alone could not be merged. Remove it from "
                "lora_target_modules."
            )
    return wanted


def whole_modules(model: "PreTrainedModel", names: tuple[str, ...]) -> list[str]:
    """Full names of the modules that `names` end. Raises ModelError for a name that none has."""
    modules = [name for name, module in model.named_modules() if name and list(module.parameters())]
    found: list[str] = []
    for name in names:
        matching = [module for module in modules if _ends_with(module, name)]
        if not matching:
            endings = sorted({module.rpartition(".")[2] for module in modules})
            raise ModelError(
                f"lora_modules_to_save names '{name}', but no module of the model ends with that."
                f"{did_you_mean(name, endings)}\nIts modules with weights are: "
                f"{', '.join(e for e in endings if not e.isdecimal())}."
            )
        found += [module for module in matching if module not in found]
    return found


def is_tied(model: "PreTrainedModel") -> bool:
    """Whether the output head is the embedding's tensor."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _tied_name(model: "PreTrainedModel") -> str:
    """The embedding's name in a tied pair. Raises ModelError for a name by which PEFT does not know it: it would
    silently train the two apart."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    if name.rpartition(".")[2] != "embed_tokens":
        raise ModelError(
            f"the head of {type(model).__name__} is tied to '{name}', and PEFT can train a tied pair whole only where "
            "that is called embed_tokens. Remove it from lora_modules_to_save."
        )
    return name


def _as_peft_finds_them(model: "PreTrainedModel", whole: list[str]) -> list[str]:
    """Endings, which read better in a file, unless PEFT, which takes "norm" for "input_layernorm" too, finds more."""
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in whole))
    reached = [name for name, _ in model.named_modules() if name.endswith(tuple(short))]
    return short if short and sorted(reached) == sorted(whole) else whole


def _blocks(section: AdapterSection) -> list[int] | None:
    blocks = section.peft_layers_to_transform
    return None if blocks is None else [blocks] if isinstance(blocks, int) else sorted(set(blocks))


def _matched(
    model: "PreTrainedModel", modules: str | list[str], blocks: list[int] | None, block_lists: list[str] | None
) -> list[nn.Module]:
    """The layers that get an adapter. Raises ModelError for a block that the model does not have."""
    if modules == ALL_LINEAR:
        layers = _adaptable(model)
    elif isinstance(modules, str):
        layers = [name for name in _linear(model) if re.fullmatch(modules, name)]
    else:
        layers = [name for name in _linear(model) if any(_ends_with(name, m) for m in modules)]
    if blocks is not None:
        numbers = {name: _block_number(name, block_lists) for name in layers}
        known = sorted({number for number in numbers.values() if number is not None})
        for block in blocks:
            if block not in known:
                where = f" under peft_layers_pattern {', '.join(block_lists)}" if block_lists else ""
                raise ModelError(
                    f"peft_layers_to_transform names block {block}, but the layers to adapt{where} are in blocks "
                    f"{f'{known[0]} to {known[-1]}' if known else 'none'}."
                )
        layers = [name for name in layers if numbers[name] in blocks]
    return [model.get_submodule(name) for name in layers]


def _block_number(name: str, block_lists: list[str] | None) -> int | None:
    """As PEFT counts: the first number in a module's name, or the one behind a named list of blocks."""
    patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in block_lists or ()] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for pattern in patterns if (match := re.match(pattern, name))), None)
    return int(found[1]) if found else None


def _linear(model: "PreTrainedModel") -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) or _fans_in(module)]


def _adaptable(model: "PreTrainedModel") -> list[str]:
    """Every linear layer but the head."""
    head = model.get_output_embeddings()
    return [name for name in _linear(model) if model.get_submodule(name) is not head]


def _fans_in(module: nn.Module) -> bool:
    """GPT-2's layers, which store (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _endings(names: list[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)
