"""A trained model written as an ordinary model folder: config.json, safetensors, generation_config.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuner.models.gpt_conversion import is_portable, portable_config, portable_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def use_token_ids(model: "PreTrainedModel", token_ids: dict[str, int]) -> None:
    """Write the special tokens that the recipe chose into the model's configs, by role ("eos_token_id"): generation has
    to stop at the right one."""
    for role, token_id in token_ids.items():
        model.config.update({role: token_id})
        if model.generation_config is not None:
            model.generation_config.update(**{role: token_id})


def write_model_folder(
    model: "PreTrainedModel", folder: Path, values: Mapping[str, torch.Tensor], *, portable: bool = False
) -> None:
    """Write a model folder with the configs of `model` and `values` for its weights.

    `values`: full tensors, any shape, by the model's parameter names; the model's own may be sharded or empty.
    `portable`: write a GPT of ours as the Llama or GPT-2 that it is, for tools that have no code of ours; one that is
    neither stays as it is, and its config says so.
    """
    if portable and model.config.model_type == "finetuner_gpt":
        model, values = _portable(model, values)
    model.save_pretrained(folder, state_dict=dict(values))
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    dtypes = {str(v.dtype).removeprefix("torch.") for v in values.values() if v.is_floating_point()}
    if len(dtypes) == 1:
        config["dtype"] = dtypes.pop()  # transformers wrote that of the live weights
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _portable(
    model: "PreTrainedModel", values: Mapping[str, torch.Tensor]
) -> "tuple[PreTrainedModel, Mapping[str, torch.Tensor]]":
    """The Llama or GPT-2 that a GPT of ours is, on the meta device, and the tensors by its names; or both as given."""
    from transformers import AutoModelForCausalLM

    config: Any = model.config
    if not is_portable(config):
        return model, values
    with torch.device("meta"):
        other: Any = AutoModelForCausalLM.from_config(portable_config(config))
    if model.generation_config is not None:
        other.generation_config = model.generation_config
    return other, portable_weights(config, values)


def portability_notes(model: "PreTrainedModel") -> list[str]:
    """Return notes for the user on a model that write_model_folder cannot write for other tools."""
    config: Any = model.config
    if config.model_type != "finetuner_gpt" or is_portable(config):
        return []
    return [
        f"no other tool has a model with norm {config.norm}, activation {config.activation}, positions "
        f"{config.positions} and bias {str(config.bias).lower()}: only finetuner reads it"
    ]
