"""The batch-size ramp: the first steps of a run may have fewer rows than the global batch."""

from dataclasses import dataclass
from itertools import accumulate

from finetuner.errors import PlanError
from finetuner.recipe.sections import BatchSection


@dataclass(frozen=True)
class Ramp:
    """The first steps of a run, which have fewer rows than the global batch.

    begins: rows trained on before each of them, and after the last. left_out: how many fewer rows they take than as
    many full steps would, by which every later step begins earlier.
    """

    begins: tuple[int, ...] = (0,)
    left_out: int = 0

    @classmethod
    def from_section(cls, section: BatchSection, global_batch: int) -> "Ramp":
        """Return the ramp of a recipe. Raises PlanError if its first step has the full global batch, or more."""
        ramp = section.rampup_batch_size
        if ramp is None:
            return cls()
        if ramp.start >= global_batch:
            raise PlanError(
                f"rampup_batch_size starts with {ramp.start} rows, which are to rise to a global batch of "
                f"{global_batch}.\nWrite a smaller start, remove rampup_batch_size, or raise "
                "gradient_accumulation_steps."
            )
        sizes = (ramp.start + (global_batch - ramp.start) * k // ramp.steps for k in range(ramp.steps))
        begins = tuple(accumulate(sizes, initial=0))
        return cls(begins, ramp.steps * global_batch - begins[-1])

    @property
    def steps(self) -> int:
        return len(self.begins) - 1

    def rows_before(self, step: int, global_batch: int) -> int:
        """Count the rows of the first `step` steps, in an epoch without an end."""
        return self.begins[step] if step < len(self.begins) else step * global_batch - self.left_out

    def require_steps(self, total: int) -> None:
        """Raise PlanError unless a run of `total` steps comes to the full global batch."""
        if self.steps > total:
            raise PlanError(
                f"the batch grows for {self.steps} steps, but the run has {total}.\n"
                f"Write `steps: {max(1, total // 10)}` in rampup_batch_size, or train longer (num_epochs, max_steps)."
            )

    def require_rows(self, num_rows: int, global_batch: int) -> None:
        """Raise PlanError unless the ramp fits into the first epoch."""
        if self.begins[-1] > num_rows:
            start = self.begins[1]
            fitting = 2 * num_rows // (start + global_batch)  # steps have (start + global_batch) / 2 rows, or fewer
            instead = f"Write `steps: {fitting}` in it at most" if fitting else "Remove it"
            raise PlanError(
                f"the {self.steps} steps of rampup_batch_size take {self.begins[-1]:,} rows, but an epoch has "
                f"{num_rows:,}.\n{instead}, or train on more rows."
            )


NO_RAMP = Ramp()
