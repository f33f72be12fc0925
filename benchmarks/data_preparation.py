"""Rows -> tokens, labels and packs: rows per second, CPU time and peak memory, beside TRL's SFTTrainer and Axolotl's
`preprocess` on the same rows.

    python benchmarks/data_preparation.py TOKENIZER ALPACA_JSON [--copies 100] [--chats 20000] [--repeats 2]
                                          [--trl-python PYTHON] [--axolotl-python PYTHON]

Each measurement is a process of its own, the tools take turns, and nothing is cached between them. What is timed is
everything from the file to the packs, less the same for a file of the first two rows, which is what a start costs: with
TRL the building of an SFTTrainer around a two-layer model, with Axolotl the whole command, which leaves the packs to
the training. The same roles are trained: the completion of a prompt, the answers of a chat. TOKENIZER is a model's
folder, for Axolotl wants its config.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SEQUENCE_LEN = 2048
WORDS = ("model", "reads", "rows", "of", "text", "and", "learns", "which", "token", "comes", "next", "because", "each")
# ChatML with the answers marked, which is how TRL knows them; ours finds them in either
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)


def write_rows(folder: Path, alpaca: Path, copies: int, chats: int) -> None:
    rows = json.loads(alpaca.read_text(encoding="utf-8")) * copies
    prompts = [{"prompt": _prompt(row), "completion": row["output"]} for row in rows]
    _write(folder / "single.jsonl", prompts)
    chosen = random.Random(0)

    def said() -> str:
        return " ".join(chosen.choices(WORDS, k=chosen.randint(5, 40)))

    turns = [[{"role": ("user", "assistant")[i % 2], "content": said()} for i in range(20)] for _ in range(chats)]
    _write(folder / "multi.jsonl", [{"messages": messages} for messages in turns])


def _prompt(row: dict[str, str]) -> str:
    given = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
    return f"### Instruction:\n{row['instruction']}{given}\n\n### Response:\n"


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    for place, some in ((path, rows), (path.with_stem(f"{path.stem}-two"), rows[:2])):
        place.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")


Numbers = tuple[float, float, int]  # seconds, seconds of CPU, tokens


def ours(folder: Path, name: str, tokenizer_name: str) -> Numbers:
    from transformers import AutoTokenizer

    from finetuner.data.cache import prepare_once
    from finetuner.recipe.sections import DataSection, PackingSection
    from finetuner.world import World

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    tokenizer.chat_template = MARKED
    entry = {
        "path": str(folder / f"{name}.jsonl"),
        "type": "prompt_completion" if name.startswith("single") else "chat_template",
    }
    section = DataSection.model_validate(
        {"datasets": [entry], "sequence_len": SEQUENCE_LEN, "dataset_prepared_path": str(folder / "prepared")}
    )
    start, cpu = time.perf_counter(), cpu_seconds()
    prepared = prepare_once(section, PackingSection(sample_packing=True), tokenizer, 0, World())
    return time.perf_counter() - start, cpu_seconds() - cpu, prepared.train.num_tokens


def trl(folder: Path, name: str, tokenizer_name: str) -> Numbers:
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_name)
    tokenizer.chat_template = MARKED
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, vocab_size=64)
    )
    chats = name.startswith("multi")
    arguments = SFTConfig(
        output_dir=str(folder / "trl"), max_length=SEQUENCE_LEN, packing=True, packing_strategy="bfd",
        assistant_only_loss=chats, completion_only_loss=None if chats else True,
        report_to=[], use_cpu=True, bf16=False, dataset_num_proc=2,
    )  # fmt: skip
    start, cpu = time.perf_counter(), cpu_seconds()
    rows = datasets.load_dataset("json", data_files=str(folder / f"{name}.jsonl"), split="train")
    kept = ["messages"] if chats else ["prompt", "completion"]
    rows = rows.remove_columns([column for column in rows.column_names if column not in kept])
    packs = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer).train_dataset
    return time.perf_counter() - start, cpu_seconds() - cpu, sum(map(len, packs["input_ids"]))


AXOLOTL = """
base_model: {model}
datasets:
  - path: {path}
    ds_type: json
    type: {type}
chat_template: chatml
sequence_len: {length}
sample_packing: true
dataset_processes: 2
dataset_prepared_path: {prepared}
output_dir: {prepared}/out
micro_batch_size: 1
gradient_accumulation_steps: 1
num_epochs: 1
learning_rate: 1e-4
optimizer: adamw_torch
bf16: false
"""


def axolotl(folder: Path, name: str, tokenizer_name: str) -> Numbers:
    import datasets

    columns = "{field_instruction: prompt, field_output: completion, format: '{instruction}', "
    row_type = "chat_template" if name.startswith("multi") else columns + "no_input_format: '{instruction}'}"
    prepared, config = folder / "prepared" / name, folder / f"{name}.yml"
    facts = {"model": tokenizer_name, "path": folder / f"{name}.jsonl", "type": row_type, "prepared": prepared}
    config.write_text(AXOLOTL.format(length=SEQUENCE_LEN, **facts), encoding="utf-8")
    start, cpu = time.perf_counter(), cpu_seconds()
    command = [sys.executable, "-m", "axolotl.cli.preprocess", str(config)]
    environment = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    rows = datasets.load_from_disk(str(next(mark.parent for mark in prepared.glob("*/state.json"))))
    return seconds, cpu, sum(map(len, rows["input_ids"]))


def cpu_seconds() -> float:
    """Of this process and those it waited for: what other work on the machine does not lengthen."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(python: str, tool: str, folder: Path, case: str, tokenizer: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as cache:
        command = [python, __file__, tokenizer, str(folder), "--worker", f"{tool}:{case}", "--cache", cache]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def work(tool: str, folder: Path, case: str, tokenizer: str) -> dict[str, float]:
    prepare = {"ours": ours, "trl": trl, "axolotl": axolotl}[tool]
    # What is loaded late is loaded once in a process; Axolotl's command is a new one each time.
    for _ in range(1 if tool == "axolotl" else 2):
        shutil.rmtree(folder / "prepared", ignore_errors=True)
        seconds, cpu, _ = prepare(folder, f"{case}-two", tokenizer)
    whole, whole_cpu, tokens = prepare(folder, case, tokenizer)
    # Not ru_maxrss of this process: it begins with what the parent had when it started this one.
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peaks = {"peak_mib": peak / 1024, "child_mib": child / 1024}
    return {"seconds": whole - seconds, "cpu": whole_cpu - cpu, "tokens": tokens, **peaks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=os.path.abspath)
    parser.add_argument("alpaca", type=Path)
    parser.add_argument("--copies", type=int, default=100)
    parser.add_argument("--chats", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--trl-python")
    parser.add_argument("--axolotl-python")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        import datasets

        datasets.config.HF_DATASETS_CACHE = Path(given.cache)
        tool, case = given.worker.split(":")
        print(json.dumps(work(tool, given.alpaca, case, given.tokenizer)))
        return
    pythons = {"ours": sys.executable, "trl": given.trl_python, "axolotl": given.axolotl_python}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, given.alpaca, given.copies, given.chats)
        for case in ("single", "multi"):
            with (folder / f"{case}.jsonl").open("rb") as lines:
                num_rows = sum(1 for _ in lines)
            found: dict[str, list[dict[str, Any]]] = {tool: [] for tool, python in pythons.items() if python}
            for _ in range(given.repeats):
                for tool, runs in found.items():
                    runs.append(measure(pythons[tool], tool, folder, case, given.tokenizer))
                    print(case, tool, json.dumps(runs[-1]), flush=True)
            for tool, runs in found.items():
                seconds = statistics.median(run["seconds"] for run in runs)
                cpu = statistics.median(run["cpu"] for run in runs)
                one = runs[0]
                print(
                    f"{case:6} {tool:7} {num_rows:,} rows in {seconds:.1f} s ({cpu:.1f} s of CPU): "
                    f"{num_rows / seconds:,.0f} rows/s, "
                    f"{one['tokens']:,} tokens, peak {one['peak_mib']:,.0f} MiB (largest child "
                    f"{one['child_mib']:,.0f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
