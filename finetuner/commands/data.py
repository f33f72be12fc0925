"""`finetuner data`: prepare the rows of a recipe ahead of training."""

from typing import TYPE_CHECKING

from finetuner.console import Screen, quiet_libraries
from finetuner.data.inputs import prepare_inputs
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
    _, prepared = prepare_inputs(
        recipe.model, recipe.tokenizer, recipe.data, recipe.packing,
        world=World(), seed=recipe.output.seed, screen=screen,
    )  # fmt: skip
    rows = [
        ("recipe", recipe_name),
        ("rows", rows_line(prepared, recipe)),
        ("longest", f"{prepared.train.longest:,} tokens"),
    ]
    screen.table(rows)
    for line in prepared.notes:
        screen.line(f"note: {line}")
    if prepared.dropped_file is not None:
        if any(reason != BY_WEIGHT for reason in prepared.counts):
            which = "the other" if BY_WEIGHT in prepared.counts else "these"
            screen.line(f"note: {which} rows are listed in {prepared.dropped_file}")
        screen.line(f"done: {prepared.dropped_file.parent}")
