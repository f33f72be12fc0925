"""A GPT in nanoGPT's CPU setting by finetuner's loop, beside a plain PyTorch loop of the same model, turn about.

    python benchmarks/scratch_loop.py TEXT [--steps 200] [--rounds 5] [--threads 2] [--profile]

TEXT is a file such as tiny Shakespeare. Both train the model of examples/gpt_shakespeare.yml from the same weights, on
12 rows of 64 letters a step, with fused AdamW, clipping and a cosine; finetuner as its command does, with its progress,
metrics and reading ahead; the plain loop as one would write it in an afternoon, with a loss printed every 100 steps.
Prints milliseconds a step by the clock and of the processor's time, each the median of the rounds, and their ratios.
"""

import argparse
import cProfile
import math
import pstats
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from finetuner.console import Screen, quiet_libraries
from finetuner.models.gpt import GPTForCausalLM
from finetuner.plan.run import Plan
from finetuner.recipe import load
from finetuner.run.inputs import prepare_inputs
from finetuner.run.layout import lay_over_ranks
from finetuner.run.model import build_model
from finetuner.run.session import Session
from finetuner.run.start import join_ranks
from finetuner.run.train import fit
from finetuner.world import World

RECIPE = Path(__file__).parent.parent / "examples/gpt_shakespeare.yml"
ROWS, CONTEXT, RATE, WARMUP = 12, 64, 1e-3, 20


class Ours:
    """The command's own parts, its inputs prepared once; a round trains from the first step on."""

    def __init__(self, text: Path, folder: Path, steps: int) -> None:
        nothing = ["eval_steps=null", "save_steps=null", "save_strategy=no", "test_datasets=[]"]
        data = [f"datasets.0.path={text}", f"dataset_prepared_path={folder / 'prepared'}", f"output_dir={folder}"]
        recipe = load(str(RECIPE), [*nothing, *data, f"max_steps={steps}", f"warmup_steps={WARMUP}"]).recipe
        screen, world = Screen(enabled=True), World(num_threads=torch.get_num_threads())
        quiet_libraries(screen)
        self.session = Session(recipe, str(RECIPE), world, Plan.from_recipe(recipe, world), screen)
        self.inputs = prepare_inputs(self.session)
        self.base, self.vocabulary = self.inputs.base, self.inputs.vocabulary
        self.start = join_ranks(self.session, self.inputs)

    def prepare(self) -> Callable[[], None]:
        model = build_model(self.session, self.inputs, self.start)
        ready = lay_over_ranks(self.session, self.inputs, self.start, model)

        def train() -> None:
            fit(self.session, self.inputs, self.start, ready)

        return train


def plain(base: str, tokenizer: PreTrainedTokenizerBase, text: Path, steps: int) -> Callable[[], None]:
    model: GPTForCausalLM = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
    ids = torch.tensor(tokenizer(text.read_text()).input_ids)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99), fused=True)

    def rate(step: int) -> float:
        if step < WARMUP:
            return step / WARMUP
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))

    def train() -> None:
        model.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * rate(step)
            starts = torch.randint(len(ids) - CONTEXT, (ROWS,)).tolist()
            inputs = torch.stack([ids[i : i + CONTEXT] for i in starts])
            targets = torch.stack([ids[i + 1 : i + 1 + CONTEXT] for i in starts])
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % 100 == 0:
                print(f"plain: step {step + 1}, loss {loss.item():.4f}")

    return train


def timed(train: Callable[[], None], steps: int) -> tuple[float, float]:
    """Milliseconds a step: by the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    train()
    return (time.perf_counter() - clock) / steps * 1e3, (time.process_time() - processor) / steps * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="Show where one round of ours spends its time.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = arguments.steps
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(arguments.text.resolve(), Path(folder), steps)
        if arguments.profile:
            profile = cProfile.Profile()
            profile.runcall(ours.prepare())
            pstats.Stats(profile).sort_stats("tottime").print_stats(45)
            return
        found: dict[str, list[tuple[float, float]]] = {"ours": [], "plain": []}
        for turn in range(arguments.rounds):
            makers = {
                "ours": ours.prepare,
                "plain": lambda: plain(ours.base, ours.vocabulary.tokenizer, arguments.text, steps),
            }
            for name in ("ours", "plain") if turn % 2 else ("plain", "ours"):
                found[name].append(timed(makers[name](), steps))
    for name, rounds in found.items():
        clock, processor = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{name:<6} {clock:8.2f} ms a step by the clock, {processor:8.2f} ms of the processor")
    for column, what in enumerate(("clock", "processor")):
        ratios = [one[column] / other[column] for one, other in zip(found["ours"], found["plain"], strict=True)]
        each = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"ours / plain by the {what}: median {statistics.median(ratios):.3f} ({each})")


if __name__ == "__main__":
    main()
