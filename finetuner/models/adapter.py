"""LoRA through PEFT: put on a model, and its weights as files that PEFT reads."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuner.errors import ModelError
from finetuner.models.embeddings import is_tied
from finetuner.models.lora_targets import LoraTargets, choose_targets
from finetuner.recipe.sections import AdapterSection

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def add_lora(
    model: "PreTrainedModel",
    section: AdapterSection,
    *,
    base_model: str,
    seed: int,
    new_token_ids: tuple[int, ...] = (),
) -> "PeftModel":
    """Freeze the model and add adapters, the same on every rank (B is zero, A is drawn from `seed`).

    The embedding rows of `new_token_ids` are trained as well: nothing else could teach the model what a token means
    that it was never trained on. Raises ModelError for targets that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    targets = choose_targets(model, section)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.lora_r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=targets.modules,
        modules_to_save=targets.modules_to_save or None,
        ensure_weight_tying=targets.tied_head,
        fan_in_fan_out=targets.fan_in_fan_out,
        use_rslora=section.peft_use_rslora,
        use_dora=section.peft_use_dora,
        init_lora_weights=section.peft_init_lora_weights,
        layers_to_transform=targets.blocks,
        layers_pattern=targets.block_lists,
        trainable_token_indices=_rows_to_train(model, new_token_ids, targets),
    )
    torch.manual_seed(seed)
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base_model
    return adapted


def _rows_to_train(model: "PreTrainedModel", ids: tuple[int, ...], targets: LoraTargets) -> dict[str, list[int]] | None:
    """Ending of a table's name -> rows to train: of the embedding and of an untied head (a tied one follows by itself),
    unless all their rows are trained. None: no rows."""
    if not ids:
        return None
    tables = [model.get_input_embeddings()]
    head = model.get_output_embeddings()
    if head is not None and not is_tied(model):
        tables.append(head)
    names = {module: name for name, module in model.named_modules()}
    saved = {name.rpartition(".")[2] for name in targets.modules_to_save}
    endings = [names[table].rpartition(".")[2] for table in tables]
    return {ending: list(ids) for ending in endings if ending not in saved} or None


def start_from_adapter(model: "PeftModel", folder: Path) -> None:
    """Load the weights of another run's adapter, which has to be of the same kind.

    Raises ModelError, with both values, where its settings are not the recipe's: the update would be another one.
    """
    saved: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    ours = model.peft_config["default"]
    different = [
        f"{key}: {saved.get(name)} there, {getattr(ours, name)} in the recipe"
        for name, key in _SAME_ADAPTER.items()
        if (saved.get(name) or False) != (getattr(ours, name) or False)
    ]
    if different:
        raise ModelError(
            f"the adapter in lora_model_dir '{folder}' is of another kind than the recipe's:\n  "
            + "\n  ".join(different)
            + "\nWrite its values into the recipe."
        )
    read_adapter(model, folder)


# PEFT's name -> ours, for the settings that make the same tensors another update.
_SAME_ADAPTER = {
    "r": "lora_r", "lora_alpha": "lora_alpha", "use_rslora": "peft_use_rslora", "use_dora": "peft_use_dora",
}  # fmt: skip


def adapter_tensors(model: "PeftModel", values: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors, any shape, on the CPU under PEFT's file names; nothing of the frozen base.

    `values`: full tensors by the names of the model's own parameters, where the model's own are sharded.
    """
    from peft import get_peft_model_state_dict

    if values is not None:  # a tied tensor has one name in it, and PEFT wants both
        live = model.state_dict(keep_vars=True)
        first = {id(live[name]): value for name, value in values.items()}
        values = {name: first[id(tensor)] for name, tensor in live.items() if id(tensor) in first}
    tensors = get_peft_model_state_dict(model, state_dict=values, save_embedding_layers=False)
    # Of a tied pair PEFT wants both halves in the file, and safetensors no two tensors in one memory.
    once = {tensor.data_ptr(): name for name, tensor in reversed(tensors.items())}
    tensors = {name: t if once[t.data_ptr()] == name else t.clone() for name, t in tensors.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write_adapter(model: "PeftModel", folder: Path, values: dict[str, torch.Tensor] | None = None) -> None:
    """Write adapter_model.safetensors and adapter_config.json, as `peft.PeftModel.from_pretrained` reads them.

    `values`: full tensors, any shape, as adapter_tensors takes them."""
    from safetensors.torch import save_file

    save_file(adapter_tensors(model, values), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))


def read_adapter(model: "PeftModel", folder: Path) -> None:
    """Load the weights that write_adapter wrote. Raises ModelError unless they are those of this model's adapter."""
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
