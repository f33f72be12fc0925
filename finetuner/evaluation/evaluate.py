"""`finetuner evaluate`: held-out rows and benchmark tasks, under base, adapter and merged model side by side."""

import gc
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finetuner.console import Screen, quiet_libraries
from finetuner.data.batch_sampler import evaluation_batches
from finetuner.data.batches import layout_of
from finetuner.data.cache import prepare_once
from finetuner.data.chat_templates import choose_template
from finetuner.data.inputs import prepare_inputs
from finetuner.data.prepared_data import PreparedData, SourceRange, held_out_only
from finetuner.data.token_store import IGNORE_INDEX, Ids
from finetuner.data.tokenizer import load_tokenizer
from finetuner.errors import DataError, ModelError, RecipeError
from finetuner.evaluation.benchmark_tasks import Tasks, TaskScore, require_tasks, score_tasks
from finetuner.evaluation.candidates import Candidate, Lineup, candidates, lineup_of_model, lineup_of_run
from finetuner.evaluation.scores import AnswerScore, score_answers
from finetuner.models.attention import choose_attention
from finetuner.models.document_isolation import wants_flat_packs
from finetuner.models.dtypes import DTYPES
from finetuner.models.generation_config import stop_ids
from finetuner.models.pickled_weights import readable_base
from finetuner.objectives.next_token import TokenLoss
from finetuner.objectives.probe import probe
from finetuner.objectives.text_score import TextScore, total
from finetuner.plan.run import Plan
from finetuner.recipe import Loaded, Recipe, load, load_values
from finetuner.recipe.sections import TokenizerSection
from finetuner.training.loop import loss_of
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_ANSWER_TOKENS = 32  # a longer trained text is no answer that could be the same word by word
RESULTS = ("evaluation.json", "evaluation.md")


@dataclass(frozen=True)
class Wishes:
    """What to measure by. `data`: files of held-out rows, all of `type`; `recipe`: the one whose held-out rows to take;
    `out`: the folder for the results."""

    questions: int = 100
    data: tuple[str, ...] = ()
    type: str | None = None
    recipe: str | None = None
    tasks: Tasks | None = None
    out: Path | None = None


@dataclass(frozen=True)
class Job:
    """Models, and what they are measured by; `prepared`: None if only by tasks."""

    recipe: Recipe
    plan: Plan
    lineup: Lineup
    tokenizer: "PreTrainedTokenizerBase"
    prepared: PreparedData | None
    out: Path | None


@dataclass(frozen=True)
class Question:
    """A row with one short trained span: what stands before it, and the text that is wanted."""

    prompt: Ids
    answer: str


@dataclass(frozen=True)
class Result:
    name: str
    by_source: dict[str, TextScore]
    answers: AnswerScore | None
    tasks: tuple[TaskScore, ...] = ()

    def as_dict(self) -> dict[str, Any]:
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


def evaluate(target: str, overrides: list[str], wishes: Wishes = Wishes()) -> None:
    """Score what `target` names: a recipe, the folder of a run, or a model folder or hub id. Raises FinetunerError."""
    screen, world = Screen(speaks=True), World.detect()
    _require_sense(wishes)
    if wishes.tasks is not None:
        require_tasks(wishes.tasks)
    loaded, of_run = read_recipe(target, overrides, wishes)
    for note in loaded.notes:
        screen.line(f"note: {note}")
    quiet_libraries(screen)
    job = (
        job_of_run(loaded.recipe, world, screen, wishes)
        if of_run
        else job_of_model(target, loaded, world, screen, wishes)
    )
    plan, tokenizer = job.plan, job.tokenizer
    asked = find_questions(job.prepared, tokenizer, wishes.questions) if job.prepared is not None else []
    results: list[Result] = []
    for candidate in candidates(
        job.lineup,
        dtype=DTYPES[plan.precision],
        attention=choose_attention(job.recipe.model.attn_implementation, world, plan.precision),
        device=torch.device(world.device),
        vocab_size=len(tokenizer),
        trust_remote_code=job.recipe.model.trust_remote_code,
    ):
        results.append(measure(candidate, job, asked, screen, wishes.tasks))
        gc.collect()  # the next one takes its place in memory
    if not results:
        raise ModelError(f"there is no model in {job.recipe.output.output_dir} to evaluate. Train it first.")
    table = "\n\n".join(part for part in (markdown(results), task_table(results)) if part)
    screen.line(table)
    if job.out is None:
        screen.line("note: written nowhere; to keep the results: --out FOLDER")
    elif wishes.out is not None or job.out.is_dir():
        job.out.mkdir(parents=True, exist_ok=True)
        write_results(job.out, results, table)
        screen.line(f"written: {' and '.join(str(job.out / name) for name in RESULTS)}")


def measure(
    candidate: Candidate, job: Job, asked: list[Question], screen: Screen, tasks: Tasks | None = None
) -> Result:
    """Load one model, and score it."""
    model = candidate.load().eval()
    by_source: dict[str, TextScore] = {}
    if job.prepared is not None:
        with screen.work(f"evaluating {candidate.name}", "rows") as work:
            by_source = score_text(model, job.recipe, job.plan, job.prepared, job.tokenizer, work.at)
    answers = None
    if asked:
        with screen.work(f"answering, {candidate.name}", "questions") as work:
            answers = score_answers(_answered(model, job.tokenizer, asked, work.at))
    scored = () if tasks is None else tuple(score_tasks(model, job.tokenizer, tasks))
    return Result(candidate.name, by_source, answers, scored)


def _require_sense(wishes: Wishes) -> None:
    if wishes.data and wishes.recipe is not None:
        raise RecipeError("--data and --recipe both say which rows to take. Remove one of the two.")
    if wishes.data and wishes.type is None:
        raise RecipeError(f"--data {wishes.data[0]} needs --type beside it: how its rows read, such as --type alpaca.")
    if wishes.type is not None and not wishes.data:
        raise RecipeError(f"--type {wishes.type} says how the rows of --data read. Give --data FILE, or remove it.")


def read_recipe(target: str, overrides: list[str], wishes: Wishes) -> tuple[Loaded, bool]:
    """What says how rows are made and models loaded; and whether it is that of the run `target`.

    For a model it is the recipe that is named, or one made of --data. Raises RecipeError."""
    explicit = wishes.data or wishes.recipe is not None
    folder = Path(target).expanduser()
    if not explicit and (folder.suffix in (".yml", ".yaml") or folder.is_file()):
        return load(target, overrides), True
    if not explicit and folder.is_dir():
        found = [place / "recipe.yml" for place in (folder, folder.parent) if (place / "recipe.yml").exists()]
        if found:
            return load(found[0], overrides), True
    if wishes.recipe is not None:
        return load(wishes.recipe, overrides), False
    if not wishes.data and wishes.tasks is None:
        raise RecipeError(
            f"'{target}' is a model without the recipe of a run beside it, so nothing says what to measure it by. "
            "Add one of:\n"
            "  --data FILE --type alpaca   rows of a file\n"
            "  --recipe RECIPE             the held-out rows of a recipe\n"
            "  --tasks hellaswag,arc_easy  benchmark tasks of lm-eval"
        )
    sources = [{"path": path, "type": wishes.type} for path in wishes.data]
    values: dict[str, Any] = {"base_model": target, "learning_rate": 1e-5, "test_datasets": sources}
    # a recipe has training rows; nothing reads these
    values["datasets"] = sources or [{"path": "none", "type": "completion"}]
    return load_values(values, "evaluate", overrides), False


def job_of_run(recipe: Recipe, world: World, screen: Screen, wishes: Wishes) -> Job:
    plan = Plan.from_recipe(recipe, world)
    lineup = lineup_of_run(recipe, readable_base(recipe, world), DTYPES[plan.precision])
    vocabulary, prepared = prepare_inputs(
        recipe.model, recipe.tokenizer, recipe.data, recipe.packing, world=world, seed=plan.seed, screen=screen
    )
    if not len(prepared.held_out_rows) and wishes.tasks is None:
        raise DataError(
            "the recipe holds no rows out. Write val_set_size (such as 0.05) or test_datasets, as the training run had."
        )
    rows = prepared if len(prepared.held_out_rows) else None
    out = wishes.out or Path(recipe.output.output_dir)
    return Job(recipe, plan, lineup, vocabulary.tokenizer, rows, out)


def job_of_model(target: str, loaded: Loaded, world: World, screen: Screen, wishes: Wishes) -> Job:
    """The rows become tokens as the model's own tokenizer makes them."""
    recipe, lineup = loaded.recipe, lineup_of_model(target)
    plan = Plan.from_recipe(recipe, world)
    tokenizer = load_tokenizer(TokenizerSection(), lineup.tokenizer, recipe.model.trust_remote_code).tokenizer
    tokenizer.chat_template = choose_template(recipe.data, tokenizer.chat_template)
    prepared = None
    if wishes.data or wishes.recipe is not None:
        section = held_out_only(recipe.data) if recipe.data.test_datasets else recipe.data
        with screen.work("tokenizing", "rows") as work:
            prepared = prepare_once(section, recipe.packing, tokenizer, plan.seed, world, work.at)
        if not len(prepared.held_out_rows):
            raise DataError(f"{wishes.recipe} holds no rows out. Write val_set_size or test_datasets, or give --data.")
    folder = Path(target).expanduser()
    return Job(recipe, plan, lineup, tokenizer, prepared, wishes.out or (folder if folder.is_dir() else None))


@torch.no_grad()
def score_text(
    model: "PreTrainedModel",
    recipe: Recipe,
    plan: Plan,
    prepared: PreparedData,
    tokenizer: "PreTrainedTokenizerBase",
    report: Callable[[int, int], None],
) -> dict[str, TextScore]:
    """The loss of the held-out rows of each source, computed as the training run's evaluation computes it."""
    rows = prepared.held_out_rows
    loss = TokenLoss(model)
    loss.composed = bool(probe(loss.bare, packs=prepared.held_out_packs is not None))
    layout = layout_of(
        recipe.packing,
        recipe.data.sequence_len,
        packed=prepared.held_out_packs is not None,
        flat=wants_flat_packs(loss.bare),
    )
    device, done = next(model.parameters()).device, 0
    scores = {}
    for part in prepared.held_out_ranges or (SourceRange("held out", 0, len(rows)),):
        loss_sum, num_tokens = 0.0, 0
        for batch in evaluation_batches(rows, plan, layout, numbers=range(part.start, part.stop)):
            loss_sum += float(loss_of(loss, batch.to(device)))
            num_tokens += batch.num_trained
            done += len(batch.input_ids)
            report(done, len(rows))
        documents = (document for i in range(part.start, part.stop) for document in rows.documents(i))
        num_bytes = sum(len(_text(tokenizer, labels[labels != IGNORE_INDEX]).encode()) for _, labels in documents)
        scores[part.name] = TextScore(loss_sum, num_tokens, num_bytes)
    return scores


def find_questions(prepared: PreparedData, tokenizer: "PreTrainedTokenizerBase", most: int) -> list[Question]:
    """The first `most` held-out rows that ask for one short answer."""
    found: list[Question] = []
    for i in range(len(prepared.held_out)):
        if len(found) == most:
            break
        ids, labels = prepared.held_out.document(i)
        (trained,) = np.nonzero(labels != IGNORE_INDEX)
        # the last token of an answer ends the turn; behind it a template may have a line break
        if 0 < len(trained) <= MAX_ANSWER_TOKENS and trained[0] > 0 and np.ptp(trained) + 1 == len(trained):
            found.append(Question(ids[: trained[0]], _text(tokenizer, labels[trained])))
    return [one for one in found if one.answer.strip()]


@torch.no_grad()
def _answered(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: list[Question],
    report: Callable[[int, int], None],
) -> Iterator[tuple[str, str]]:
    """(greedy answer, what is wanted)"""
    stops, device = stop_ids(tokenizer), next(model.parameters()).device
    for done, one in enumerate(questions, 1):
        prompt = torch.from_numpy(one.prompt.astype(np.int64))[None].to(device)
        said = model.generate(  # type: ignore[operator]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=stops or None,
            pad_token_id=stops[0] if stops else 0,
        )
        report(done, len(questions))
        yield _text(tokenizer, said[0, prompt.shape[1] :].cpu().numpy()), one.answer


def _text(tokenizer: "PreTrainedTokenizerBase", ids: Any) -> str:
    """Special tokens left out: they are no text, and every tokenizer has others."""
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))


def markdown(results: list[Result]) -> str:
    """A row for each model, then for each source that it was measured on; nothing, if only tasks were asked for."""
    if not any(result.by_source for result in results):
        return ""
    asked = any(result.answers is not None for result in results)
    heading = ["model", "source", "tokens", "loss", "perplexity", "bits per byte"]
    heading += ["exact match", "F1"] if asked else []
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    for result in results:
        sources = result.by_source if len(result.by_source) > 1 else {}
        for name, one in {"all": total(result.by_source.values()), **sources}.items():
            cells = [result.name, name, f"{one.num_tokens:,}", f"{one.loss:.4f}", f"{one.perplexity:.3f}"]
            cells.append("" if math.isnan(one.bits_per_byte) else f"{one.bits_per_byte:.4f}")
            if asked:
                of_all = result.answers if name == "all" else None
                cells += [f"{of_all.exact_match:.1%}", f"{of_all.f1:.1%}"] if of_all is not None else ["", ""]
            lines.append("| " + " | ".join(cells) + " |")
    if asked:
        count = next(result.answers.num_rows for result in results if result.answers is not None)
        lines += ["", f"Exact match and F1 as SQuAD counts them, over {count:,} held-out questions, greedy answers."]
    return "\n".join(lines)


def task_table(results: list[Result]) -> str:
    """A row for each figure of each task, a column for each model; nothing, if no tasks were asked for."""
    if not results[0].tasks:
        return ""
    heading = ["task", "rows", "figure", *(result.name for result in results)]
    lines = ["| " + " | ".join(heading) + " |", "|" + "---|" * len(heading)]
    for i, one in enumerate(results[0].tasks):
        found = [result.tasks[i] for result in results]
        values = [f"{score.value:.4f}" + ("" if score.error is None else f" ± {score.error:.4f}") for score in found]
        lines.append("| " + " | ".join([one.task, f"{one.num_rows:,}", one.metric, *values]) + " |")
    return "\n".join(lines)


def write_results(folder: Path, results: list[Result], table: str) -> None:
    """evaluation.json and evaluation.md."""
    as_json, as_page = (folder / name for name in RESULTS)
    as_json.write_text(json.dumps([result.as_dict() for result in results], indent=1) + "\n")
    as_page.write_text(table + "\n")
