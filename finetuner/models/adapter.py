"""LoRA through PEFT: which layers it adapts, and its weights as files that PEFT reads."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from finetuner.errors import ModelError
from finetuner.recipe.problems import did_you_mean
from finetuner.recipe.sections import AdapterSection

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer but the output head


def add_lora(
    model: "PreTrainedModel",
    section: AdapterSection,
    *,
    base_model: str,
    seed: int,
    new_token_ids: tuple[int, ...] = (),
) -> "PeftModel":
    """Freeze the model and add adapters, the same on every rank (B is zero, A is drawn from `seed`).

    Rows of new tokens are trained as well: nothing else could teach the model what a token means that it never saw.
    """
    from peft import LoraConfig, get_peft_model

    targets = target_modules(model, None if section.lora_target_linear else section.lora_target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.lora_r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=targets,
        trainable_token_indices=_rows_to_train(model, new_token_ids),
    )
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base_model
    return adapted


def target_modules(model: "PreTrainedModel", names: Iterable[str] | None) -> str | list[str]:
    """`names` as PEFT takes them. Raises ModelError for a name that matches no linear layer, or a head that is tied."""
    if names is None or list(names) in ([ALL_LINEAR], ["all_linear"]):
        return ALL_LINEAR
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    endings = sorted({name.rpartition(".")[2] for name in linear})
    wanted = list(names)
    for name in wanted:
        if not any(layer == name or layer.endswith("." + name) for layer in linear):
            raise ModelError(
                f"lora_target_modules names '{name}', but no linear layer of the model ends with that."
                f"{did_you_mean(name, endings)}\nIts linear layers are: {', '.join(endings)}."
            )
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    for layer in linear if tied else ():
        if model.get_submodule(layer) is head and any(layer == n or layer.endswith("." + n) for n in wanted):
            raise ModelError(
                f"'{layer}' is tied to the embedding: an adapter on it alone could not be merged. Remove it from "
                "lora_target_modules."
            )
    return wanted


def _rows_to_train(model: "PreTrainedModel", ids: tuple[int, ...]) -> dict[str, list[int]] | None:
    if not ids:
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    rows = {names[embedding].rpartition(".")[2]: list(ids)}
    if head is not None and head.weight is not embedding.weight:  # a tied head follows the embedding by itself
        rows[names[head].rpartition(".")[2]] = list(ids)
    return rows


def adapter_tensors(model: "PeftModel", values: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's file names; nothing of the frozen base is among them.

    `values`: whole tensors by the names of the model's own parameters, where the model holds only parts of them.
    """
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(model, state_dict=values, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write_adapter(model: "PeftModel", folder: Path, values: dict[str, torch.Tensor]) -> None:
    """adapter_model.safetensors and adapter_config.json, as `peft.PeftModel.from_pretrained` reads them."""
    from safetensors.torch import save_file

    save_file(adapter_tensors(model, values), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))


def read_adapter(model: "PeftModel", folder: Path) -> None:
    """Load what write_adapter wrote. Raises ModelError unless every adapter tensor of the model is in it."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    wanted = adapter_tensors(model)
    different = sorted(set(tensors) ^ set(wanted)) or [n for n in wanted if wanted[n].shape != tensors[n].shape]
    if different:
        raise ModelError(
            f"the adapter in {folder} is not of this model and recipe: '{different[0]}' and {len(different) - 1} more "
            "tensors differ. Use the recipe that it was trained with."
        )
    set_peft_model_state_dict(model, tensors)
