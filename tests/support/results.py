"""Reading and copying of what a run left in its output folder."""

import shutil
from pathlib import Path


def weights_of(folder: Path) -> dict:
    """Every tensor of the safetensors files that a run left in its output folder."""
    from safetensors.torch import load_file

    tensors: dict = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    assert tensors, f"no weights in {folder}"
    return tensors


def largest_difference(left: dict, right: dict) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def unfinished(source: Path, out: Path, step: int) -> Path:
    """A folder with the run of `source` as it was at `step`."""
    name = f"checkpoints/step-{step:08}"
    shutil.copytree(source / name, out / name)
    shutil.copy(source / "metrics.jsonl", out)
    return out
