"""Model card of a result, its README.md: base, data, figures, recipe and versions."""

import json
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from finetuner import __version__
from finetuner.checkpoint.output_dir import CARD_MARK
from finetuner.errors import RecipeError
from finetuner.recipe import load_recipe
from finetuner.recipe.gpt_shape import FROM_SCRATCH
from finetuner.recipe.sections import DatasetEntry

LIBRARIES = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed")


def write_card(folder: Path, run: Path, base_model: str, what: str, facts: Iterable[str] = ()) -> None:
    """Write README.md into `folder`, unless it has one that we did not write.

    `run` is the folder of the run, whose recipe.yml (it has no secrets) and metrics.jsonl are shown if it has them;
    `what` says in a few words what the weights are; each of `facts` becomes a paragraph.
    """
    path = folder / "README.md"
    if path.exists() and CARD_MARK not in path.read_text(encoding="utf-8"):
        return
    header = ["---", "library_name: " + ("peft" if (folder / "adapter_config.json").exists() else "transformers")]
    from_scratch = base_model == FROM_SCRATCH
    if not from_scratch and not Path(base_model).exists():  # a path of this machine means nothing elsewhere
        header.append(f"base_model: {base_model}")
    lines = [*header, "tags:", "- finetuner", "---", CARD_MARK, f"# {folder.resolve().name}", ""]
    origin = "scratch" if from_scratch else f"`{base_model}`"
    lines += [f"{what}, trained from {origin} with finetuner {__version__}.", *_paragraphs(facts)]
    recipe = run / "recipe.yml"
    if recipe.exists():
        lines += _data(recipe) + _figures(run / "metrics.jsonl")
        lines += ["", "## Recipe", "", "```yaml", recipe.read_text(encoding="utf-8").rstrip(), "```"]
    lines += ["", "## Versions", "", f"Python {platform.python_version()}, {_versions()}."]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _paragraphs(facts: Iterable[str]) -> list[str]:
    return [line for fact in facts for line in ("", fact)]


def _data(recipe: Path) -> list[str]:
    try:
        data = load_recipe(recipe, check_files=False).data
    except RecipeError:  # of a version that knew other keys; it is shown as it is
        return []
    rows = [("trained on", entry) for entry in data.datasets] + [("held out", entry) for entry in data.test_datasets]
    lines = ["", "## Data", "", "| | source | format |", "|---|---|---|"]
    lines += [f"| {use} | {_source(entry)} | {entry.type} |" for use, entry in rows]
    if data.val_set_size:
        lines += ["", f"Held out of the rows trained on: `val_set_size: {data.val_set_size:g}`."]
    return lines


def _source(entry: DatasetEntry) -> str:
    return f"`{Path(entry.path).name if Path(entry.path).is_absolute() else entry.path}`"


def _figures(metrics: Path) -> list[str]:
    if not metrics.exists():
        return []
    rows: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text().splitlines() if line.strip()]
    trained, held_out = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    lines = ["", "## Figures", "", "| | first | last |", "|---|---|---|"]
    for name, found, key in (
        ("training loss", trained, "loss"),
        ("held-out loss", held_out, "eval_loss"),
        ("held-out perplexity", held_out, "eval_perplexity"),
    ):
        if found:
            lines.append(f"| {name} | {found[0][key]:.4f} | {found[-1][key]:.4f} |")
    if trained:
        lines += ["", f"{trained[-1]['step']:,} steps, {trained[-1]['total_tokens']:,} trained tokens."]
    return lines


def _versions() -> str:
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
