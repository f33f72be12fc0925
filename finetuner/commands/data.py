"""`finetuner data`: prepare the rows of a recipe ahead of training."""

from typing import TYPE_CHECKING

from finetuner.console import Screen, quiet_libraries
from finetuner.data.inputs import prepare_rows
from finetuner.data.prepare import BY_WEIGHT
from finetuner.recipe import Loaded
from finetuner.run.summary import rows_line
from finetuner.world import World

if TYPE_CHECKING:
    pass


def prepare_data(loaded: Loaded, recipe_name: str) -> None:
    """Prepare the recipe's rows, so that training finds them ready. Raises FinetunerError."""
    recipe, screen = loaded.recipe, Screen(speaks=True)
    for note in loaded.notes:
        screen.line(f"note: {note}")
    quiet_libraries(screen)
    _, prepared = prepare_rows(recipe, World(), recipe.output.seed, screen)
    rows = [
        ("recipe", recipe_name),
        ("rows", rows_line(prepared, recipe.data)),
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
