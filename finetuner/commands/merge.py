"""`finetuner merge`: merge an adapter into its base model, and verify the result."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetuner.console import Screen, duration, quiet_libraries
from finetuner.errors import RecipeError
from finetuner.export.merge_options import read_merge_options
from finetuner.recipe import load

if TYPE_CHECKING:
    from finetuner.export.merge_writer import WrittenMerge


def merge(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|ADAPTER", help="A recipe, or the folder of an adapter.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Recipe keys, and: output=FOLDER dtype=float32 shard_size=5GB base=original verify=false.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Merge the adapter of a recipe's run, or the one in a folder. Raises FinetunerError."""
    options, others = read_merge_options(overrides or [])
    is_folder = Path(target).is_dir()
    loaded = None if is_folder else load(target, others)
    if is_folder:
        options = replace(options, base_model=_base_model(others))
    from finetuner.export.merge import merge as merge_adapter_of  # imports torch: the recipe is known to be right

    screen = Screen(enabled=True)
    reporter = ScreenReporter(screen)
    for note in () if loaded is None else loaded.notes:
        reporter.note(str(note))
    quiet_libraries(screen)
    source = target if loaded is None else loaded.recipe
    result = merge_adapter_of(source, options, reporter, recipe_name=target)
    if result.verification is not None:
        screen.line(f"verified, read back, against {result.verification}")
    screen.line(f"done: {result.folder}")


def _base_model(words: list[str]) -> str | None:
    """Return the base that KEY=VALUE words name for an adapter's folder. Raises RecipeError for other keys."""
    unknown = [word for word in words if word.partition("=")[0] != "base_model"]
    if unknown:
        raise RecipeError(
            f"'{unknown[0]}' cannot be set for an adapter without a recipe. "
            "There are: base_model, output, dtype, shard_size, base, verify."
        )
    named = [value for _, equals, value in (word.partition("=") for word in words) if equals]
    return named[-1] if named else None


class ScreenReporter:
    """Reporter that prints what a merge announces."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen

    def note(self, text: str) -> None:
        self.screen.line(f"note: {text}")

    @contextmanager
    def progress(self, stage: str) -> Iterator[Callable[[int, int], None]]:
        with self.screen.work(stage, "MB") as work:
            yield work.at_bytes

    def written(self, written: "WrittenMerge") -> None:
        if written.num_bytes_reused:
            self.screen.line(
                f"{written.num_bytes_reused / 1e6:,.0f} MB were written already, by a merge that was interrupted"
            )
        self.screen.line(
            f"merged {written.num_tensors_merged} of {written.num_tensors} tensors ({written.num_bytes / 1e6:,.0f} MB) "
            f"in {duration(written.seconds)}"
        )
        if written.num_tensors_dequantized:
            self.screen.line(
                f"{written.num_tensors_dequantized} tensors rounded as the quantized base was that the adapter was "
                "trained on"
            )
