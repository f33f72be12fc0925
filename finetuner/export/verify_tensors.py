"""Compare a merged model with base + update tensor by tensor, from the disk: memory for a few tensors.

For models that do not fit into memory in fp32, where logits cannot be compared.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetuner.errors import ModelError
from finetuner.export.merge_plan import MergedTensor, MergeFormat, plan_merge
from finetuner.export.merge_writer import MERGE_FILE, ByteProgress
from finetuner.models.files import weight_files
from finetuner.storage.safetensors_stream import TensorInfo, read_header, read_tensor

# Most roundings that a number may be off: half a step of its format is 1. The sum in fp32 is rounded several times.
ROUNDING_BOUNDS = {torch.float32: 256.0, torch.float16: 1.5, torch.bfloat16: 1.5}
FLOOR = 2.0**-8  # numbers this far below the largest of their tensor carry the noise of larger terms


@dataclass(frozen=True)
class TensorAgreement:
    """Largest difference between what was written and base + scaled update in fp32, and the tensor that has it.

    In roundings of the format in which the tensor is stored (1: half a step), of which there may be `bound`."""

    largest: float
    tensor: str
    bound: float
    num_tensors: int
    num_changed: int

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.2g} roundings (at most {self.bound:g}), in {self.tensor}; "
            f"{self.num_tensors:,} tensors, {self.num_changed:,} of them changed by the adapter"
        )


def verify_tensors(
    adapter: Path, base: Path, merged: Path, form: MergeFormat, report: ByteProgress = lambda done, total: None
) -> TensorAgreement:
    """Compute each tensor again, compare, and write the figures into the merged folder's mark.

    Raises ModelError beyond the bound, or if a tensor is missing or has another shape."""
    expected = {tensor.name: tensor for tensor in plan_merge(adapter, base, replace(form, dtype=torch.float32)).tensors}
    written = {name: (path, info) for path in weight_files(merged) for name, info in read_header(path).items()}
    _require_same_shapes(merged, expected, {name: info for name, (_, info) in written.items()})
    total, done = sum(info.num_bytes for _, info in written.values()), 0
    num_changed = sum(tensor.update is not None for tensor in expected.values())
    worst = TensorAgreement(0.0, next(iter(expected)), max(ROUNDING_BOUNDS.values()), len(expected), num_changed)
    for name, tensor in expected.items():
        path, info = written[name]
        difference, bound = _roundings(read_tensor(path, info), tensor.compute())
        if not difference / bound <= worst.largest / worst.bound:  # NaN too
            worst = replace(worst, largest=difference, tensor=name, bound=bound)
        done += info.num_bytes
        report(done, total)
    mark: dict[str, Any] = json.loads((merged / MERGE_FILE).read_text())
    (merged / MERGE_FILE).write_text(json.dumps(mark | {"verified_by_layers": asdict(worst)}, indent=1) + "\n")
    if not worst.largest <= worst.bound:
        raise ModelError(f"the merged model in {merged} is not what base + adapter are: {worst}.\nDo not use it.")
    return worst


def _require_same_shapes(merged: Path, expected: dict[str, MergedTensor], written: dict[str, TensorInfo]) -> None:
    wrong = sorted(set(expected) ^ set(written)) or [
        name for name, tensor in expected.items() if tensor.after.shape != written[name].shape
    ]
    if wrong:
        raise ModelError(f"the merged model in {merged} is not base + adapter: '{wrong[0]}' is missing, or of no use.")


def _roundings(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Return the largest difference of two tensors of one shape, in halves of a step of `found`'s format, and how many
    there may be."""
    if not found.is_floating_point() or found.numel() == 0:
        return (0.0 if torch.equal(found, expected.to(found.dtype)) else float("inf")), 1.0
    form = torch.finfo(found.dtype)
    size = expected.abs()
    size = size.clamp_(min=float(size.max()) * FLOOR)
    step = size.mul_(form.eps / 2).clamp_(min=form.tiny * form.eps / 2)
    difference = (found.float() - expected).abs_().div_(step)
    return float(difference.max()), ROUNDING_BOUNDS.get(found.dtype, 1.5)
