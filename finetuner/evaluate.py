"""`finetuner evaluate`: the held-out rows of a recipe, under base, adapter and merged model side by side."""

import gc
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finetuner.assemble import DTYPES, probe
from finetuner.data.batches import evaluation_batches
from finetuner.data.prepare import Part, Prepared
from finetuner.data.tokens import IGNORE, Ids
from finetuner.errors import DataError, ModelError, RecipeError
from finetuner.export.generation import stop_ids
from finetuner.models.attention import choose_attention
from finetuner.models.build import grow_embeddings, load_model
from finetuner.models.loss import TokenLoss
from finetuner.models.quantized import Format, choose_format
from finetuner.plan import Plan
from finetuner.recipe import Recipe, load
from finetuner.recipe.shapes import FROM_SCRATCH
from finetuner.run import layout_of, prepare_rows
from finetuner.scores import AnswerScore, TextScore, score_answers, total
from finetuner.training.loop import loss_of
from finetuner.training.progress import Screen, quiet_libraries
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_ANSWER_TOKENS = 32  # a longer trained text is no answer that could be the same word by word
RESULTS = ("evaluation.json", "evaluation.md")


@dataclass(frozen=True)
class Question:
    """A row with one short trained span: what stands before it, and the text that is wanted."""

    prompt: Ids
    answer: str


@dataclass(frozen=True)
class Candidate:
    """One of the models that are compared."""

    name: str
    load: Callable[[], "PreTrainedModel"]


@dataclass(frozen=True)
class Result:
    name: str
    by_source: dict[str, TextScore]
    answers: AnswerScore | None

    def as_dict(self) -> dict[str, Any]:
        scored = {**self.by_source, "": total(self.by_source.values())}
        figures = {
            name: {
                "loss": one.loss,
                "perplexity": one.perplexity,
                "bits_per_byte": one.bits_per_byte,
                "num_tokens": one.num_tokens,
                "num_bytes": one.num_bytes,
            }
            for name, one in scored.items()
        }
        found: dict[str, Any] = {"model": self.name} | figures.pop("") | {"sources": figures}
        if self.answers is not None:
            found |= {
                "exact_match": self.answers.exact_match,
                "f1": self.answers.f1,
                "num_questions": self.answers.num_rows,
            }
        return found


def evaluate(target: str, overrides: list[str], *, questions: int) -> None:
    """Score what `target` names: a recipe, or the folder of a run or of its merged model. Raises FinetunerError."""
    recipe_name = find_recipe(target)
    loaded = load(recipe_name, overrides)
    recipe, screen, world = loaded.recipe, Screen(speaks=True), World.detect()
    for note in loaded.notes:
        screen.line(f"note: {note}")
    quiet_libraries(screen)
    plan = Plan.from_recipe(recipe, world)
    output_dir = Path(recipe.output.output_dir)
    vocabulary, prepared = prepare_rows(recipe, world, plan.seed, screen)
    if not len(prepared.held_out_rows):
        raise DataError(
            "the recipe holds no rows out. Write val_set_size (such as 0.05) or test_datasets, as the training run had."
        )
    tokenizer = vocabulary.tokenizer
    asked = find_questions(prepared, tokenizer, questions)
    results: list[Result] = []
    for candidate in candidates(recipe, plan, world, output_dir, len(tokenizer)):
        model = candidate.load().eval()
        with screen.work(f"evaluating {candidate.name}", "rows") as work:
            by_source = score_text(model, recipe, plan, prepared, tokenizer, work.at)
        answers = score_answers(_answered(model, tokenizer, asked)) if asked else None
        results.append(Result(candidate.name, by_source, answers))
        del model
        gc.collect()  # the next one takes its place in memory
    if not results:
        raise ModelError(f"there is no model in {output_dir} to evaluate. Train it first.")
    table = markdown(results)
    screen.line(table)
    if output_dir.is_dir():
        write_results(output_dir, results, table)
        screen.line(f"written: {' and '.join(str(output_dir / name) for name in RESULTS)}")


def find_recipe(target: str) -> str:
    """The recipe that `target` is, or that a run left in the folder `target` or above its merged model."""
    folder = Path(target)
    if not folder.is_dir():
        return target
    found = [place / "recipe.yml" for place in (folder, folder.parent) if (place / "recipe.yml").exists()]
    if not found:
        raise RecipeError(f"'{target}' is not the folder of a run: no recipe.yml is there. Name a recipe.")
    return str(found[0])


def candidates(recipe: Recipe, plan: Plan, world: World, output_dir: Path, vocab_size: int) -> Iterator[Candidate]:
    """The base, what the run in output_dir trained, and the merged model, as far as they are there."""
    attention = choose_attention(recipe.model.attn_implementation, world, plan.precision)
    dtype, trust = DTYPES[plan.precision], recipe.model.trust_remote_code
    device = torch.device(world.device)

    def read(name: str, form: Format | None = None) -> "PreTrainedModel":
        model: Any = load_model(
            name, dtype=dtype, attention=attention, trust_remote_code=trust, form=form, device=device
        )
        return model if form is not None else model.to(device)  # quantised, it is there already and cannot be moved

    def base() -> "PreTrainedModel":
        model = read(recipe.model.base_model, choose_format(recipe.adapter.adapter, recipe.quantization, dtype))
        grow_embeddings(model, vocab_size)
        return model

    def adapted() -> "PreTrainedModel":
        from peft import PeftModel

        return PeftModel.from_pretrained(base(), str(output_dir))  # type: ignore[return-value]

    if recipe.model.base_model != FROM_SCRATCH:
        yield Candidate("base", base)
    if recipe.adapter.adapter is None and (output_dir / "config.json").exists():
        yield Candidate("trained", partial(read, str(output_dir)))
    if recipe.adapter.adapter is not None and (output_dir / "adapter_config.json").exists():
        yield Candidate("adapter", adapted)
        if (output_dir / "merged" / "config.json").exists():
            yield Candidate("merged", partial(read, str(output_dir / "merged")))


@torch.no_grad()
def score_text(
    model: "PreTrainedModel",
    recipe: Recipe,
    plan: Plan,
    prepared: Prepared,
    tokenizer: "PreTrainedTokenizerBase",
    report: Callable[[int, int], None],
) -> dict[str, TextScore]:
    """The loss of the held-out rows of each source, computed as the training run's evaluation computes it."""
    rows = prepared.held_out_rows
    loss = TokenLoss(model)
    loss.composed = bool(probe(loss.bare, packs=prepared.held_out_packs is not None))
    layout = layout_of(recipe, loss.bare, packed=prepared.held_out_packs is not None)
    device, done = next(model.parameters()).device, 0
    scores = {}
    for part in prepared.held_out_parts or (Part("held out", 0, len(rows)),):
        loss_sum, num_tokens = 0.0, 0
        for batch in evaluation_batches(rows, plan, layout, numbers=range(part.start, part.stop)):
            loss_sum += float(loss_of(loss, batch.to(device)))
            num_tokens += batch.num_trained
            done += len(batch.input_ids)
            report(done, len(rows))
        documents = (document for i in range(part.start, part.stop) for document in rows.documents(i))
        num_bytes = sum(len(_text(tokenizer, labels[labels != IGNORE]).encode()) for _, labels in documents)
        scores[part.name] = TextScore(loss_sum, num_tokens, num_bytes)
    return scores


def find_questions(prepared: Prepared, tokenizer: "PreTrainedTokenizerBase", most: int) -> list[Question]:
    """The first `most` held-out rows that ask for one short answer."""
    found: list[Question] = []
    for i in range(len(prepared.held_out)):
        if len(found) == most:
            break
        ids, labels = prepared.held_out.document(i)
        (trained,) = np.nonzero(labels != IGNORE)
        # the last token of an answer ends the turn; behind it a template may have a line break
        if 0 < len(trained) <= MAX_ANSWER_TOKENS and trained[0] > 0 and np.ptp(trained) + 1 == len(trained):
            found.append(Question(ids[: trained[0]], _text(tokenizer, labels[trained])))
    return [one for one in found if one.answer.strip()]


@torch.no_grad()
def _answered(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", questions: list[Question]
) -> Iterator[tuple[str, str]]:
    """(greedy answer, what is wanted)"""
    stops, device = stop_ids(tokenizer), next(model.parameters()).device
    for one in questions:
        prompt = torch.from_numpy(one.prompt.astype(np.int64))[None].to(device)
        said = model.generate(  # type: ignore[operator]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
            eos_token_id=stops or None,
            pad_token_id=stops[0] if stops else 0,
        )
        yield _text(tokenizer, said[0, prompt.shape[1] :].cpu().numpy()), one.answer


def _text(tokenizer: "PreTrainedTokenizerBase", ids: Any) -> str:
    """Special tokens left out: they are no text, and every tokenizer has others."""
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))


def markdown(results: list[Result]) -> str:
    """A row for each model, then for each source that it was measured on."""
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


def write_results(folder: Path, results: list[Result], table: str) -> None:
    """evaluation.json and evaluation.md."""
    as_json, as_page = (folder / name for name in RESULTS)
    as_json.write_text(json.dumps([result.as_dict() for result in results], indent=1) + "\n")
    as_page.write_text(table + "\n")
