"""The session of a training run: recipe, ranks, plan, screen, and the output folder that it holds to its end."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetuner.checkpoint.folder import list_checkpoints
from finetuner.checkpoint.output_dir import claimed
from finetuner.console import Screen, quiet_libraries
from finetuner.errors import FinetunerError, LostConnectionError, PreemptedError
from finetuner.export.hub import require_hub, upload_result
from finetuner.export.model_card import write_card
from finetuner.export.step_uploads import require_whole_checkpoints
from finetuner.parallel.launch import use_threads_and_matmuls
from finetuner.plan.run import Plan
from finetuner.recipe import Recipe
from finetuner.training.optimizer import require_optimizer
from finetuner.training.trackers import require_trackers
from finetuner.world import World


@dataclass(frozen=True)
class Session:
    """A run's recipe, plan and screen.

    `name`: how the recipe is called in messages, so that it can be typed again. `file`: the user's file of it, which no
    run may change; None: it came as a value.
    """

    recipe: Recipe
    name: str
    world: World
    plan: Plan
    screen: Screen
    file: Path | None = None

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.output.output_dir)

    @property
    def is_adapter(self) -> bool:
        return self.recipe.adapter.adapter is not None


@contextmanager
def open_session(recipe: Recipe, file: str | None, notes: Iterable[str]) -> Iterator[Session]:
    """Yield the session of a run that holds its output folder; at its end, write the model card and upload the result.

    `file`: the recipe's; None: it is called by the copy of it that the run writes.
    Raises PlanError for a world or packages that the recipe cannot run with, and CheckpointError if the folder cannot
    be had. A failure that is not a mistake in the input says how to resume.
    """
    world = World.detect()
    screen = Screen(enabled=world.is_main)
    for note in notes:
        screen.line(f"note: {note}")
    plan = Plan.from_recipe(recipe, world)
    require_trackers(recipe.tracking)
    require_optimizer(recipe.optimizer.optimizer)
    require_hub(recipe.output.hub_model_id)
    require_whole_checkpoints(recipe.output, sharded=plan.parallel.sharded_checkpoints)
    for plan_note in plan.notes:
        screen.line(f"note: {plan_note}")
    quiet_libraries(screen)
    use_threads_and_matmuls(world, recipe.precision.tf32)
    name = file or str(Path(recipe.output.output_dir) / "recipe.yml")
    session = Session(recipe, name, world, plan, screen, file=None if file is None else Path(file))
    if not world.is_main:
        yield session
        return
    replaces = recipe.output.resume_from_checkpoint is not False or recipe.output.overwrite_output_dir
    with claimed(session.output_dir, replaces=replaces):
        try:
            yield session
            _publish(session)
        except BaseException as error:
            is_mistake = isinstance(error, FinetunerError) and not isinstance(
                error, PreemptedError | LostConnectionError
            )
            if not is_mistake and list_checkpoints(session.output_dir):
                screen.line(f"resume with: accelerate launch -m finetuner.train {name} resume_from_checkpoint=true")
            raise


def _publish(session: Session) -> None:
    output, folder = session.recipe.output, session.output_dir
    what = "An adapter" if session.is_adapter else "A model"
    write_card(folder, folder, session.recipe.model.base_model, what)
    if output.hub_model_id is not None:
        session.screen.line(f"uploading {folder} to {output.hub_model_id}")
        address = upload_result(
            folder, output.hub_model_id, private=output.hub_private_repo, replaces=output.hub_strategy != "end"
        )
        session.screen.line(f"done: the result is at {address}")
