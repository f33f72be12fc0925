"""Peak memory of preparing made-up files of growing size, each in a process of its own; and the time of a second start.

python benchmarks/prepare_memory.py MODEL [megabytes ...]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

_PREPARE = """
import resource, sys, time
from transformers import AutoTokenizer
from finetuner.data.cache import prepare_once
from finetuner.recipe.sections import DataSection, PackingSection
from finetuner.world import World
entry = {"path": sys.argv[1], "type": "alpaca"}
section = DataSection.model_validate({"datasets": [entry], "dataset_prepared_path": sys.argv[2]})
tokenizer = AutoTokenizer.from_pretrained(sys.argv[3])
for start in ("first", "second"):
    began = time.perf_counter()
    prepared = prepare_once(section, PackingSection(sample_packing=True), tokenizer, 0, World())
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"  {start} start: {seconds:,.1f} s, peak {peak:,.0f} MiB, {prepared.num_rows:,} rows", flush=True)
"""


def main() -> None:
    model, *sizes = sys.argv[1:]
    words = " ".join(f"word{i}" for i in range(150))
    with tempfile.TemporaryDirectory() as folder:
        for size in map(int, sizes or ("20", "200", "2000")):
            path = Path(folder) / f"{size}.jsonl"
            with path.open("w") as file:
                i = 0
                while file.tell() < size * 1_000_000:
                    file.write(json.dumps({"instruction": f"Say {i}.", "input": "", "output": f"{i} {words}"}) + "\n")
                    i += 1
            print(f"{size} MB", flush=True)
            subprocess.run([sys.executable, "-c", _PREPARE, str(path), f"{folder}/prepared", model], check=True)
            path.unlink()


if __name__ == "__main__":
    main()
