"""The weights and the optimizer in checkpoints, and the weights of a result.

A checkpoint has the adapter (LoRA) or the whole model in fp32, the optimizer's state, the loss scaler's under fp16,
and the tokenizer. It is one file of each that the main rank writes, or a shard that every rank writes; from both, any
engine on any number of ranks goes on. A result is one file, without the optimizer, and a full model in the
number format it ran in.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from finetuner.checkpoint.folder import checkpoint_folder
from finetuner.checkpoint.output_dir import ADAPTER
from finetuner.checkpoint.shards import MODEL_PART, OPTIMIZER_PART, ShardedTensors, is_sharded, write_shard
from finetuner.errors import CheckpointError
from finetuner.models.adapter import write_adapter
from finetuner.models.generation_config import write_generation_config
from finetuner.models.model_folder import use_token_ids, write_model_folder
from finetuner.models.quant_record import record_of, write_record
from finetuner.objectives.loss_module import LossModule
from finetuner.parallel.engine import Engine
from finetuner.parallel.optimizer_state import optimizer_tensors
from finetuner.storage.atomic import move_into, staged_folder
from finetuner.storage.manifest import find_damage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainedModel:
    """A model in its engine, with all that is saved of it.

    `parameters`: what is trained, by its name in `loss`; `token_ids`: the special tokens that the recipe changes, by
    role.
    """

    accelerator: Accelerator
    engine: Engine
    loss: LossModule
    parameters: dict[str, nn.Parameter]
    tokenizer: "PreTrainedTokenizerBase"
    is_adapter: bool
    token_ids: dict[str, int]


@dataclass(frozen=True)
class Gathered:
    """Full tensors on the CPU of the main rank; empty on the others.

    `model`: by the names of the model in the loss module, of an adapter run the adapter weights alone.
    """

    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


def gather(trained: TrainedModel, *, optimizer: bool) -> Gathered:
    """Gather the full weights, and the state of the `optimizer`, on the main rank. Called by all ranks together."""
    model = trained.engine.gather(saved_tensors(trained))
    return Gathered(model, trained.engine.gather_optimizer(trained.parameters) if optimizer else {})


def saved_tensors(trained: TrainedModel) -> dict[str, torch.Tensor]:
    """Return what is saved of the model (any shapes), as this rank holds it; a tied tensor under its first name."""
    found = untied_tensors(trained.loss.model)
    return {name: tensor for name, tensor in found.items() if tensor.requires_grad or not trained.is_adapter}


def untied_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of a model (any shapes), each tensor once, under its first name."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def write_share_of_checkpoint(trained: TrainedModel, folder: Path, *, model_only: bool) -> None:
    """Write what this rank holds into a `folder` that the main rank has made. Called by every rank; none waits."""
    tensors = {MODEL_PART + name: tensor for name, tensor in saved_tensors(trained).items()}
    if not model_only:
        state = optimizer_tensors(trained.engine.optimizer, trained.parameters, on_cpu=False)
        tensors |= {OPTIMIZER_PART + name: tensor for name, tensor in state.items()}
    write_shard(folder, tensors)
    if trained.accelerator.is_main_process:
        model: Any = trained.loss.model
        (model.peft_config["default"] if trained.is_adapter else model.config).save_pretrained(str(folder))
        _write_record(trained, folder)
        trained.tokenizer.save_pretrained(folder)


def write_checkpoint(trained: TrainedModel, gathered: Gathered, folder: Path) -> None:
    """Write gathered weights, the optimizer's state and the loss scaler's into `folder`. Called by the main rank."""
    write_model(trained, gathered.model, folder)
    save_file(gathered.optimizer, folder / "optimizer.safetensors")
    scaler = trained.accelerator.scaler
    if scaler is not None:
        (folder / "scaler.json").write_text(json.dumps(scaler.state_dict()))


def read_optimizer(trained: TrainedModel, folder: Path) -> None:
    """Load the optimizer's state and the loss scaler's from a checkpoint, by all ranks. The model was built from it."""
    if is_sharded(folder):
        tensors: Mapping[str, torch.Tensor] = ShardedTensors(folder, OPTIMIZER_PART)
    else:
        tensors = load_file(folder / "optimizer.safetensors")
    trained.engine.load_optimizer(trained.parameters, tensors)
    scaler = trained.accelerator.scaler
    if scaler is not None and (folder / "scaler.json").exists():
        scaler.load_state_dict(json.loads((folder / "scaler.json").read_text()))


def write_model(
    trained: TrainedModel, values: dict[str, torch.Tensor], folder: Path, *, portable: bool = False
) -> None:
    """Write the full tensors `values` (any shapes) as an adapter or a model folder, with the tokenizer.

    `portable`: as other tools read it, for a result; a checkpoint is read by finetuner alone.
    """
    model: Any = trained.loss.model
    if trained.is_adapter:
        write_adapter(model, folder, values)
        _write_record(trained, folder)
    else:
        use_token_ids(model, trained.token_ids)
        write_model_folder(model, folder, values, portable=portable)
    trained.tokenizer.save_pretrained(folder)
    if portable and not trained.is_adapter:
        write_generation_config(folder, trained.token_ids)


def _write_record(trained: TrainedModel, folder: Path) -> None:
    record = record_of(trained.loss.unwrapped) if trained.is_adapter else None
    if record is not None:
        write_record(record, folder)


def write_result(trained: TrainedModel, output_dir: Path, dtype: torch.dtype) -> None:
    """Write the result into output_dir itself, a full model in `dtype`. Called by all ranks together."""
    values = gather(trained, optimizer=False).model
    if not trained.accelerator.is_main_process:
        return
    _publish(
        trained,
        output_dir,
        lambda staging: write_model(trained, _as_result(trained, values, dtype), staging, portable=True),
    )


def _as_result(
    trained: TrainedModel, values: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return full tensors (any shapes) in the format of a result: `dtype`, or fp32 of an adapter."""
    cast = not trained.is_adapter
    return {name: v.to(dtype) if cast and v.is_floating_point() else v for name, v in values.items()}


def write_best(trained: TrainedModel, output_dir: Path, dtype: torch.dtype, step: int) -> None:
    """Write the result from the checkpoint of `step` instead of the live weights. Called by the main rank.

    Raises CheckpointError if it is damaged or gone."""
    folder = checkpoint_folder(output_dir, step)
    wrong = find_damage(folder)
    if wrong:
        raise CheckpointError(
            f"the best weights, of step {step}, cannot be read from {folder}: {wrong}.\n"
            "To take the last ones instead: resume_from_checkpoint=true load_best_model_at_end=false"
        )

    def write(staging: Path) -> None:
        if is_sharded(folder):
            write_model(trained, _as_result(trained, ShardedTensors(folder, MODEL_PART), dtype), staging, portable=True)
        elif trained.is_adapter:
            for path in ADAPTER.found_in(folder):  # and nothing else: a stream's position has token ids of its rows
                shutil.copyfile(path, staging / path.name)
            trained.tokenizer.save_pretrained(staging)
        else:
            kind: Any = type(trained.loss.unwrapped)
            values = untied_tensors(kind.from_pretrained(folder, dtype=dtype))
            write_model(trained, values, staging, portable=True)

    _publish(trained, output_dir, write)


def _publish(trained: TrainedModel, output_dir: Path, write: Callable[[Path], None]) -> None:
    """Write to a staging folder, then move into output_dir, the file that marks a complete result last."""
    with staged_folder(output_dir / "final.tmp") as staging:
        write(staging)
    move_into(output_dir / "final.tmp", output_dir, last=result_mark(output_dir, trained.is_adapter).name)
    (output_dir / "final.tmp").rmdir()


def result_mark(output_dir: Path, is_adapter: bool) -> Path:
    """Return the file whose presence says that the result is complete: removed before the first step, written last."""
    return output_dir / ("adapter_config.json" if is_adapter else "config.json")


def checkpoint_bytes(num_trained: int) -> int:
    """Return the bytes of a checkpoint: each trained weight and AdamW's two moments of it, in fp32."""
    return 12 * num_trained
