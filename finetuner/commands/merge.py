"""`finetuner merge`: merge an adapter into its base model, and verify the result."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetuner.console import Screen, duration, quiet_libraries
from finetuner.data.cache import prepared_already
from finetuner.data.prepared_data import held_out_only
from finetuner.data.tokenizer import special_ids
from finetuner.errors import ModelError, RecipeError
from finetuner.export.merge import Form, merge_adapter
from finetuner.export.merge_options import Wishes, read_wishes
from finetuner.export.model_card import write_card
from finetuner.export.training_base import known_settings
from finetuner.export.verify_logits import room_to_verify, verify_merged
from finetuner.export.verify_tensors import verify_layers
from finetuner.models.adapter_folder import read_config, require_same_base
from finetuner.models.files import find_base
from finetuner.models.pickled_weights import readable_base
from finetuner.models.quantized import read_record
from finetuner.recipe import Recipe, load
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def merge(target: str, overrides: list[str]) -> None:
    """Merge an adapter into its base: of a recipe's run, or in the folder `target`. Raises FinetunerError."""
    wishes = read_wishes(overrides)
    screen = Screen(speaks=True)
    is_folder = Path(target).is_dir()
    job = _of_folder(Path(target), wishes.others) if is_folder else _of_recipe(target, wishes.others, screen)
    dtype = None if wishes.dtype is None else getattr(torch, wishes.dtype)
    form = Form(dtype, wishes.shard_bytes, wishes.dequantize)
    quiet_libraries(screen)
    if job.note:
        screen.line(f"note: {job.note}")
    for line in _on_what(job, is_folder, wishes.dequantize):
        screen.line(f"note: {line}")
    with screen.work("merging", "MB") as work:
        output = wishes.output or job.adapter / "merged"
        merged = merge_adapter(job.adapter, job.base_model, output, work.at_bytes, job.token_ids, form)
    if merged.num_bytes_kept:
        screen.line(f"{merged.num_bytes_kept / 1e6:,.0f} MB were there from a merge that was interrupted")
    screen.line(
        f"merged {merged.num_merged} of {merged.num_tensors} tensors ({merged.num_bytes / 1e6:,.0f} MB) in "
        f"{duration(merged.seconds)}"
    )
    if merged.num_dequantised:
        screen.line(
            f"{merged.num_dequantised} tensors rounded as the quantised base was that the adapter was trained on"
        )
    if merged.untied:
        screen.line("note: the adapter changes only one of embedding and head, which were tied: the result has both")
    facts = _verified(job, merged.folder, form, wishes, screen)
    write_card(merged.folder, job.adapter, job.base_model, "An adapter merged into its base model", facts)
    screen.line(f"done: {merged.folder}")


def _on_what(job: "MergeJob", is_folder: bool, wanted: bool | None) -> list[str]:
    """What to know about the base of an adapter that has no record of ours."""
    if read_record(job.adapter) is not None or wanted is False:
        return []
    known = known_settings(job.adapter)
    if known is None and wanted is None:
        if not is_folder:
            return []  # ours record it: the base was not quantised
        return [
            "nothing says whether the base was quantised in training: merged onto the base as it is. If it was "
            "(QLoRA): base=dequantized"
        ]
    rules = "as its settings say" if known is not None else "which nothing says: bitsandbytes' nf4, double quantised"
    return [f"the base is rounded as in training, {rules}: every linear layer but the head. Not so: base=original"]


def _verified(job: "MergeJob", folder: Path, form: Form, wishes: Wishes, screen: Screen) -> list[str]:
    """What was found, for the card. Raises ModelError if the result is not what was trained."""
    if not wishes.verify:
        return []
    too_large = room_to_verify(job.base_model)
    if too_large is not None:
        screen.line(f"verifying tensor by tensor, because base + adapter cannot be held: {too_large}")
        with screen.work("verifying", "MB") as work:
            by_layers = verify_layers(job.adapter, find_base(job.base_model), folder, form, work.at_bytes)
        screen.line(f"verified, read back, against base + update in fp32: {by_layers}")
        return [f"Read back and compared with base + update in fp32, tensor by tensor: {by_layers}."]
    rows = [] if job.held_out is None else job.held_out()
    what = f"{len(rows)} held-out rows of the recipe" if rows else "built-in prompts"
    agreement = verify_merged(
        job.adapter,
        job.base_model,
        folder,
        dequantised=wishes.dequantize,
        trust_remote_code=job.trust_remote_code,
        rows=rows,
    )
    screen.line(f"verified, read back, against base + adapter on {what}: {agreement}")
    return [f"Read back and compared with base + adapter in fp32 on {what}: {agreement}."]


@dataclass(frozen=True)
class MergeJob:
    """What is merged. `token_ids`: special tokens that the recipe chose, by role; `held_out`: token ids of some of the
    recipe's held-out rows."""

    adapter: Path
    base_model: str
    token_ids: dict[str, int]
    note: str = ""
    trust_remote_code: bool = False
    held_out: Callable[[], list[torch.Tensor]] | None = None


_HELD_OUT_ROWS, _ROW_TOKENS = 8, 512


def _held_out(recipe: Recipe, tokenizer: "PreTrainedTokenizerBase") -> list[torch.Tensor]:
    """The beginnings of a few held-out rows, if the training run left them prepared."""
    section = held_out_only(recipe.data) if recipe.data.streaming else recipe.data
    prepared = prepared_already(section, recipe.packing, tokenizer, recipe.output.seed)
    if prepared is None:
        return []
    documents = (prepared.held_out.document(i)[0] for i in range(min(_HELD_OUT_ROWS, len(prepared.held_out))))
    return [torch.tensor(ids[:_ROW_TOKENS].tolist()) for ids in documents]


def _of_recipe(recipe_name: str, overrides: list[str], screen: Screen) -> MergeJob:
    loaded = load(recipe_name, overrides)
    recipe = loaded.recipe
    for note in loaded.notes:
        screen.line(f"note: {note}")
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
    base = readable_base(recipe, World())
    require_same_base(output_dir, base)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(output_dir)
    held_out = partial(_held_out, recipe, tokenizer)
    trust = recipe.model.trust_remote_code
    return MergeJob(
        output_dir,
        base,
        special_ids(recipe.tokenizer, tokenizer),
        trust_remote_code=trust,
        held_out=held_out,
    )


def _of_folder(folder: Path, overrides: list[str]) -> MergeJob:
    """An adapter by itself, of whatever tool; it says which base it was trained on."""
    recorded = read_config(folder).get("base_model_name_or_path")
    named = dict(pair.split("=", 1) for pair in overrides if "=" in pair)
    unknown = [pair for pair in overrides if pair.partition("=")[0] != "base_model"]
    if unknown:
        raise RecipeError(
            f"'{unknown[0]}' cannot be set for an adapter without a recipe. "
            "There are: base_model, output, dtype, shard_size, base, verify."
        )
    base_model = named.get("base_model") or recorded
    if not base_model:
        raise ModelError(f"the adapter in '{folder}' does not say what it was trained on. Name it: base_model=...")
    note = ""
    if recorded and base_model != recorded:
        note = f"the adapter says that it was trained on '{recorded}'; it is merged into '{base_model}', as you ask"
    return MergeJob(folder, base_model, {}, note)
