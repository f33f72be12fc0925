"""Options of an evaluation that are no recipe's keys."""

from dataclasses import dataclass
from pathlib import Path

from finetuner.errors import RecipeError
from finetuner.evaluation.benchmark_tasks import BenchmarkTasks


@dataclass(frozen=True)
class EvaluationOptions:
    """Measures to take, and where to write them.

    `num_questions`: held-out questions to answer at most. `data`: files of held-out rows, all of `type`; or `recipe`:
    the one whose held-out rows to take. `out`: the folder for the results, None for the model's own.
    """

    num_questions: int = 100
    data: tuple[str, ...] = ()
    type: str | None = None
    recipe: str | None = None
    tasks: BenchmarkTasks | None = None
    out: Path | None = None

    @property
    def names_rows(self) -> bool:
        """Whether they say which rows to take, in the place of a run's own."""
        return bool(self.data) or self.recipe is not None

    def require_consistent(self) -> None:
        """Raise RecipeError if two options contradict each other, or one needs another."""
        if self.data and self.recipe is not None:
            raise RecipeError("--data and --recipe both say which rows to take. Remove one of the two.")
        if self.data and self.type is None:
            raise RecipeError(
                f"--data {self.data[0]} needs --type beside it: how its rows read, such as --type alpaca."
            )
        if self.type is not None and not self.data:
            raise RecipeError(f"--type {self.type} says how the rows of --data read. Give --data FILE, or remove it.")
