"""A base whose config.json the recipe changes: a folder with the changed file, and links to the others.

    <dataset_prepared_path>/configured/<key>/   config.json, and links to the weights of the base

Everything that reads a base reads that folder, so that training, evaluation and merging have one config, and the
results carry it.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuner.errors import ModelError
from finetuner.models.empty_model import meta_model
from finetuner.models.files import find_base
from finetuner.models.load import register_gpt
from finetuner.models.pickled_weights import safetensors_base
from finetuner.recipe.gpt_shape import FROM_SCRATCH
from finetuner.recipe.problems import did_you_mean
from finetuner.recipe.sections import ModelSection
from finetuner.storage.build_once import build_once
from finetuner.storage.disk_errors import explain_disk_errors
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_KEY = "overrides_of_model_config"
# Forms of the rotary embedding that older configs have at their top; transformers 5 keeps them in rope_parameters.
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta")


def prepared_base(section: ModelSection, prepared_path: str, world: World) -> str:
    """Return the recipe's base as it is loaded: with safetensors (see pickled_weights.py), and with the config that the
    recipe asks for. A hub id or a folder.

    Raises ModelError for weights that are not read, and for a config that cannot be changed like this.
    """
    base = safetensors_base(section, prepared_path, world)
    overrides = section.overrides_of_model_config
    if not overrides or base == FROM_SCRATCH:
        return base
    if section.trust_remote_code and not Path(base).is_dir():
        raise ModelError(
            f"{_KEY} needs the folder of a model that comes with code of its own. Download '{base}', and write "
            "`base_model: FOLDER`."
        )
    folder = find_base(base)
    config = changed_config(str(folder), overrides, trust_remote_code=section.trust_remote_code)
    facts = [str(folder.resolve()), config.to_json_string(use_diff=False)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    place = Path(prepared_path) / "configured" / key
    with explain_disk_errors(
        ModelError, f"cannot write to '{place.parent}'", "Make room, or name another folder: dataset_prepared_path=..."
    ):
        return str(build_once(place, lambda staging: _link(folder, config, staging), is_builder=world.local_rank == 0))


def require_known_overrides(section: ModelSection) -> None:
    """Raise ModelError, before rows are read, for a config that cannot be changed as the recipe says."""
    if section.overrides_of_model_config and section.base_model != FROM_SCRATCH:
        changed_config(
            section.base_model, section.overrides_of_model_config, trust_remote_code=section.trust_remote_code
        )


def changed_config(
    base_model: str, overrides: Mapping[str, Any], *, trust_remote_code: bool = False
) -> "PreTrainedConfig":
    """Return the config of a base (a folder or hub id) with the values of `overrides`.

    Raises ModelError for a key that the config lacks, a value of another type, and a change of the weights' shapes.
    """
    from transformers import AutoConfig

    register_gpt()
    try:
        before: Any = AutoConfig.from_pretrained(base_model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"the config.json of '{base_model}', which {_KEY} changes, cannot be read: {first}") from error
    after = copy.deepcopy(before)
    _apply(after, overrides, "")
    _require_same_shapes(before, after, overrides, trust_remote_code)
    return after


def _apply(config: Any, overrides: Mapping[str, Any], within: str) -> None:
    """Set the values on a config, and those of a block on the config that it names ("text_config")."""
    text = config.get_text_config()
    rope = {key: overrides[key] for key in _ROPE if key in overrides}
    if rope and isinstance(getattr(text, "rope_parameters", None), dict):
        _apply_rope(text, rope, within)  # first: a scaled rope remembers the length that the model was made for
        overrides = {key: value for key, value in overrides.items() if key not in rope}
    for key, value in overrides.items():
        name = within + key
        if key in _known_keys(config):
            owner = config
        elif key in _known_keys(text):
            owner = text
        else:
            known = {*_known_keys(config), *_known_keys(text), *_ROPE}
            raise ModelError(
                f"{_KEY}: the config of {type(config).__name__.removesuffix('Config')} has no key '{name}'."
                f"{did_you_mean(key, sorted(known))}"
            )
        inner = getattr(owner, key, None)
        if isinstance(value, Mapping) and hasattr(inner, "to_dict"):
            _apply(inner, value, f"{name}.")
            continue
        _set(owner, key, value, name)


def _set(config: Any, key: str, value: Any, name: str) -> None:
    old = getattr(config, key, None)
    message = f"{_KEY}: {name} is {value!r}, which the config does not take; in the base it is {old!r}."
    if isinstance(old, bool) != isinstance(value, bool) and old is not None and value is not None:
        raise ModelError(message)
    try:
        config.update({key: value})
    except Exception as error:  # transformers checks the types of what it knows, and has errors of its own for it
        raise ModelError(f"{message}\n{str(error).strip().splitlines()[-1].strip()}") from error


def _known_keys(config: Any) -> set[str]:
    return {*config.to_dict(), *config.attribute_map} - {"transformers_version", "_name_or_path"}


def _apply_rope(config: Any, given: Mapping[str, Any], within: str) -> None:
    """Set rope_parameters from itself, or from rope_scaling and rope_theta, which older recipes and configs have."""
    old = copy.deepcopy(config.rope_parameters)
    if config.nested_rope_parameter_keys(old) and set(given) != {"rope_parameters"}:
        kinds = ", ".join(config.nested_rope_parameter_keys(old))
        raise ModelError(
            f"{_KEY}: this model has a rotary embedding for each kind of layer. Write `rope_parameters` with a block "
            f"for each of: {kinds}."
        )
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(given.get(key) or {}, dict):
            raise ModelError(f"{_KEY}: {within}{key} is {given[key]!r}, but must be a block of keys.")
    theta = old.get("rope_theta")
    new = copy.deepcopy(given.get("rope_parameters") or old)
    if "rope_scaling" in given:
        new = {"rope_theta": theta, **(given["rope_scaling"] or {})}
    if "rope_theta" in given:
        new["rope_theta"] = given["rope_theta"]
    if not config.nested_rope_parameter_keys(new):
        new.setdefault("rope_theta", theta)
        kind = new.pop("type", None)  # the key's name before rope_type
        new.setdefault("rope_type", kind or "default")
    _require_rope(new, config.nested_rope_parameter_keys(new))
    try:
        config.rope_parameters = new
        config.standardize_rope_params()
        config.validate_rope()
    except Exception as error:
        raise ModelError(f"{_KEY}: this rotary embedding is none that transformers knows: {error}") from error


def _require_rope(parameters: Mapping[str, Any], kinds: list[str]) -> None:
    """Raise ModelError for a kind of rotary embedding that transformers lacks, and for numbers that are none."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    known = ["default", *ROPE_INIT_FUNCTIONS]
    for block in [parameters[kind] or {} for kind in kinds] or [parameters]:
        kind, theta = block.get("rope_type", "default"), block.get("rope_theta")
        if kind not in known:
            raise ModelError(
                f"{_KEY}: rope_type is '{kind}', but must be one of: {', '.join(known)}.{did_you_mean(kind, known)}"
            )
        for name, value in (("rope_theta", theta), ("factor", block.get("factor"))):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
                raise ModelError(f"{_KEY}: {name} is {value!r}, but must be a number above 0.")


def _require_same_shapes(before: Any, after: Any, overrides: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Raise ModelError if a model of the config `after` would not have the weights of `before`."""
    try:
        shapes = [_shapes(copy.deepcopy(config), trust_remote_code) for config in (before, after)]
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{_KEY}: no model can be built with these values: {first}") from error
    if shapes[0] == shapes[1]:
        return
    names = sorted(name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    old, new = (shape.get(names[0], "not there") for shape in shapes)
    raise ModelError(
        f"{_KEY}: {', '.join(overrides)} would change the weights themselves: '{names[0]}' is {old} in the base, and "
        f"would be {new}. The base's weights would not fit. Leave out what changes sizes, or train from scratch."
    )


def _shapes(config: Any, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    model = meta_model(config, dtype=torch.float32, attention=("sdpa", "eager"), trust_remote_code=trust_remote_code)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _link(folder: Path, config: "PreTrainedConfig", staging: Path) -> None:
    """Write `config` to `staging`, and links to every other file of the base."""
    for path in sorted(folder.iterdir()):
        if path.name != "config.json" and not path.name.startswith("."):
            (staging / path.name).symlink_to(path.resolve())
    config.save_pretrained(staging)
