"""One of two gloo ranks: three steps of QLoRA under FSDP2 for each storage and precision, as test_quantized.py asks.

torchrun --nproc_per_node 2 -m support.quantized_worker MODEL uint8-fp32 bfloat16-bf16 ...
"""

import json
import sys

import torch
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from finetuner.data.batches import collate
from finetuner.models.activation_checkpointing import recompute_activations
from finetuner.models.adapter import add_lora
from finetuner.models.load import load_model
from finetuner.models.quant_format import QuantFormat
from finetuner.objectives.loss_module import LossModule
from finetuner.objectives.next_token import NextToken
from finetuner.recipe.sections import AdapterSection
from support.documents import documents


def qlora_loss(folder: str, storage: str, precision: str) -> LossModule:
    """The whole model with its adapter, all in one number format beside the packed bytes."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    form = QuantFormat("nf4", dtype, double=True, compute_dtype=dtype, storage=getattr(torch, storage))
    model = load_model(folder, dtype=dtype, attention=("sdpa",), quant_format=form)
    recompute_activations(model)
    adapted = add_lora(model, AdapterSection(adapter="qlora", lora_r=4), base_model="x", seed=1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return LossModule(adapted, NextToken(), composed=True)


def steps_of(module: LossModule) -> list[float]:
    """The losses of three steps on the same rows."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(3):
        loss = module(collate(documents(), [0, 1, 2]).tensors())
        (loss / 10).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def sharded_steps(folder: str, storage: str, precision: str) -> list[float]:
    module = qlora_loss(folder, storage, precision)
    held = sum(p.numel() * p.itemsize for name, p in module.named_parameters() if "base_layer" in name)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if precision == "bf16" else None)
    for block in module.unwrapped.model.layers:
        fully_shard(block, mp_policy=policy)
    fully_shard(module, mp_policy=policy)
    shards = [p.to_local() for name, p in module.named_parameters() if "base_layer" in name]
    local = sum(p.numel() * p.itemsize for p in shards)
    assert 2 * local == held, f"{local} of {held} bytes are on this rank"
    return steps_of(module)


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    losses = {case: sharded_steps(sys.argv[1], *case.split("-")) for case in sys.argv[2:]}
    if distributed.get_rank() == 0:
        print("LOSSES", json.dumps(losses), flush=True)
    distributed.destroy_process_group()
