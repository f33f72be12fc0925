"""Scores of several models as Markdown tables and as JSON."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuner.evaluation.answer_scores import AnswerScore
from finetuner.evaluation.benchmark_tasks import TaskScore
from finetuner.objectives.text_score import TextScore, total

RESULTS = ("evaluation.json", "evaluation.md")


@dataclass(frozen=True)
class ModelScores:
    """Scores of one model: losses by source, answers (None if none were asked for), figures of benchmark tasks."""

    name: str
    by_source: dict[str, TextScore]
    answers: AnswerScore | None
    tasks: tuple[TaskScore, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as evaluation.json has them."""
        found: dict[str, Any] = {"model": self.name}
        if self.by_source:
            found |= _figures(total(self.by_source.values()))
            found["sources"] = {name: _figures(one) for name, one in self.by_source.items()}
        if self.answers is not None:
            found |= {
                "exact_match": self.answers.exact_match,
                "f1": self.answers.f1,
                "num_questions": self.answers.num_rows,
            }
        for one in self.tasks:
            of_task = found.setdefault("tasks", {}).setdefault(one.task, {"num_rows": one.num_rows})
            of_task[one.metric] = one.value
        return found


def _figures(one: TextScore) -> dict[str, Any]:
    return {
        "loss": one.loss,
        "perplexity": one.perplexity,
        "bits_per_byte": one.bits_per_byte,
        "num_tokens": one.num_tokens,
        "num_bytes": one.num_bytes,
    }


def markdown(scores: Sequence[ModelScores]) -> str:
    """Return all tables: losses and answers, then benchmark tasks."""
    return "\n\n".join(table for table in (loss_table(scores), task_table(scores)) if table)


def loss_table(scores: Sequence[ModelScores]) -> str:
    """Return a row for each model, then for each source that it was measured on; "" if only tasks were asked for."""
    if not any(one.by_source for one in scores):
        return ""
    num_questions = next((one.answers.num_rows for one in scores if one.answers is not None), None)
    heading = ["model", "source", "tokens", "loss", "perplexity", "bits per byte"]
    heading += [] if num_questions is None else ["exact match", "F1"]
    lines = _head(heading)
    for model in scores:
        sources = model.by_source if len(model.by_source) > 1 else {}
        for name, one in {"all": total(model.by_source.values()), **sources}.items():
            cells = [model.name, name, f"{one.num_tokens:,}", f"{one.loss:.4f}", f"{one.perplexity:.3f}"]
            cells.append("" if math.isnan(one.bits_per_byte) else f"{one.bits_per_byte:.4f}")
            if num_questions is not None:
                cells += _answer_cells(model.answers if name == "all" else None)
            lines.append(_row(cells))
    if num_questions is not None:
        about = f"over {num_questions:,} held-out questions, greedy answers."
        lines += ["", f"Exact match and F1 as SQuAD counts them, {about}"]
    return "\n".join(lines)


def _answer_cells(answers: AnswerScore | None) -> list[str]:
    return ["", ""] if answers is None else [f"{answers.exact_match:.1%}", f"{answers.f1:.1%}"]


def task_table(scores: Sequence[ModelScores]) -> str:
    """Return a row for each figure of each task, a column for each model; "" if no tasks were asked for."""
    if not scores[0].tasks:
        return ""
    lines = _head(["task", "rows", "figure", *(model.name for model in scores)])
    for i, one in enumerate(scores[0].tasks):
        found = [model.tasks[i] for model in scores]
        values = [f"{score.value:.4f}" + ("" if score.error is None else f" ± {score.error:.4f}") for score in found]
        lines.append(_row([one.task, f"{one.num_rows:,}", one.metric, *values]))
    return "\n".join(lines)


def _head(cells: list[str]) -> list[str]:
    return [_row(cells), "|" + "---|" * len(cells)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def write_results(folder: Path, scores: Sequence[ModelScores]) -> tuple[Path, ...]:
    """Write evaluation.json and evaluation.md into a folder, which is made if it is missing; return both files."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json, as_page = (folder / name for name in RESULTS)
    as_json.write_text(json.dumps([one.as_dict() for one in scores], indent=1) + "\n")
    as_page.write_text(markdown(scores) + "\n")
    return as_json, as_page
