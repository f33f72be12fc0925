"""Peak memory of preparing made-up files of growing size, each in a process of its own; and the time of a second start.

    python benchmarks/prepare_memory.py MODEL [megabytes ...]

A row is an instruction with its number and an answer of 40 to 300 words out of thirteen, which is about the length of
Alpaca's rows and above. Resident memory counts the pages of the written files that the system keeps mapped and can take
back at any time; anonymous memory is what the process itself holds.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

_PREPARE = """
import resource, sys, threading, time
from transformers import AutoTokenizer
from finetuner.data.cache import prepare_once
from finetuner.recipe.sections import DataSection, PackingSection
from finetuner.world import World
peak = 0
def watch():
    global peak
    while True:
        with open("/proc/self/status") as status:
            kib = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
        peak = max(peak, kib)
        time.sleep(0.05)
threading.Thread(target=watch, daemon=True).start()
entry = {"path": sys.argv[1], "type": "alpaca"}
section = DataSection.model_validate({"datasets": [entry], "dataset_prepared_path": sys.argv[2]})
tokenizer = AutoTokenizer.from_pretrained(sys.argv[3])
began, cpu = time.perf_counter(), time.process_time()
prepared = prepare_once(section, PackingSection(sample_packing=True), tokenizer, 0, World())
seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"  {sys.argv[4]} start: {seconds:,.2f} s ({cpu:,.2f} s of CPU), peak {rss:,.0f} MiB resident, "
      f"{peak / 1024:,.0f} anonymous, {prepared.num_rows:,} rows, {prepared.train.num_tokens:,} tokens", flush=True)
"""
_WORDS = ("model", "reads", "rows", "of", "text", "and", "learns", "which", "token", "comes", "next", "because", "each")


def main() -> None:
    model, *sizes = sys.argv[1:]
    chosen = random.Random(0)
    answers = [" ".join(chosen.choices(_WORDS, k=chosen.randint(40, 300))) for _ in range(5000)]
    with tempfile.TemporaryDirectory() as folder:
        for size in map(int, sizes or ("20", "200", "2000")):
            path = Path(folder) / f"{size}.jsonl"
            with path.open("w") as file:
                i = 0
                while file.tell() < size * 1_000_000:
                    for answer in answers:
                        row = {"instruction": f"Say {i}.", "input": "", "output": f"{i} {answer}"}
                        file.write(json.dumps(row) + "\n")
                        i += 1
            print(f"{path.stat().st_size / 1e6:,.0f} MB", flush=True)
            for start in ("first", "second"):
                command = [sys.executable, "-c", _PREPARE, str(path), f"{folder}/prepared", model, start]
                subprocess.run(command, check=True)
            path.unlink()


if __name__ == "__main__":
    main()
