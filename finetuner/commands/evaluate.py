"""`finetuner evaluate`: the scores of base, adapter and merged model side by side."""

from pathlib import Path
from typing import Annotated

import typer

from finetuner.commands.arguments import Overrides
from finetuner.console import Screen
from finetuner.errors import RecipeError
from finetuner.evaluation.benchmark_tasks import BenchmarkTasks, require_tasks
from finetuner.evaluation.options import EvaluationOptions
from finetuner.recipe import load


def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help="A recipe, the folder of its run, or a model's or adapter's folder or hub id.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    questions: Annotated[int, typer.Option(min=0, help="Held-out questions to answer; 0: none.")] = 100,
    data: Annotated[list[str] | None, typer.Option(help="A file of rows to measure by; several are sources.")] = None,
    type: Annotated[str | None, typer.Option(help="How the rows of --data read, as datasets.type.")] = None,
    recipe: Annotated[str | None, typer.Option(help="For a MODEL: the recipe whose held-out rows to take.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Benchmark tasks of lm-eval, such as hellaswag,arc_easy.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder with YAML tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task to take.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the results; default: MODEL's.")] = None,
) -> None:
    """Score the target, print the tables, and write them next to the model. Raises FinetunerError."""
    words = overrides or []
    if not Path(target).is_dir() and Path(target).suffix in (".yml", ".yaml"):
        load(target, words)  # what is wrong with a recipe is said before torch is imported
    options = EvaluationOptions(
        questions, tuple(data or ()), type, recipe, _benchmark_tasks(tasks, include_path, limit), out
    )
    options.require_consistent()
    if options.tasks is not None:
        require_tasks(options.tasks)
    from finetuner.evaluation.evaluate import evaluate_target  # imports torch

    screen = Screen(enabled=True)
    found = evaluate_target(target, words, options, screen)
    screen.line(found.table)
    if found.folder is None:
        screen.line("note: written nowhere; to keep the results: --out FOLDER")
    elif out is not None or found.folder.is_dir():
        screen.line(f"written: {' and '.join(str(file) for file in found.write())}")


def _benchmark_tasks(names: str | None, folder: Path | None, limit: int | None) -> BenchmarkTasks | None:
    """Split the names of --tasks; None if there are none. Raises RecipeError for options that need them."""
    chosen = tuple(name.strip() for name in (names or "").split(",") if name.strip())
    if not chosen and (folder is not None or limit is not None):
        raise RecipeError("--include-path and --limit are about benchmark tasks. Name some: --tasks hellaswag")
    return BenchmarkTasks(chosen, folder, limit) if chosen else None
