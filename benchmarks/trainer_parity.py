"""Per-step losses of finetuner beside those of transformers' Trainer, on the same model, rows, order and schedule.

    python benchmarks/trainer_parity.py RECIPE [--steps 10] [key=value ...]

Trainer gets our token ids and labels, in our order of rows, and our learning-rate schedule by its own name; it pads,
accumulates, clips and steps by itself. Prints a table and the largest difference.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from finetuner.data.prepare import prepare_documents
from finetuner.data.shuffling import row_order
from finetuner.data.token_store import IGNORE_INDEX, TokenStore
from finetuner.data.tokenizer import load_tokenizer
from finetuner.models.adapter import add_lora
from finetuner.recipe import Recipe, load, load_recipe
from finetuner.run import train as run
from finetuner.training.metrics import read_metrics


def our_losses(recipe_path: str, overrides: list[str], output_dir: str) -> list[dict]:
    """Logged steps of a run of ours."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    run.train(load_recipe(recipe_path, [*overrides, f"output_dir={output_dir}", "logging_steps=1"]), recipe_path)
    return [row for row in read_metrics(Path(output_dir) / "metrics.jsonl") if "loss" in row]


class InOrder(Trainer):
    """Trainer that takes the rows as they come."""

    def _get_train_sampler(self, *args: object, **kwargs: object) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_losses(recipe: Recipe, steps: int, output_dir: str) -> list[dict]:
    """Trainer's log of the same steps."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    vocabulary = load_tokenizer(recipe.tokenizer, recipe.tokenizer.tokenizer or recipe.model.base_model, False)
    store = prepare_documents(recipe.data, vocabulary.tokenizer, recipe.output.seed).train
    model = AutoModelForCausalLM.from_pretrained(
        recipe.model.base_model, dtype=torch.float32, attn_implementation="sdpa"
    )
    if recipe.adapter.adapter == "lora":
        model = add_lora(model, recipe.adapter, base_model=recipe.model.base_model, seed=recipe.output.seed)
    batch, schedule, optimizer = recipe.batch, recipe.schedule, recipe.optimizer
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=batch.micro_batch_size,
        gradient_accumulation_steps=batch.gradient_accumulation_steps,
        max_steps=steps,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type=schedule.lr_scheduler.replace("constant", "constant_with_warmup"),
        warmup_steps=schedule.warmup_steps or 0,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=recipe.output.seed,
    )
    order = row_order(recipe.output.seed, 0, len(store))
    trainer = InOrder(
        model=model, args=arguments, train_dataset=[_example(store, int(i)) for i in order], data_collator=_pad
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def _example(store: TokenStore, row: int) -> dict[str, torch.Tensor]:
    ids, labels = store.document(row)
    return {"input_ids": torch.tensor(ids, dtype=torch.long), "labels": torch.tensor(labels, dtype=torch.long)}


def _pad(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = pad_sequence([e["input_ids"] for e in examples], batch_first=True)
    labels = pad_sequence([e["labels"] for e in examples], batch_first=True, padding_value=IGNORE_INDEX)
    mask = pad_sequence([torch.ones_like(e["input_ids"]) for e in examples], batch_first=True)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def compare(recipe_path: str, overrides: list[str], steps: int) -> tuple[list[dict], list[dict]]:
    """(our rows, Trainer's rows) of `steps` steps in fp32, each in a folder that vanishes."""
    overrides = [*overrides, f"max_steps={steps}", "bf16=false", "resume_from_checkpoint=false", "eval_on_start=false"]
    with tempfile.TemporaryDirectory() as folder:
        ours = our_losses(recipe_path, overrides, f"{folder}/ours")
        theirs = trainer_losses(load(recipe_path, overrides).recipe, steps, f"{folder}/theirs")
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_intermixed_args()
    ours, theirs = compare(arguments.recipe, arguments.overrides, arguments.steps)
    print(f"{'step':>4} {'finetuner':>12} {'Trainer':>12} {'difference':>11} {'norm':>9} {'norm':>9}")
    for mine, other in zip(ours, theirs, strict=True):
        difference = mine["loss"] - other["loss"]
        norms = f"{mine['grad_norm']:9.5f} {float(other['grad_norm']):9.5f}"
        print(f"{mine['step']:>4} {mine['loss']:12.7f} {other['loss']:12.7f} {difference:11.1e} {norms}")
    worst = max(abs(mine["loss"] - other["loss"]) for mine, other in zip(ours, theirs, strict=True))
    print(f"largest difference of a loss over {len(ours)} steps: {worst:.1e}")


if __name__ == "__main__":
    main()
