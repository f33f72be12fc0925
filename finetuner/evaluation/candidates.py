"""Which models are compared: base, adapter and merged, of a recipe's run or of a model folder, as far as they exist."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetuner.errors import ModelError
from finetuner.export.merge import MARK
from finetuner.models.adapter_folder import read_config
from finetuner.models.embeddings import grow_embeddings
from finetuner.models.load import load_model
from finetuner.models.quant_format import QuantFormat, choose_quant_format
from finetuner.models.quant_record import read_record
from finetuner.recipe import Recipe
from finetuner.recipe.gpt_shape import FROM_SCRATCH
from finetuner.recipe.rules import looks_local

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Lineup:
    """Names and folders; None: it does not exist. `form`: how the base is kept below the adapter."""

    base: str | None = None
    adapter: Path | None = None
    merged: Path | None = None
    alone: str | None = None  # a model that is compared with its base, or with none
    form: QuantFormat | None = None

    @property
    def tokenizer(self) -> str:
        """The folder or hub id with the tokenizer of all of them."""
        folders = [folder for folder in (self.adapter, self.merged) if folder is not None]
        found = next((str(folder) for folder in folders if (folder / "tokenizer.json").exists()), None)
        known = found or self.alone or self.base
        assert known is not None
        return known


@dataclass(frozen=True)
class Candidate:
    """One of the models that are compared."""

    name: str
    load: Callable[[], "PreTrainedModel"]


def lineup_of_run(recipe: Recipe, base_model: str, dtype: torch.dtype) -> Lineup:
    """What the run of a recipe began with, `base_model` being where that is read, and what it left in output_dir."""
    output_dir = Path(recipe.output.output_dir)
    base = None if base_model == FROM_SCRATCH else base_model
    if recipe.adapter.adapter is None:
        return Lineup(base, alone=str(output_dir) if (output_dir / "config.json").exists() else None)
    merged = output_dir / "merged"
    adapted = (output_dir / ADAPTER).exists()
    return Lineup(
        base,
        adapter=output_dir if adapted else None,
        merged=merged if adapted and (merged / "config.json").exists() else None,
        form=choose_quant_format(recipe.adapter.adapter, recipe.quantization, dtype),
    )


def lineup_of_model(target: str) -> Lineup:
    """A model folder or hub id; with an adapter its base, and with what was merged both that it was made of.

    Raises ModelError for a folder that holds no model, or an adapter that does not say what it was trained on."""
    folder = Path(target).expanduser()
    if not folder.is_dir():
        if looks_local(target):
            raise ModelError(
                f"there is no model folder '{target}' (seen from {Path.cwd()}). Give a folder or a hub id."
            )
        return Lineup(alone=target)
    if (folder / ADAPTER).exists():
        base = read_config(folder).get("base_model_name_or_path")
        if not base:
            raise ModelError(f"the adapter in '{target}' does not say what it was trained on. Give its recipe instead.")
        merged = folder / "merged"
        record = read_record(folder)
        lineup = Lineup(str(base), folder, form=None if record is None else record.format)
        return replace(lineup, merged=merged) if (merged / "config.json").exists() else lineup
    if not (folder / "config.json").exists():
        raise ModelError(f"'{target}' holds no model: neither config.json nor {ADAPTER} is there.")
    if (folder / MARK).exists():
        mark = json.loads((folder / MARK).read_text())
        adapter = Path(mark["adapter"])
        if (adapter / ADAPTER).exists():
            return replace(lineup_of_model(str(adapter)), base=mark["base_model"], merged=folder)
    return Lineup(alone=str(folder))


def candidates(
    lineup: Lineup,
    *,
    dtype: torch.dtype,
    attention: tuple[str, ...],
    device: torch.device,
    vocab_size: int,
    trust_remote_code: bool,
) -> Iterator[Candidate]:
    """Each model as it is to be loaded, one after another."""

    def read(name: str, form: QuantFormat | None = None) -> "PreTrainedModel":
        model: Any = load_model(
            name,
            dtype=dtype,
            attention=attention,
            trust_remote_code=trust_remote_code,
            quant_format=form,
            device=device,
        )
        return model if form is not None else model.to(device)  # quantised, it is there already and cannot be moved

    def base() -> "PreTrainedModel":
        assert lineup.base is not None
        model = read(lineup.base, lineup.form)
        grow_embeddings(model, vocab_size)
        return model

    def adapted() -> "PreTrainedModel":
        from peft import PeftModel

        return PeftModel.from_pretrained(base(), str(lineup.adapter))  # type: ignore[return-value]

    if lineup.base is not None:
        yield Candidate("base", base)
    if lineup.alone is not None:
        yield Candidate("model" if lineup.base is None else "trained", partial(read, lineup.alone))
    if lineup.adapter is not None:
        yield Candidate("adapter", adapted)
    if lineup.merged is not None:
        yield Candidate("merged", partial(read, str(lineup.merged)))
