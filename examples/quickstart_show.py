"""What the quickstart's model learned: losses, answers before and after, and what to do next.

python examples/quickstart_show.py examples/quickstart.yml
"""

import json
import sys
from pathlib import Path

import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuner import Recipe, load_recipe

PROMPTS = (0, 7)  # rows of the held-out file that are answered
BARS = " ▁▂▃▄▅▆▇█"
console = Console(highlight=False)


def main(recipe_path: str) -> None:
    """Read the run's metrics, answer held-out prompts with the base and with the merged model, and print both."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    recipe = load_recipe(recipe_path)
    output = Path(recipe.output.output_dir)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    show_losses(rows)
    show_answers(recipe, output)
    show_next_steps(recipe_path, recipe, output)


def show_losses(rows: list[dict]) -> None:
    evaluations = [row for row in rows if "eval_loss" in row]
    before, after = evaluations[0], evaluations[-1]
    table = Table("held-out rows", "loss", "perplexity", title="\nOn functions it never saw")
    table.add_row("before training", f"{before['eval_loss']:.3f}", f"{before['eval_perplexity']:.1f}")
    table.add_row(f"after {after['step']} steps", f"{after['eval_loss']:.3f}", f"{after['eval_perplexity']:.1f}")
    fall = 1 - after["eval_loss"] / before["eval_loss"]
    table.add_row("fall", f"{fall:.0%}", "")
    console.print(table)
    losses = [row["loss"] for row in rows if "loss" in row]
    low, high = min(losses), max(losses)
    curve = "".join(BARS[round((loss - low) / (high - low or 1) * (len(BARS) - 1))] for loss in losses)
    console.print(f"training loss  {high:.2f} |{curve}| {losses[-1]:.2f}\n", markup=False)


def show_answers(recipe: Recipe, output: Path) -> None:
    held_out = Path(recipe.data.test_datasets[0].path).read_text().splitlines()
    conversations = [json.loads(held_out[i])["messages"] for i in PROMPTS]
    questions = [conversation[:-1] for conversation in conversations]
    before = answers(recipe.model.base_model, questions)
    after = answers(str(output / "merged"), questions)
    for conversation, first, second in zip(conversations, before, after, strict=True):
        console.print(
            conversation[0]["content"].partition("```python\n")[2].removesuffix("```"), style="dim", markup=False
        )
        table = Table.grid(padding=(0, 2))
        table.add_row("before", first)
        table.add_row("after", f"[bold]{second}[/bold]")
        table.add_row("its author", conversation[-1]["content"])
        console.print(table, "")


def answers(folder: str, questions: list[list[dict]], length: int = 32) -> list[str]:
    """Greedy answers, cut after `length` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    texts = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, max_new_tokens=length, do_sample=False)
        answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        texts.append(" ".join(answer.split()).replace("[", r"\["))
    return texts


def show_next_steps(recipe_path: str, recipe: Recipe, output: Path) -> None:
    files = Table("file", "what it is", title="Where everything is", title_justify="left", box=None, padding=(0, 2))
    files.add_row(f"{output}/adapter_model.safetensors", "what was learned (LoRA)")
    files.add_row(f"{output}/merged/", "the whole model")
    files.add_row(f"{output}/metrics.jsonl", "every logged step")
    files.add_row(f"{output}/recipe.yml", "the recipe, all keys")
    files.add_row(recipe.data.datasets[0].path, "what it learned from")
    console.print(files)
    console.print("\n[italic]What to do next[/italic]")
    for command in (
        "source .venv/bin/activate",
        f"cp {recipe_path} my.yml   # then edit my.yml",
        "finetuner check my.yml               # names every mistake at once",
        "accelerate launch -m finetuner.train my.yml",
        "python -m finetuner.merge my.yml",
    ):
        console.print(f"  {command}")


if __name__ == "__main__":
    main(sys.argv[1])
