"""What a checkpoint and a result hold beside the state: written and read side by side.

A checkpoint has the adapter (LoRA) or the whole model in fp32, the optimizer's state, the loss scaler's under fp16,
and the tokenizer. It is one file of each that the main rank writes, or parts that every rank writes; in both forms any
engine on any number of ranks goes on from it. A result is one file, without the optimizer, and a full model in the
number format it ran in.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finetuner.checkpoint.folder import MANIFEST, checkpoint_folder, damage, written_aside
from finetuner.checkpoint.output_dir import move_into
from finetuner.checkpoint.shards import MODEL_PART, OPTIMIZER_PART, Parts, has_parts, write_part
from finetuner.errors import CheckpointError
from finetuner.models.adapter import write_adapter
from finetuner.models.generation_config import write_generation_config
from finetuner.models.model_folder import use_token_ids, write_model_folder
from finetuner.models.quant_record import record_of, write_record
from finetuner.objectives.next_token import TokenLoss
from finetuner.parallel.optimizer_state import optimizer_tensors
from finetuner.training.loop import Run

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
    found = model_tensors_of(weights.bare.model)
    return {name: tensor for name, tensor in found.items() if tensor.requires_grad or not weights.is_lora}


def model_tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def write_parts(weights: Weights, folder: Path, *, model_only: bool) -> None:
    """A checkpoint in parts, called by all ranks together: each writes what it holds into `folder`, once the main rank
    has made it."""
    accelerator = weights.run.accelerator
    accelerator.wait_for_everyone()
    tensors = {MODEL_PART + name: tensor for name, tensor in model_tensors(weights).items()}
    if not model_only:
        state = optimizer_tensors(weights.run.engine.optimizer, weights.parameters, on_cpu=False)
        tensors |= {OPTIMIZER_PART + name: tensor for name, tensor in state.items()}
    write_part(folder, tensors)
    if accelerator.is_main_process:
        model: Any = weights.bare.model
        (model.peft_config["default"] if weights.is_lora else model.config).save_pretrained(str(folder))
        _write_record(weights, folder)
        weights.tokenizer.save_pretrained(folder)
    accelerator.wait_for_everyone()


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


def write_model(weights: Weights, values: dict[str, torch.Tensor], folder: Path, *, portable: bool = False) -> None:
    """`portable`: as other tools read it, for a result; a checkpoint is read by us."""
    model: Any = weights.bare.model
    if weights.is_lora:
        write_adapter(model, folder, values)
        _write_record(weights, folder)
    else:
        use_token_ids(model, weights.token_ids)
        write_model_folder(model, folder, values, portable=portable)
    weights.tokenizer.save_pretrained(folder)
    if portable and not weights.is_lora:
        write_generation_config(folder, weights.token_ids)


def _write_record(weights: Weights, folder: Path) -> None:
    record = record_of(weights.bare.bare) if weights.is_lora else None
    if record is not None:
        write_record(record, folder)


def write_result(weights: Weights, output_dir: Path, dtype: torch.dtype) -> None:
    """The result, into output_dir itself, a full model in `dtype`. Called by all ranks together."""
    values = gather(weights, optimizer=False).model
    if not weights.run.accelerator.is_main_process:
        return
    _publish(
        weights,
        output_dir,
        lambda aside: write_model(weights, _as_result(weights, values, dtype), aside, portable=True),
    )


def _as_result(weights: Weights, values: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """An adapter stays in fp32."""
    cast = not weights.is_lora
    return {name: v.to(dtype) if cast and v.is_floating_point() else v for name, v in values.items()}


def write_best(weights: Weights, output_dir: Path, dtype: torch.dtype, step: int) -> None:
    """As write_result, with what the checkpoint of `step` holds, by the main rank alone.

    Raises CheckpointError if it is damaged or gone."""
    folder = checkpoint_folder(output_dir, step)
    wrong = damage(folder)
    if wrong:
        raise CheckpointError(
            f"the best weights, of step {step}, cannot be read from {folder}: {wrong}.\n"
            "To take the last ones instead: resume_from_checkpoint=true load_best_model_at_end=false"
        )

    def write(aside: Path) -> None:
        if has_parts(folder):
            write_model(weights, _as_result(weights, Parts(folder, MODEL_PART), dtype), aside, portable=True)
        elif weights.is_lora:
            for path in folder.iterdir():
                if path.name not in _CHECKPOINTS_OWN:
                    shutil.copyfile(path, aside / path.name)
        else:
            kind: Any = type(weights.bare.bare)
            values = model_tensors_of(kind.from_pretrained(folder, dtype=dtype))
            write_model(weights, values, aside, portable=True)

    _publish(weights, output_dir, write)


_CHECKPOINTS_OWN = (MANIFEST, "state.json", "optimizer.safetensors", "scaler.json")


def _publish(weights: Weights, output_dir: Path, write: Callable[[Path], None]) -> None:
    """Write aside, then move into output_dir with the mark last."""
    with written_aside(output_dir / "final.tmp") as aside:
        write(aside)
    move_into(output_dir / "final.tmp", output_dir, last=result_mark(output_dir, weights.is_lora).name)
    (output_dir / "final.tmp").rmdir()


def result_mark(output_dir: Path, is_lora: bool) -> Path:
    """The file whose presence says that the result is complete: removed before the first step, written last."""
    return output_dir / ("adapter_config.json" if is_lora else "config.json")


def checkpoint_bytes(num_trained: int) -> int:
    """Every trained parameter and AdamW's two moments of it, in fp32."""
    return 12 * num_trained
