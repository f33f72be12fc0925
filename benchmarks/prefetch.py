"""How long a training loop waits for its batches, with and without making them ahead.

    python benchmarks/prefetch.py TOKENIZER ALPACA_JSON CHATS_JSON [--step 0.1] [--steps 150] [--batch 8]

CHATS_JSON has rows of `conversations`. Each line of the table is a process of its own. A step is a sleep of so many
seconds, which is what a step on a GPU is to the CPU. "data" is the time per step from asking for the batches until they
are there; "worst" is the longest of them, the first one left out (it waits for the start of a stream). "feeds" is how
many tokens a second of CPU time makes batches of: the most that a GPU can be given by one core.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SEQUENCE_LEN = 2048
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
)
CASES = {
    "alpaca, packed": {"packed": True},
    "chats, padded": {"chats": True},
    "chats, packed": {"chats": True, "packed": True},
    "alpaca, packed, streamed": {"packed": True, "streaming": True},
    "chats, padded, streamed": {"chats": True, "streaming": True},
    "chats, packed, streamed": {"chats": True, "packed": True, "streaming": True},
    "texts, streamed": {"texts": True, "streaming": True},
}


def loader_of(case: dict[str, bool], given: argparse.Namespace, folder: Path) -> Any:
    """Return (loader, number of steps)."""
    from transformers import AutoTokenizer

    from finetuner.data.batches import BatchLayout
    from finetuner.data.cache import prepare_once
    from finetuner.data.train_loader import build_train_loader
    from finetuner.plan.run import Plan
    from finetuner.recipe import load_recipe
    from finetuner.world import World

    entry: dict[str, Any] = {"path": given.chats if case.get("chats") else given.alpaca}
    if case.get("chats"):
        entry |= {
            "type": "chat_template", "field_messages": "conversations",
            "message_property_mappings": {"role": "from", "content": "value"},
            "roles": {"user": ["human"], "assistant": ["gpt"]},
        }  # fmt: skip
    else:
        entry |= {"type": "completion", "field": "output"} if case.get("texts") else {"type": "alpaca"}
    streaming = case.get("streaming", False)
    recipe_file = folder / "recipe.yml"
    recipe_file.write_text(
        json.dumps(
            {
                "base_model": given.tokenizer, "datasets": [entry], "sequence_len": SEQUENCE_LEN,
                "streaming": streaming, "max_steps": given.steps, "micro_batch_size": given.batch,
                "sample_packing": case.get("packed", False), "learning_rate": 1e-3, "on_bad_row": "skip",
                "max_dropped_fraction": 1.0, "dataset_prepared_path": str(folder), "output_dir": str(folder / "out"),
            }
        )
    )  # fmt: skip
    recipe = load_recipe(recipe_file)
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    tokenizer.chat_template = CHATML
    plan = Plan.from_recipe(recipe, World())
    rows: Any = []
    if not streaming:
        rows = prepare_once(recipe.data, recipe.packing, tokenizer, plan.seed, World()).train_rows
    schedule = plan.schedule(recipe, len(rows))
    layout = BatchLayout(packed=case.get("packed", False))
    return build_train_loader(recipe.data, tokenizer, rows, plan, schedule, layout, None)


def measure(way: str, case: dict[str, bool], given: argparse.Namespace) -> dict[str, float]:
    from finetuner.data.train_loader import prefetching

    waits, tokens, cpu = [], 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        loader = loader_of(case, given, Path(folder))
        with prefetching(loader, given.steps, pin=False) as ahead:
            ask = ahead if way == "ahead" else loader.batches
            cpu = time.process_time()
            for step in range(given.steps):
                asked = time.perf_counter()
                tokens += sum(batch.num_tokens for batch in ask(step))
                waits.append(time.perf_counter() - asked)
                if way != "alone":
                    time.sleep(given.step)
            cpu = time.process_time() - cpu
    return {"data": sum(waits[1:]) / (len(waits) - 1), "worst": max(waits[1:]), "rate": tokens / cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("alpaca")
    parser.add_argument("chats")
    parser.add_argument("--step", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        way, case = given.worker.split(":")
        print(json.dumps(measure(way, CASES[case], given)))
        return
    print(f"a step of {given.step:g} s; milliseconds per step, mean and worst")
    heads = (f"{'rows':26}", "feeds, tokens per CPU second", "data, made when asked for", "data, made ahead")
    print(f"| {' | '.join(heads)} |")
    print("|---|---|---|---|")
    for case in CASES:
        found = {}
        for way in ("alone", "asked", "ahead"):
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", f"{way}:{case}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found[way] = json.loads(done.stdout.splitlines()[-1])
        asked, ahead = (f"{1e3 * found[w]['data']:.1f}, {1e3 * found[w]['worst']:.0f}" for w in ("asked", "ahead"))
        print(f"| {case:26} | {found['alone']['rate']:28,.0f} | {asked:>25} | {ahead:>16} |", flush=True)


if __name__ == "__main__":
    main()
