"""What a checkpoint and a result hold beside the state: written and read side by side.

A checkpoint has the adapter (LoRA) or the whole model in fp32, the optimizer's state, the loss scaler's under fp16,
and the tokenizer. It is one file of each that the main rank writes, or parts that every rank writes; in both forms any
engine on any number of ranks goes on from it. A result is the same without the optimizer, and a full model in the number
format it ran in.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetuner.checkpoint import written_aside
from finetuner.errors import CheckpointError
from finetuner.models.adapter import write_adapter
from finetuner.models.build import use_token_ids, write_model_folder
from finetuner.models.loss import TokenLoss
from finetuner.output import move_into
from finetuner.training.loop import Run
from finetuner.training.optimizer import optimizer_tensors
from finetuner.training.parts import Parts, has_parts, write_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MODEL_PART, OPTIMIZER_PART = "model/", "optimizer/"  # what a name in a part file begins with


@dataclass(frozen=True)
class Weights:
    """The trained parts of a run. `token_ids`: the special tokens that the recipe changes, by role."""

    run: Run
    bare: TokenLoss
    parameters: dict[str, nn.Parameter]
    tokenizer: "PreTrainedTokenizerBase"
    is_lora: bool
    token_ids: dict[str, int]


@dataclass(frozen=True)
class Gathered:
    """Whole tensors on the CPU of the main rank; empty on the others."""

    model: dict[str, torch.Tensor]  # by the names of the model in TokenLoss; of a LoRA run the adapter alone
    optimizer: dict[str, torch.Tensor]


def gather(weights: Weights, *, optimizer: bool) -> Gathered:
    """Called by all ranks together."""
    engine = weights.run.engine
    model = engine.whole(model_tensors(weights))
    return Gathered(model, engine.optimizer_state(weights.parameters) if optimizer else {})


def model_tensors(weights: Weights) -> dict[str, torch.Tensor]:
    """What is saved of the model, as this rank holds it; a tied tensor under its first name."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in weights.bare.model.state_dict(keep_vars=True).items():
        if tensor.requires_grad or not weights.is_lora:
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def write_parts(weights: Weights, folder: Path) -> None:
    """A checkpoint in parts, called by all ranks together: each writes what it holds into `folder`, once the main rank
    has made it."""
    accelerator = weights.run.accelerator
    accelerator.wait_for_everyone()
    tensors = {MODEL_PART + name: tensor for name, tensor in model_tensors(weights).items()}
    state = optimizer_tensors(weights.run.engine.optimizer, weights.parameters, on_cpu=False)
    write_part(folder, tensors | {OPTIMIZER_PART + name: tensor for name, tensor in state.items()})
    if accelerator.is_main_process:
        model: Any = weights.bare.model
        (model.peft_config["default"] if weights.is_lora else model.config).save_pretrained(str(folder))
        weights.tokenizer.save_pretrained(folder)
    accelerator.wait_for_everyone()


@torch.no_grad()
def read_parts(model: nn.Module, folder: Path, *, trained_only: bool) -> None:
    """Copy a checkpoint in parts into a model that is still whole."""
    parts = Parts(folder, MODEL_PART)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad or not trained_only}
    missing = sorted(set(wanted) - set(parts)) or [n for n in wanted if parts[n].shape != wanted[n].shape]
    if missing:
        raise CheckpointError(
            f"the checkpoint {folder} is not of this model and recipe: '{missing[0]}' and {len(missing) - 1} more "
            "tensors differ. Use the recipe that it was written with."
        )
    for name, parameter in wanted.items():
        parameter.copy_(parts[name])


def write_checkpoint(weights: Weights, gathered: Gathered, folder: Path) -> None:
    """By the main rank alone."""
    write_model(weights, gathered.model, folder)
    save_file(gathered.optimizer, folder / "optimizer.safetensors")
    scaler = weights.run.accelerator.scaler
    if scaler is not None:
        (folder / "scaler.json").write_text(json.dumps(scaler.state_dict()))


def read_optimizer(weights: Weights, folder: Path) -> None:
    """Load the optimizer and scaler that a checkpoint has, by all ranks; the model was built from the same folder."""
    if has_parts(folder):
        tensors: Mapping[str, torch.Tensor] = Parts(folder, OPTIMIZER_PART)
    else:
        tensors = load_file(folder / "optimizer.safetensors")
    weights.run.engine.load_optimizer_state(weights.parameters, tensors)
    scaler = weights.run.accelerator.scaler
    if scaler is not None and (folder / "scaler.json").exists():
        scaler.load_state_dict(json.loads((folder / "scaler.json").read_text()))


def write_model(weights: Weights, values: dict[str, torch.Tensor], folder: Path) -> None:
    model: Any = weights.bare.model
    if weights.is_lora:
        write_adapter(model, folder, values)
    else:
        use_token_ids(model, weights.token_ids)
        write_model_folder(model, folder, values)
    weights.tokenizer.save_pretrained(folder)


def write_result(weights: Weights, output_dir: Path, dtype: torch.dtype) -> None:
    """The result, into output_dir itself, a full model in `dtype`. Called by all ranks together."""
    values = gather(weights, optimizer=False).model
    if not weights.run.accelerator.is_main_process:
        return
    if not weights.is_lora:
        values = {name: v.to(dtype) if v.is_floating_point() else v for name, v in values.items()}
    with written_aside(output_dir / "final.tmp") as aside:
        write_model(weights, values, aside)
    move_into(output_dir / "final.tmp", output_dir, last=result_mark(output_dir, weights.is_lora).name)
    (output_dir / "final.tmp").rmdir()


def result_mark(output_dir: Path, is_lora: bool) -> Path:
    """The file whose presence says that the result is complete: removed before the first step, written last."""
    return output_dir / ("adapter_config.json" if is_lora else "config.json")


def checkpoint_bytes(num_trained: int) -> int:
    """Every trained parameter and AdamW's two moments of it, in fp32."""
    return 12 * num_trained
