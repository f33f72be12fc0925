"""A base whose weights are pickled (.bin), converted once to safetensors where the recipe allows it.

    <dataset_prepared_path>/unpickled/<key>/   the folder of the base, with model*.safetensors

torch's reader of weights alone (`weights_only`) runs no code of the file's, as far as is known. Everything that loads
models reads safetensors.
"""

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetuner.errors import ModelError
from finetuner.models.files import INDEX, find_base
from finetuner.recipe.gpt_shape import FROM_SCRATCH
from finetuner.recipe.sections import ModelSection
from finetuner.storage.build_once import build_once
from finetuner.storage.disk_errors import explain_disk_errors
from finetuner.world import World

PICKLED_INDEX = "pytorch_model.bin.index.json"


def safetensors_base(section: ModelSection, prepared_path: str, world: World) -> str:
    """Return the recipe's base, or, for one with pickled weights that the recipe allows, a folder with the same weights
    as safetensors under `prepared_path`.

    Raises ModelError if a file holds more than weights."""
    name = section.base_model
    if not section.pickled_weights or name == FROM_SCRATCH:
        return name
    folder = find_base(name, pickled=True)
    files = pickled_files(folder)
    if not files or list(folder.glob("*.safetensors")):
        return name
    facts = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    place = Path(prepared_path) / "unpickled" / key
    with explain_disk_errors(
        ModelError, f"cannot write to '{place.parent}'", "Make room, or name another folder: dataset_prepared_path=..."
    ):
        return str(
            build_once(place, lambda staging: _convert(folder, files, staging), is_builder=world.local_rank == 0)
        )


def pickled_files(folder: Path) -> list[Path]:
    """Return the .bin files with a model's weights, in order."""
    if (folder / PICKLED_INDEX).exists():
        names = json.loads((folder / PICKLED_INDEX).read_text())["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    return sorted(folder.glob("pytorch_model.bin"))


def _convert(folder: Path, files: list[Path], staging: Path) -> None:
    """Write to `staging` the model of `folder`, with a safetensors file for each of `files`."""
    from transformers import AutoConfig

    is_tied = bool(AutoConfig.from_pretrained(folder).get_text_config().tie_word_embeddings)
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja", ".txt", ".model") and path.name != PICKLED_INDEX:
            shutil.copyfile(path, staging / path.name)
    file_of: dict[str, str] = {}
    num_bytes = 0
    for i, file in enumerate(files, 1):
        name = "model.safetensors" if len(files) == 1 else f"model-{i:05}-of-{len(files):05}.safetensors"
        tensors = _read(file)
        seen: dict[tuple[int, tuple[int, ...]], str] = {}
        unique = {}
        for key, tensor in tensors.items():
            first = seen.setdefault((tensor.data_ptr(), tuple(tensor.shape)), key)
            if first == key or not is_tied:  # a tied head is the embedding, and is written once
                unique[key] = tensor.clone().contiguous()
        save_file(unique, staging / name, metadata={"format": "pt"})
        file_of |= dict.fromkeys(unique, name)
        num_bytes += sum(tensor.numel() * tensor.itemsize for tensor in unique.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": file_of}
        (staging / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _read(file: Path) -> dict[str, torch.Tensor]:
    """Name -> tensor of any shape. Raises ModelError for a file that is damaged or holds anything else."""
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ModelError(
            f"'{file}' cannot be read as weights alone: {str(error).strip().splitlines()[0]}\n"
            "It is damaged, or would run code. Fetch the model as safetensors."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ModelError(f"'{file}' holds more than weights. Fetch the model as safetensors.")
    return found
