"""Commands beside training, for a recipe: make its tokenizer, prepare its rows, merge its adapter, export a model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetuner.console import Screen, duration, quiet_libraries
from finetuner.data.cache import prepared_already
from finetuner.data.prepare import BY_WEIGHT, held_out_only
from finetuner.errors import ModelError, RecipeError
from finetuner.export.adapter_updates import read_config
from finetuner.export.gguf_export import export_gguf, read_source
from finetuner.export.hub import require_hub, upload_result
from finetuner.export.merge import Form, merge_adapter, require_same_base
from finetuner.export.merge_options import Wishes, read_wishes
from finetuner.export.model_card import write_card
from finetuner.export.serving import check_for_vllm, modelfile
from finetuner.export.training_base import known_settings
from finetuner.export.verify_logits import room_to_verify, verify_merged
from finetuner.export.verify_tensors import verify_layers
from finetuner.models.files import find_base
from finetuner.models.from_scratch import texts_of, tokenizer_name
from finetuner.models.pickled_weights import readable_base
from finetuner.models.quantized import read_record
from finetuner.models.tokenizer import load_tokenizer
from finetuner.recipe import Loaded, Recipe, load
from finetuner.run.summary import rows_line
from finetuner.run.train import prepare_rows, special_ids
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare_data(loaded: Loaded, recipe_name: str) -> None:
    """Prepare the recipe's rows, so that training finds them ready. Raises FinetunerError."""
    recipe, screen = loaded.recipe, Screen(speaks=True)
    for note in loaded.notes:
        screen.line(f"note: {note}")
    quiet_libraries(screen)
    _, prepared = prepare_rows(recipe, World(), recipe.output.seed, screen)
    rows = [
        ("recipe", recipe_name),
        ("rows", rows_line(prepared, recipe)),
        ("longest", f"{prepared.train.longest:,} tokens"),
    ]
    screen.table(rows)
    for line in prepared.notes:
        screen.line(f"note: {line}")
    if prepared.listed is not None:
        if any(reason != BY_WEIGHT for reason in prepared.counts):
            which = "the other" if BY_WEIGHT in prepared.counts else "these"
            screen.line(f"note: {which} rows are listed in {prepared.listed}")
        screen.line(f"done: {prepared.listed.parent}")


_SAMPLE_BYTES = 2_000_000  # of text to measure a tokenizer with


def make_tokenizer(loaded: Loaded) -> None:
    """Make the tokenizer that the recipe asks for, and measure it on the recipe's text. Raises FinetunerError."""
    recipe, screen = loaded.recipe, Screen(speaks=True)
    for note in loaded.notes:
        screen.line(f"note: {note}")
    quiet_libraries(screen)
    with screen.work("making the tokenizer", "rows") as work:
        name = tokenizer_name(recipe, World(), work.at) or recipe.model.base_model
    tokenizer = load_tokenizer(recipe.tokenizer, name, recipe.model.trust_remote_code).tokenizer
    rows = [("tokenizer", name), ("vocabulary", f"{len(tokenizer):,} tokens")]
    texts, num_bytes = [], 0
    plain = tuple(entry for entry in recipe.data.datasets if entry.type == "completion")
    for text in texts_of(plain, recipe):
        texts.append(text[:_SAMPLE_BYTES])
        num_bytes += len(texts[-1].encode())
        if num_bytes >= _SAMPLE_BYTES:
            break
    if texts:
        num_tokens = sum(len(tokens.ids) for tokens in tokenizer.backend_tokenizer.encode_batch(texts))
        num_words = sum(len(text.split()) for text in texts)
        rows.append(("bytes per token", f"{num_bytes / num_tokens:.3f}"))
        rows.append(("tokens per word", f"{num_tokens / max(1, num_words):.3f}"))
        rows.append(("measured on", f"{num_bytes:,} bytes of the datasets: {num_tokens:,} tokens, {num_words:,} words"))
    screen.table(rows)


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
        special_ids(recipe, tokenizer),
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


def export(model: Path, to: str, form: str, out: Path | None) -> None:
    """Write `model` for llama.cpp or Ollama, or check it for vLLM. Raises FinetunerError."""
    screen = Screen(speaks=True)
    if to not in ("gguf", "ollama", "vllm"):
        raise ModelError(f"--to {to} is not a tool that can be written for. Write gguf, ollama or vllm.")
    quiet_libraries(screen)
    if to == "vllm":
        good, command = check_for_vllm(model)
        for line in good:
            screen.line(line)
        screen.line(f"serve it: {command}")
        return
    folder = model if out is None else out
    file = folder / f"{model.resolve().name}-{form}.gguf"
    page = modelfile(file.name, read_source(model).tokenizer) if to == "ollama" else None
    with screen.work("writing", "MB") as work:
        agreement = export_gguf(model, file, form, work.at_bytes)
    screen.line(f"verified, read back, against {model}: {agreement}")
    if page is not None:
        (folder / "Modelfile").write_text(page, encoding="utf-8")
        screen.line(f"create it: ollama create {model.resolve().name} -f {folder / 'Modelfile'}")
    screen.line(f"done: {file}")


def push(target: str, repo_id: str | None, *, public: bool) -> None:
    """Upload an adapter, a trained or a merged model: a folder, or what the run of a recipe left. Raises
    FinetunerError."""
    folder, recipe = Path(target).expanduser(), None
    if folder.suffix in (".yml", ".yaml"):
        recipe = load(target).recipe
        folder = Path(recipe.output.output_dir)
    elif repo_id is None:
        near = (folder / "recipe.yml", folder.parent / "recipe.yml")
        recipe = next((load(path, check_files=False).recipe for path in near if path.exists()), None)
    if not any((folder / name).exists() for name in ("adapter_config.json", "config.json")):
        raise ModelError(f"'{folder}' holds neither an adapter nor a model. Name the folder of a result.")
    repo_id = repo_id or (None if recipe is None else recipe.output.hub_model_id)
    if repo_id is None:
        raise RecipeError("nothing says where to upload to. Name a repository: --to me/my-model")
    require_hub(repo_id)
    private = not public and (recipe is None or recipe.output.hub_private_repo)
    screen = Screen(speaks=True)
    screen.line(f"uploading {folder} to {repo_id} ({'private' if private else 'public'}, if it is new)")
    screen.line(f"done: {upload_result(folder, repo_id, private=private)}")
