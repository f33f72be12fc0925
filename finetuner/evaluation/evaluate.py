"""Evaluate base, adapter and merged model side by side: held-out rows, short answers, benchmark tasks."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetuner.console import Screen, quiet_libraries
from finetuner.data.cache import prepare_once
from finetuner.data.chat_templates import choose_template
from finetuner.data.prepared_data import PreparedData, held_out_only
from finetuner.data.tokenized_rows import tokenize_rows
from finetuner.data.tokenizer import load_tokenizer
from finetuner.errors import DataError, ModelError
from finetuner.evaluation.answer_scores import score_answers
from finetuner.evaluation.benchmark_tasks import BenchmarkTasks, score_tasks
from finetuner.evaluation.compared_models import (
    ComparedModels,
    LoadableModel,
    loadable_models,
    models_of_folder,
    models_of_run,
)
from finetuner.evaluation.held_out_loss import score_held_out
from finetuner.evaluation.options import EvaluationOptions
from finetuner.evaluation.question_answering import HeldOutQuestion, answer_questions, find_questions
from finetuner.evaluation.settings import EvaluationSettings, recipe_of_model, recipe_of_run, settings_of
from finetuner.evaluation.tables import ModelScores, markdown, write_results
from finetuner.models.config_overrides import prepared_base
from finetuner.objectives.text_score import TextScore
from finetuner.recipe import Recipe
from finetuner.recipe.sections import TokenizerSection
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvaluationInputs:
    """Models to compare, and the rows to compare them on; `prepared`: None if only benchmark tasks are asked for.

    `folder`: where results are written if the options name no folder; None: nowhere."""

    settings: EvaluationSettings
    models: ComparedModels
    tokenizer: "PreTrainedTokenizerBase"
    prepared: PreparedData | None
    folder: Path | None


@dataclass(frozen=True)
class Evaluation:
    """Scores of the models, base first, and the folder that the results belong into; None if they name no place."""

    scores: list[ModelScores]
    folder: Path | None

    @property
    def table(self) -> str:
        """Scores as Markdown tables."""
        return markdown(self.scores)

    def write(self) -> tuple[Path, ...]:
        """Write the results into the folder, and return the files."""
        assert self.folder is not None
        return write_results(self.folder, self.scores)


def evaluate_target(target: str, overrides: list[str], options: EvaluationOptions, screen: Screen) -> Evaluation:
    """Score what `target` names: a recipe, the folder of a run, or a model folder or hub id. Raises FinetunerError."""
    world = World.detect()
    of_run = recipe_of_run(target, overrides, options)
    loaded = of_run or recipe_of_model(target, overrides, options)
    for note in loaded.notes:
        screen.line(f"note: {note}")
    quiet_libraries(screen)
    if of_run is not None:
        inputs = inputs_of_run(of_run.recipe, options, world, screen)
    else:
        inputs = inputs_of_model(target, settings_of(loaded.recipe, world), options, world, screen)
    scores = score_models(inputs, options, torch.device(world.device), screen)
    if not scores:
        raise ModelError(f"there is no model in {loaded.recipe.output.output_dir} to evaluate. Train it first.")
    return Evaluation(scores, options.out or inputs.folder)


def inputs_of_run(recipe: Recipe, options: EvaluationOptions, world: World, screen: Screen) -> EvaluationInputs:
    """Return what a recipe's run began with and left, and the rows it holds out. Raises FinetunerError."""
    settings, output_dir = settings_of(recipe, world), Path(recipe.output.output_dir)
    models = models_of_run(
        output_dir,
        prepared_base(recipe.model, recipe.data.dataset_prepared_path, world),
        adapter=recipe.adapter.adapter,
        quantization=recipe.quantization,
        dtype=settings.dtype,
    )
    vocabulary, prepared = tokenize_rows(
        recipe.model, recipe.tokenizer, recipe.data, recipe.packing, world=world, seed=settings.plan.seed, screen=screen
    )
    if not len(prepared.held_out_rows) and options.tasks is None:
        raise DataError(
            "the recipe holds no rows out. Write val_set_size (such as 0.05) or test_datasets, as the training run had."
        )
    rows = prepared if len(prepared.held_out_rows) else None
    return EvaluationInputs(settings, models, vocabulary.tokenizer, rows, output_dir)


def inputs_of_model(
    target: str, settings: EvaluationSettings, options: EvaluationOptions, world: World, screen: Screen
) -> EvaluationInputs:
    """Return a model and what it was made of, and the rows that options name, tokenized by the model's own tokenizer.

    Raises FinetunerError."""
    models = models_of_folder(target)
    tokenizer = load_tokenizer(TokenizerSection(), models.tokenizer, settings.trust_remote_code).tokenizer
    tokenizer.chat_template = choose_template(settings.data, tokenizer.chat_template)
    prepared = None
    if options.names_rows:
        section = held_out_only(settings.data) if settings.data.test_datasets else settings.data
        with screen.work("tokenizing", "rows") as work:
            prepared = prepare_once(section, settings.packing, tokenizer, settings.plan.seed, world, work.at)
        if not len(prepared.held_out_rows):
            raise DataError(f"{options.recipe} holds no rows out. Write val_set_size or test_datasets, or give --data.")
    folder = Path(target).expanduser()
    return EvaluationInputs(settings, models, tokenizer, prepared, folder if folder.is_dir() else None)


def score_models(
    inputs: EvaluationInputs, options: EvaluationOptions, device: torch.device, screen: Screen
) -> list[ModelScores]:
    """Load the models one after another, base first, and score each; [] if none of them exists."""
    questions: list[HeldOutQuestion] = []
    if inputs.prepared is not None:
        questions = find_questions(inputs.prepared, inputs.tokenizer, options.num_questions)
    scores: list[ModelScores] = []
    for model in loadable_models(
        inputs.models,
        dtype=inputs.settings.dtype,
        attention=inputs.settings.attention,
        device=device,
        vocab_size=len(inputs.tokenizer),
        trust_remote_code=inputs.settings.trust_remote_code,
    ):
        scores.append(score_model(model, inputs, questions, screen, options.tasks))
        gc.collect()  # the next one takes its place in memory
    return scores


def score_model(
    loadable: LoadableModel,
    inputs: EvaluationInputs,
    questions: list[HeldOutQuestion],
    screen: Screen,
    tasks: BenchmarkTasks | None = None,
) -> ModelScores:
    """Load one model, and score it."""
    model, tokenizer = loadable.load().eval(), inputs.tokenizer
    by_source: dict[str, TextScore] = {}
    if inputs.prepared is not None:
        with screen.work(f"evaluating {loadable.name}", "rows") as work:
            by_source = score_held_out(model, tokenizer, inputs.prepared, inputs.settings, work.at)
    answers = None
    if questions:
        with screen.work(f"answering, {loadable.name}", "questions") as work:
            answers = score_answers(answer_questions(model, tokenizer, questions, work.at))
    task_scores = () if tasks is None else tuple(score_tasks(model, tokenizer, tasks))
    return ModelScores(loadable.name, by_source, answers, task_scores)
