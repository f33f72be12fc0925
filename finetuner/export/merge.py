"""Merge a trained adapter into its base model, and verify the result: `finetuner merge` without the printing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from finetuner.data.cache import prepared_already
from finetuner.data.prepared_data import held_out_only
from finetuner.data.tokenizer import special_ids
from finetuner.errors import ModelError, RecipeError
from finetuner.export.merge_options import MergeOptions
from finetuner.export.merge_plan import MergeFormat
from finetuner.export.merge_writer import ByteProgress, WrittenMerge, merge_adapter
from finetuner.export.model_card import write_card
from finetuner.export.quantized_base import quantization_settings
from finetuner.export.verify_logits import LogitAgreement, memory_shortage, verify_logits
from finetuner.export.verify_tensors import TensorAgreement, verify_tensors
from finetuner.models.adapter_folder import read_config, require_same_base
from finetuner.models.config_overrides import prepared_base
from finetuner.models.files import find_base
from finetuner.models.quant_record import read_record
from finetuner.recipe import Recipe
from finetuner.recipe.sections import DataSection, PackingSection
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HELD_OUT_ROWS, _ROW_TOKENS = 8, 512
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Verification:
    """Comparison of the merged files, read back, with what was trained.

    `compared_on`: "3 held-out rows of the recipe", "built-in prompts"; None if tensor by tensor.
    """

    agreement: LogitAgreement | TensorAgreement
    compared_on: str | None

    def __str__(self) -> str:
        if self.compared_on is None:
            return f"base + update in fp32, tensor by tensor: {self.agreement}"
        return f"base + adapter in fp32 on {self.compared_on}: {self.agreement}"


@dataclass(frozen=True)
class MergeResult:
    """A merged model: its folder and figures. `verification`: None if it was not asked for; `notes`: what a user
    should know of the base and of the result."""

    folder: Path
    num_tensors_merged: int
    num_tensors: int
    num_tensors_dequantized: int
    num_bytes: int
    num_bytes_reused: int
    seconds: float
    verification: Verification | None
    notes: tuple[str, ...]


class MergeReporter(Protocol):
    """Listener to a merge while it runs."""

    def note(self, text: str) -> None:
        """Take a sentence that the user should know, such as onto which base is merged."""

    def progress(self, stage: str) -> AbstractContextManager[ByteProgress]:
        """Open a stage ("merging", "verifying"), which calls what is returned with (bytes done, bytes in all)."""

    def written(self, written: WrittenMerge) -> None:
        """Take the figures of the files, before they are verified."""


class SilentReporter:
    """Reporter that drops everything."""

    def note(self, text: str) -> None:
        pass

    @contextmanager
    def progress(self, stage: str) -> Iterator[ByteProgress]:
        yield lambda done, total: None

    def written(self, written: WrittenMerge) -> None:
        pass


AS_TRAINED, SILENT = MergeOptions(), SilentReporter()


@dataclass(frozen=True)
class MergeSource:
    """Adapter and base to merge. `token_ids`: special tokens that the recipe chose, by role; `held_out_rows`: reads
    token ids of some of the recipe's held-out rows, each (length,); `of_run`: trained by a recipe of ours."""

    adapter: Path
    base_model: str
    of_run: bool
    token_ids: dict[str, int] = field(default_factory=dict)
    trust_remote_code: bool = False
    held_out_rows: Callable[[], list[torch.Tensor]] = list
    notes: tuple[str, ...] = ()


def merge(
    source: Recipe | str | Path,
    options: MergeOptions = AS_TRAINED,
    reporter: MergeReporter = SILENT,
    *,
    recipe_name: str = "RECIPE",
) -> MergeResult:
    """Merge the adapter that a recipe trained, or the one in a folder, into its base, and verify the result.

    `recipe_name` is the recipe's file in messages. Raises FinetunerError: for a recipe that trains the full model or
    was not trained, an adapter that cannot be merged, a result that is not what was trained.
    """
    if isinstance(source, Recipe) and options.base_model is not None:
        raise RecipeError("the recipe says on which base its adapter was trained. Leave out base_model=...")
    found = (
        source_of_recipe(source, recipe_name)
        if isinstance(source, Recipe)
        else source_of_folder(Path(source), options.base_model)
    )
    form = MergeFormat(
        None if options.dtype is None else _DTYPES[options.dtype], options.shard_bytes, options.dequantize
    )
    notes = [*found.notes, *_notes_on_base(found, options.dequantize)]
    for note in notes:
        reporter.note(note)
    output = found.adapter / "merged" if options.output is None else Path(options.output)
    with reporter.progress("merging") as report:
        written = merge_adapter(found.adapter, found.base_model, output, report, found.token_ids, form)
    reporter.written(written)
    if written.untied:
        notes.append("the adapter changes only one of embedding and head, which were tied: the result has both")
        reporter.note(notes[-1])
    verification = _verify(found, output, form, reporter) if options.verify else None
    facts = [] if verification is None else [f"Read back and compared with {verification}."]
    write_card(output, found.adapter, found.base_model, "An adapter merged into its base model", facts)
    return MergeResult(
        output,
        num_tensors_merged=written.num_tensors_merged,
        num_tensors=written.num_tensors,
        num_tensors_dequantized=written.num_tensors_dequantized,
        num_bytes=written.num_bytes,
        num_bytes_reused=written.num_bytes_reused,
        seconds=written.seconds,
        verification=verification,
        notes=tuple(notes),
    )


def _notes_on_base(source: MergeSource, dequantize: bool | None) -> list[str]:
    """Say onto which base an adapter without our record is merged."""
    if read_record(source.adapter) is not None or dequantize is False:
        return []
    settings = quantization_settings(source.adapter)
    if settings is None and dequantize is None:
        if source.of_run:
            return []  # ours record it: the base was not quantized
        return [
            "nothing says whether the base was quantized in training: merged onto the base as it is. If it was "
            "(QLoRA): base=dequantized"
        ]
    rules = "as its settings say" if settings is not None else "which nothing says: bitsandbytes' nf4, double quantized"
    return [f"the base is rounded as in training, {rules}: every linear layer but the head. Not so: base=original"]


def _verify(source: MergeSource, folder: Path, form: MergeFormat, reporter: MergeReporter) -> Verification:
    """Compare the merged files with base + adapter. Raises ModelError if the result is not what was trained."""
    shortage = memory_shortage(source.base_model)
    if shortage is not None:
        reporter.note(f"verifying tensor by tensor, because base + adapter cannot be held: {shortage}")
        with reporter.progress("verifying") as report:
            base = find_base(source.base_model)
            return Verification(verify_tensors(source.adapter, base, folder, form, report), None)
    rows = source.held_out_rows()
    agreement = verify_logits(
        source.adapter,
        source.base_model,
        folder,
        dequantize=form.dequantize,
        trust_remote_code=source.trust_remote_code,
        rows=rows,
    )
    return Verification(agreement, f"{len(rows)} held-out rows of the recipe" if rows else "built-in prompts")


def source_of_recipe(recipe: Recipe, recipe_name: str) -> MergeSource:
    """Return the adapter that the recipe's run left in output_dir, and its base.

    Raises ModelError if there is none, or it was trained on another base."""
    output_dir = Path(recipe.output.output_dir)
    if recipe.adapter.adapter is None:
        raise ModelError(
            "this recipe trains the whole model: there is no adapter to merge. "
            f"The trained weights are in {output_dir} as they are."
        )
    if not (output_dir / "adapter_config.json").exists():
        raise ModelError(
            f"there is no trained adapter in {output_dir}. Train it first:\n"
            f"  accelerate launch -m finetuner.train {recipe_name}"
        )
    base = prepared_base(recipe.model, recipe.data.dataset_prepared_path, World())
    require_same_base(output_dir, base)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    return MergeSource(
        output_dir,
        base,
        of_run=True,
        token_ids=special_ids(recipe.tokenizer, tokenizer),
        trust_remote_code=recipe.model.trust_remote_code,
        held_out_rows=partial(_held_out_rows, recipe.data, recipe.packing, tokenizer, recipe.output.seed),
    )


def source_of_folder(folder: Path, base_model: str | None) -> MergeSource:
    """Return an adapter by itself, of whatever tool, and `base_model` or else the base that it names.

    Raises ModelError if the folder holds no adapter, or nothing names its base."""
    recorded = read_config(folder).get("base_model_name_or_path")
    chosen = base_model or recorded
    if not chosen:
        raise ModelError(f"the adapter in '{folder}' does not say what it was trained on. Name it: base_model=...")
    if not recorded or chosen == recorded:
        return MergeSource(folder, chosen, of_run=False)
    note = f"the adapter says that it was trained on '{recorded}'; it is merged into '{chosen}', as you ask"
    return MergeSource(folder, chosen, of_run=False, notes=(note,))


def _held_out_rows(
    section: DataSection, packing: PackingSection, tokenizer: "PreTrainedTokenizerBase", seed: int
) -> list[torch.Tensor]:
    """Read the beginnings of a few held-out rows, each (length,), if the training run left them prepared."""
    section = held_out_only(section) if section.streaming else section
    prepared = prepared_already(section, packing, tokenizer, seed)
    if prepared is None:
        return []
    documents = (prepared.held_out.document(i)[0] for i in range(min(_HELD_OUT_ROWS, len(prepared.held_out))))
    return [torch.tensor(ids[:_ROW_TOKENS].tolist()) for ids in documents]
