"""Commands beside training, for a recipe: make its tokenizer, prepare its rows, merge its adapter."""

from pathlib import Path

from finetuner.errors import ModelError
from finetuner.export.merge import merge_adapter, require_same_base
from finetuner.models.tokenizer import load_tokenizer
from finetuner.recipe import Loaded
from finetuner.run import prepare_rows, special_ids
from finetuner.scratch import texts_of, tokenizer_name
from finetuner.summary import rows_line
from finetuner.training.progress import Screen, duration, quiet_libraries
from finetuner.world import World


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
        if prepared.counts:
            screen.line(f"note: these rows are listed in {prepared.listed}")
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


def merge(loaded: Loaded, recipe_name: str) -> None:
    """Merge the adapter in output_dir into its base, to output_dir/merged. Raises FinetunerError."""
    recipe = loaded.recipe
    screen = Screen(speaks=True)
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
    quiet_libraries(screen)
    require_same_base(output_dir, recipe.model.base_model)
    from transformers import AutoTokenizer

    token_ids = special_ids(recipe, AutoTokenizer.from_pretrained(output_dir))
    with screen.work("merging", "MB") as work:
        merged = merge_adapter(output_dir, recipe.model.base_model, output_dir / "merged", work.at, token_ids)
    screen.line(
        f"merged {merged.num_merged} of {merged.num_tensors} tensors ({merged.num_bytes / 1e6:,.0f} MB) in "
        f"{duration(merged.seconds)}"
    )
    if merged.num_dequantised:
        screen.line(
            f"{merged.num_dequantised} tensors rounded as the quantised base was that the adapter was trained on"
        )
    screen.line(f"done: {merged.folder}")
