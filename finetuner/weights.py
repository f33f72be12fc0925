"""What a checkpoint and a result hold beside the state: written and read side by side.

A checkpoint has the adapter (LoRA) or the whole model in fp32, the optimizer's state, the loss scaler's under fp16,
and the tokenizer. A result is the same without the optimizer, and a full model in the number format it ran in.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetuner.checkpoint import checkpoint_folder, damage, written_aside
from finetuner.errors import CheckpointError
from finetuner.models.adapter import read_adapter, write_adapter
from finetuner.models.build import cast_weights, use_token_ids
from finetuner.models.loss import TokenLoss
from finetuner.output import move_into
from finetuner.training.loop import Run
from finetuner.training.optimizer import load_optimizer_tensors, optimizer_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Weights:
    """The trained parts of a run. `token_ids`: the special tokens that the recipe changes, by role."""

    run: Run
    bare: TokenLoss
    parameters: dict[str, nn.Parameter]
    tokenizer: "PreTrainedTokenizerBase"
    is_lora: bool
    token_ids: dict[str, int]


def write_checkpoint(weights: Weights, folder: Path) -> None:
    write_model(weights, folder)
    optimizer = weights.run.optimizer.optimizer
    save_file(optimizer_tensors(optimizer, weights.parameters), folder / "optimizer.safetensors")
    scaler = weights.run.accelerator.scaler
    if scaler is not None:
        (folder / "scaler.json").write_text(json.dumps(scaler.state_dict()))


def read_optimizer(weights: Weights, folder: Path) -> None:
    """Load the optimizer and scaler that write_checkpoint wrote; the model was built from the same folder."""
    tensors = load_file(folder / "optimizer.safetensors")
    load_optimizer_tensors(weights.run.optimizer.optimizer, weights.parameters, tensors)
    scaler = weights.run.accelerator.scaler
    if scaler is not None and (folder / "scaler.json").exists():
        scaler.load_state_dict(json.loads((folder / "scaler.json").read_text()))


def write_model(weights: Weights, folder: Path) -> None:
    model: Any = weights.bare.model
    if weights.is_lora:
        write_adapter(model, folder)
    else:
        use_token_ids(model, weights.token_ids)
        model.save_pretrained(folder)
    weights.tokenizer.save_pretrained(folder)


def write_result(weights: Weights, output_dir: Path, dtype: torch.dtype) -> None:
    """The result, into output_dir itself. No step may follow: a full model is cast to `dtype` in place."""
    if not weights.is_lora:
        cast_weights(weights.bare.model, dtype)
    with written_aside(output_dir / "final.tmp") as aside:
        write_model(weights, aside)
    move_into(output_dir / "final.tmp", output_dir, last=result_mark(output_dir, weights.is_lora).name)
    (output_dir / "final.tmp").rmdir()


def read_best(weights: Weights, output_dir: Path, step: int) -> None:
    """Take over the weights that the checkpoint of `step` has. Raises CheckpointError if it is damaged or gone."""
    folder = checkpoint_folder(output_dir, step)
    wrong = damage(folder)
    if wrong:
        raise CheckpointError(
            f"the best weights, of step {step}, cannot be read from {folder}: {wrong}.\n"
            "To take the last ones instead: resume_from_checkpoint=true load_best_model_at_end=false"
        )
    model: Any = weights.bare.model
    if weights.is_lora:
        read_adapter(model, folder)
    else:
        model.load_state_dict(type(model).from_pretrained(folder, dtype=torch.float32).state_dict())


def result_mark(output_dir: Path, is_lora: bool) -> Path:
    """The file whose presence says that the result is complete: removed before the first step, written last."""
    return output_dir / ("adapter_config.json" if is_lora else "config.json")


def checkpoint_bytes(parameters: dict[str, nn.Parameter]) -> int:
    """Every trained parameter and AdamW's two moments of it, in fp32."""
    return 12 * sum(p.numel() for p in parameters.values())
