"""Benchmark tasks, through EleutherAI's lm-eval (https://github.com/EleutherAI/lm-evaluation-harness).

Its data come through `datasets`, which reads HF_HOME, HF_DATASETS_CACHE and HF_DATASETS_OFFLINE: what an earlier run
or a copied cache has stored is used without a network.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuner.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH = 8  # prompts at a time


@dataclass(frozen=True)
class BenchmarkTasks:
    """Names of tasks that lm-eval knows, or finds in a folder of YAML tasks; of each the first `limit` rows, or all."""

    names: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None


@dataclass(frozen=True)
class TaskScore:
    """One figure of one task; `error`: its standard error, where lm-eval gives one."""

    task: str
    metric: str
    value: float
    error: float | None
    num_rows: int


def require_tasks(tasks: BenchmarkTasks) -> None:
    """Raise RecipeError, before a model is loaded, if lm-eval is missing or does not know one of the names."""
    manager = _manager(tasks)
    unknown = [name for name in tasks.names if name not in manager.all_tasks]
    if unknown:
        where = f" or in {tasks.folder}" if tasks.folder is not None else ""
        near = [name for name in manager.all_tasks if name.startswith(unknown[0][:4])][:8]
        listed = f" There are: {', '.join(near)}." if near else ""
        raise RecipeError(
            f"lm-eval has no task '{unknown[0]}' of its own{where}.{listed}\n"
            "See all: lm-eval ls tasks. A folder with YAML tasks of your own: --include-path FOLDER"
        )


def _manager(tasks: BenchmarkTasks) -> Any:
    try:
        # it logs what it does, and its imports warn of one another
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(
            f"--tasks needs lm-eval, and '{error.name}' is missing: pip install 'finetuner[eval]'"
        ) from error
    return TaskManager(include_path=None if tasks.folder is None else str(tasks.folder))


def score_tasks(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tasks: BenchmarkTasks
) -> list[TaskScore]:
    """Return lm-eval's figures, task by task. Raises DataError if a task's data cannot be had."""
    manager = _manager(tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        runner: Any = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH)
        try:
            found: Any = simple_evaluate(
                runner,
                tasks=list(tasks.names),
                task_manager=manager,
                limit=tasks.limit,
                log_samples=False,
                bootstrap_iters=0,
            )
        except (OSError, ValueError, KeyError) as error:  # `datasets` has no one kind for what it cannot find
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"lm-eval could not run {', '.join(tasks.names)}: {first}\n"
                "Without a network its data have to be in the cache (HF_HOME, HF_DATASETS_CACHE) already."
            ) from error
    return scores_of(found, tasks.names)


def scores_of(found: dict[str, Any], names: Sequence[str]) -> list[TaskScore]:
    """List lm-eval's results in the order of `names`: its keys are "metric,filter" and "metric_stderr,filter"."""
    rows = {name: sample["effective"] for name, sample in found["n-samples"].items()}
    of_group = {name: sum(rows.get(one, 0) for one in inner) for name, inner in found["group_subtasks"].items()}
    scores = [
        score
        for task, figures in found["results"].items()
        for score in _task_scores(task, figures, rows.get(task) or of_group.get(task, 0))
    ]
    order = {name: i for i, name in enumerate(names)}
    return sorted(scores, key=lambda score: order.get(score.task, len(order)))


def _task_scores(task: str, figures: dict[str, Any], num_rows: int) -> Iterator[TaskScore]:
    for key, value in figures.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = figures.get(f"{metric}_stderr,{chosen}")
        name = metric if chosen == "none" else f"{metric} ({chosen})"
        yield TaskScore(task, name, float(value), error if isinstance(error, float) else None, num_rows)
