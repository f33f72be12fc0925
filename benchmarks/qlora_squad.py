"""QLoRA on questions about a text: what is left of it when the adapter is merged onto the wrong base.

    python benchmarks/qlora_squad.py ROWS.jsonl [--model models/SmolLM2-135M-Instruct] [--steps 60] [--questions 100]

ROWS.jsonl has SQuAD's rows: context, question, output. Trains an adapter on the base in 4 bits, merges it onto the
original weights and onto the ones that training saw, and states exact match, F1 and loss on questions about texts that
were not trained on: of the base as it is and in 4 bits, with the adapter, and of both merged models. Results go to
OUT/qlora_squad.json and OUT/qlora_squad.md; a run that is there already is gone on with.
"""

import argparse
import gc
import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from finetuner.commands.merge import merge
from finetuner.console import Screen, quiet_libraries
from finetuner.evaluation.compared_models import LoadableModel, loadable_models
from finetuner.evaluation.evaluate import inputs_of_run, score_model
from finetuner.evaluation.options import EvaluationOptions
from finetuner.evaluation.question_answering import find_questions
from finetuner.evaluation.tables import ModelScores, markdown
from finetuner.models.load import load_model
from finetuner.recipe import load, load_recipe
from finetuner.run import train as run
from finetuner.world import World

ASK = "{context}\n\nQuestion: {question}\nAnswer with a few words from the text."


def split(rows: list[dict], num_held_out: int, seed: int) -> tuple[list[dict], list[dict]]:
    """(to train on, held out): a context is in one of them alone."""
    contexts = sorted({row["context"] for row in rows})
    random.Random(seed).shuffle(contexts)
    counts: dict[str, int] = dict.fromkeys(contexts, 0)
    for row in rows:
        counts[row["context"]] += 1
    held: set[str] = set()
    for context in contexts:
        if sum(counts[one] for one in held) >= num_held_out:
            break
        held.add(context)
    return [r for r in rows if r["context"] not in held], [r for r in rows if r["context"] in held][:num_held_out]


def write(path: Path, rows: list[dict]) -> str:
    turns = [
        [{"role": "user", "content": ASK.format(**row)}, {"role": "assistant", "content": row["output"]}]
        for row in rows
    ]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns), encoding="utf-8")
    return str(path)


def write_recipe(out: Path, model: str, train: list[dict], held_out: list[dict], steps: int) -> str:
    keys = {
        "base_model": model,
        "datasets": [{"path": write(out / "train.jsonl", train), "type": "chat_template"}],
        "test_datasets": [{"path": write(out / "held_out.jsonl", held_out), "type": "chat_template"}],
        "dataset_prepared_path": str(out / "prepared"),
        "sequence_len": 512,
        "adapter": "qlora",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_linear": True,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": steps,
        "learning_rate": 5e-4,
        "lr_scheduler": "cosine",
        "warmup_steps": min(5, steps - 1),
        "output_dir": str(out / "run"),
        "resume_from_checkpoint": True,
        "max_dropped_fraction": 0.5,
    }
    path = out / "recipe.yml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
    return str(path)


def measured(recipe_path: str, merged: dict[str, Path], questions: int) -> list[ModelScores]:
    recipe, world, screen = load(recipe_path).recipe, World.detect(), Screen(enabled=True)
    quiet_libraries(screen)
    inputs = inputs_of_run(recipe, EvaluationOptions(), world, screen)
    assert inputs.prepared is not None
    asked = find_questions(inputs.prepared, inputs.tokenizer, questions)
    dtype, attention, device = inputs.settings.dtype, inputs.settings.attention, torch.device(world.device)
    of_run = loadable_models(
        replace(inputs.models, merged=None),
        dtype=dtype,
        attention=attention,
        device=device,
        vocab_size=len(inputs.tokenizer),
        trust_remote_code=False,
    )

    def full(folder: str) -> torch.nn.Module:
        return load_model(folder, dtype=dtype, attention=attention).to(device)

    base, adapted = (one.load for one in of_run)
    chosen = [
        LoadableModel("before", partial(full, recipe.model.base_model)),
        LoadableModel("before, in 4 bits", base),
        LoadableModel("adapter, on 4 bits", adapted),
        *(LoadableModel(name, partial(full, str(folder))) for name, folder in merged.items()),
    ]
    results = []
    for model in chosen:
        results.append(score_model(model, inputs, asked, screen))
        screen.line(markdown(results[-1:]))
        gc.collect()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("outputs/qlora_squad"))
    parser.add_argument("--seed", type=int, default=0)
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in words.rows.read_text(encoding="utf-8").splitlines() if line.strip()]
    train, held_out = split(rows, words.questions, words.seed)
    recipe = write_recipe(words.out, words.model, train, held_out, words.steps)
    run.train(load_recipe(recipe), recipe)
    merged = {"merged, original base": "original", "merged, dequantized base": "dequantized"}
    folders = {name: words.out / f"merged-{base}" for name, base in merged.items()}
    for name, base in merged.items():
        merge(recipe, [f"output={folders[name]}", f"base={base}"])
    results = measured(recipe, folders, words.questions)
    table = markdown(results)
    (words.out / "qlora_squad.md").write_text(table + "\n")
    (words.out / "qlora_squad.json").write_text(json.dumps([one.as_dict() for one in results], indent=1) + "\n")
    print(table)


if __name__ == "__main__":
    main()
