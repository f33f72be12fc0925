"""Models that are compared: base, adapter and merged, of a recipe's run or of a model folder, as far as they exist."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuner.errors import ModelError
from finetuner.export.merge_writer import MERGE_FILE
from finetuner.models.adapter_folder import read_config
from finetuner.models.embeddings import grow_embeddings, grow_for_adapter
from finetuner.models.load import load_model
from finetuner.models.quant_format import QuantFormat, choose_quant_format
from finetuner.models.quant_record import read_record
from finetuner.recipe.gpt_shape import FROM_SCRATCH
from finetuner.recipe.rules import looks_local
from finetuner.recipe.sections import QuantizationSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class ComparedModels:
    """Names and folders of the models; None: it does not exist. `base_format`: quantization of the base below the
    adapter, None for none."""

    base: str | None = None
    adapter: Path | None = None
    merged: Path | None = None
    single: str | None = None  # a full model, which is compared with its base if that is known
    base_format: QuantFormat | None = None

    @property
    def tokenizer(self) -> str:
        """Folder or hub id with the tokenizer of all of them."""
        folders = [folder for folder in (self.adapter, self.merged) if folder is not None]
        found = next((str(folder) for folder in folders if (folder / "tokenizer.json").exists()), None)
        name = found or self.single or self.base
        assert name is not None
        return name


@dataclass(frozen=True)
class LoadableModel:
    """One of the models, by its name in the tables, with the function that loads it."""

    name: str
    load: Callable[[], "PreTrainedModel"]


def models_of_run(
    output_dir: Path,
    base_model: str,
    *,
    adapter: str | None,
    quantization: QuantizationSection,
    dtype: torch.dtype,
) -> ComparedModels:
    """Return the base of a run and what the run left in output_dir.

    `base_model`: folder or hub id that is read; `adapter`: the recipe's kind of adapter, None if all was trained."""
    base = None if base_model == FROM_SCRATCH else base_model
    if adapter is None:
        return ComparedModels(base, single=str(output_dir) if (output_dir / "config.json").exists() else None)
    merged = output_dir / "merged"
    adapted = (output_dir / ADAPTER_CONFIG).exists()
    return ComparedModels(
        base,
        adapter=output_dir if adapted else None,
        merged=merged if adapted and (merged / "config.json").exists() else None,
        base_format=choose_quant_format(adapter, quantization, dtype),
    )


def models_of_folder(target: str) -> ComparedModels:
    """Return a model folder or hub id; with an adapter its base, and with a merged model both that it was made of.

    Raises ModelError for a folder that holds no model, or an adapter that does not say what it was trained on."""
    folder = Path(target).expanduser()
    if not folder.is_dir():
        if looks_local(target):
            raise ModelError(
                f"there is no model folder '{target}' (seen from {Path.cwd()}). Give a folder or a hub id."
            )
        return ComparedModels(single=target)
    if (folder / ADAPTER_CONFIG).exists():
        base = read_config(folder).get("base_model_name_or_path")
        if not base:
            raise ModelError(f"the adapter in '{target}' does not say what it was trained on. Give its recipe instead.")
        merged, record = folder / "merged", read_record(folder)
        found = ComparedModels(str(base), folder, base_format=None if record is None else record.format)
        return replace(found, merged=merged) if (merged / "config.json").exists() else found
    if not (folder / "config.json").exists():
        raise ModelError(f"'{target}' holds no model: neither config.json nor {ADAPTER_CONFIG} is there.")
    if (folder / MERGE_FILE).exists():
        mark = json.loads((folder / MERGE_FILE).read_text())
        adapter = Path(mark["adapter"])
        if (adapter / ADAPTER_CONFIG).exists():
            return replace(models_of_folder(str(adapter)), base=mark["base_model"], merged=folder)
    return ComparedModels(single=str(folder))


def loadable_models(
    models: ComparedModels,
    *,
    dtype: torch.dtype,
    attention: tuple[str, ...],
    device: torch.device,
    vocab_size: int,
    trust_remote_code: bool,
) -> Iterator[LoadableModel]:
    """Yield each model that exists, base first. `vocab_size`: rows that the base's tables have below an adapter."""

    def read(name: str, quant_format: QuantFormat | None = None) -> "PreTrainedModel":
        model: Any = load_model(
            name,
            dtype=dtype,
            attention=attention,
            trust_remote_code=trust_remote_code,
            quant_format=quant_format,
            device=device,
        )
        return model if quant_format is not None else model.to(device)  # quantized, it cannot be moved

    def base() -> "PreTrainedModel":
        assert models.base is not None
        model = read(models.base, models.base_format)
        if models.adapter is not None:
            grow_for_adapter(model, models.adapter, vocab_size)
        else:
            grow_embeddings(model, vocab_size)
        return model

    def adapted() -> "PreTrainedModel":
        from peft import PeftModel

        return PeftModel.from_pretrained(base(), str(models.adapter))  # type: ignore[return-value]

    if models.base is not None:
        yield LoadableModel("base", base)
    if models.single is not None:
        yield LoadableModel("model" if models.base is None else "trained", partial(read, models.single))
    if models.adapter is not None:
        yield LoadableModel("adapter", adapted)
    if models.merged is not None:
        yield LoadableModel("merged", partial(read, str(models.merged)))
