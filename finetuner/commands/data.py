"""`finetuner data`: prepare the rows of a recipe ahead of training."""

from finetuner.commands.arguments import Overrides, RecipePath
from finetuner.console import Screen, quiet_libraries
from finetuner.data.documents import BY_WEIGHT
from finetuner.data.tokenized_rows import tokenize_rows
from finetuner.recipe import load
from finetuner.world import World


def data(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Prepare the recipe's rows, and print how many there are and which were dropped. Raises FinetunerError."""
    loaded = load(recipe, overrides or [])
    from finetuner.run.summary import rows_line  # imports torch: only once the recipe is known to be right

    values, screen = loaded.recipe, Screen(enabled=True)
    for note in loaded.notes:
        screen.line(f"note: {note}")
    quiet_libraries(screen)
    _, prepared = tokenize_rows(
        values.model, values.tokenizer, values.data, values.packing,
        world=World(), seed=values.output.seed, screen=screen,
    )  # fmt: skip
    rows = [
        ("recipe", recipe),
        ("rows", rows_line(prepared, values.data)),
        ("longest", f"{prepared.train.longest:,} tokens"),
    ]
    screen.table(rows)
    for line in prepared.rows_at_a_glance:
        screen.line(line)
    if prepared.dropped_file is not None:
        if any(reason != BY_WEIGHT for reason in prepared.counts):
            which = "the other" if BY_WEIGHT in prepared.counts else "these"
            screen.line(f"note: {which} rows are listed in {prepared.dropped_file}")
        screen.line(f"done: {prepared.dropped_file.parent}")
