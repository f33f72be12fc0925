"""Is the merged model what was trained, where neither can be held: tensor by tensor, from the disk."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from finetuner.errors import ModelError
from finetuner.export.merge import MARK, Form, Report, merged_tensor, plan_merge
from finetuner.models.files import weight_files
from finetuner.storage.safetensors_stream import read_header, read_tensor

# Most roundings that a number may be off: half a step of its format is 1. The sum in fp32 is rounded several times.
BOUNDS = {torch.float32: 256.0, torch.float16: 1.5, torch.bfloat16: 1.5}
FLOOR = 2.0**-8  # numbers this far below the largest of their tensor carry the noise of larger terms


@dataclass(frozen=True)
class LayerAgreement:
    """How far what was written is from base + scaled update in fp32: the largest difference, in roundings of the
    format in which it is stored (1: half a step), and where that is."""

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


def verify_layers(
    adapter: Path, base: Path, merged: Path, form: Form, report: Report = lambda done, total: None
) -> LayerAgreement:
    """Compute each tensor anew, compare, and write the figures beside the merged weights: memory for a few tensors.

    Raises ModelError beyond the bound, or if a tensor is missing or has another shape."""
    _, _, _, files = plan_merge(adapter, base, Form(torch.float32, form.shard_bytes, form.dequantise))
    pieces = {piece.name: piece for of_file in files.values() for piece in of_file}
    written = {name: (path, info) for path in weight_files(merged) for name, info in read_header(path).items()}
    wrong = sorted(set(pieces) ^ set(written)) or [
        name for name, piece in pieces.items() if piece.after.shape != written[name][1].shape
    ]
    if wrong:
        raise ModelError(f"the merged model in {merged} is not base + adapter: '{wrong[0]}' is missing, or of no use.")
    total, done = sum(info.num_bytes for _, info in written.values()), 0
    worst = LayerAgreement(0.0, next(iter(pieces)), max(BOUNDS.values()), len(pieces), 0)
    changed = 0
    for name, piece in pieces.items():
        path, info = written[name]
        found = read_tensor(path, info)
        changed += piece.change is not None
        off, bound = _roundings(found, merged_tensor(piece))
        if not off / bound <= worst.largest / worst.bound:  # NaN too
            worst = LayerAgreement(off, name, bound, len(pieces), 0)
        done += info.num_bytes
        report(done, total)
    agreement = LayerAgreement(worst.largest, worst.tensor, worst.bound, len(pieces), changed)
    mark: dict[str, Any] = json.loads((merged / MARK).read_text())
    (merged / MARK).write_text(json.dumps(mark | {"verified_by_layers": asdict(agreement)}, indent=1) + "\n")
    if not agreement.largest <= agreement.bound:
        raise ModelError(f"the merged model in {merged} is not what base + adapter are: {agreement}.\nDo not use it.")
    return agreement


def _roundings(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """The largest difference in halves of a step of `found`'s format, and how many there may be."""
    if not found.is_floating_point() or found.numel() == 0:
        return (0.0 if torch.equal(found, wanted.to(found.dtype)) else float("inf")), 1.0
    form = torch.finfo(found.dtype)
    size = wanted.abs()
    size = size.clamp_(min=float(size.max()) * FLOOR)
    step = size.mul_(form.eps / 2).clamp_(min=form.tiny * form.eps / 2)
    off = (found.float() - wanted).abs_().div_(step)
    return float(off.max()), BOUNDS.get(found.dtype, 1.5)
