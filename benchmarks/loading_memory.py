"""How much memory it takes to load a model for QLoRA, against the size of its file.

    python benchmarks/loading_memory.py [--gigabytes 2] [--width 1024] [--ranks 2] [--engine fsdp]

A Llama with random weights is written once; a recipe of one step is then run on it three times, twice with
quantized_cache. The peak is the largest sum over the ranks of their anonymous memory (what a file's pages do not back),
read twenty times a second, less what the ranks have with a model of two layers: an interpreter with torch in it is
0.5 GB by itself. It counts until the run has tried the model out with a forward pass of a few tokens. What the ranks
read from files, less what they read with the small model, tells how often each file was read.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

KIB_IN_GB = 1e9 / 1024  # the system counts memory in KiB, and a file's size is in GB here
ENGINES = {
    "ddp": [],
    "fsdp": ["fsdp=[full_shard, auto_wrap]"],
    "zero3": ["deepspeed={zero_optimization: {stage: 3}}"],
}


def write_model(folder: Path, gigabytes: float, width: int) -> None:
    """Random bf16 weights, layer by layer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    layer = 4 * width * width + 3 * width * 4 * width
    layers = max(2, round(gigabytes * 1e9 / 2 / layer))
    config = LlamaConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=8, vocab_size=2048
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = {letter: i for i, letter in enumerate(["<eos>", *pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)


def ranks_of(launcher: int) -> list[int]:
    """The processes below the launcher that train."""
    found, seen = [], [launcher]
    while seen:
        parent = seen.pop()
        try:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        except OSError:
            continue
        for child in map(int, children):
            seen.append(child)
            try:
                if b"finetuner.train" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(child)
            except OSError:
                continue
    return found


def number_of(pid: int, file: str, name: str) -> int:
    """The number after `name` in a file that the system keeps of a process; 0 when it has ended."""
    try:
        found = re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{pid}/{file}").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


@dataclass
class Start:
    seconds: float
    anonymous_gb: float
    resident_gb: float
    read_gb: float


def measured(words: list[str]) -> Start:
    """Run a command until its model is in its engine and was tried out; what it took, summed over the ranks."""
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    ready = threading.Event()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("recipe "):
                ready.set()

    reader = threading.Thread(target=listen)
    reader.start()
    began, got = time.monotonic(), Start(0.0, 0.0, 0.0, 0.0)
    while process.poll() is None:
        pids = ranks_of(process.pid)
        if not ready.is_set():
            got.seconds = time.monotonic() - began
            got.anonymous_gb = max(
                got.anonymous_gb, sum(number_of(pid, "status", "RssAnon") for pid in pids) / KIB_IN_GB
            )
            got.resident_gb = max(got.resident_gb, sum(number_of(pid, "status", "VmRSS") for pid in pids) / KIB_IN_GB)
            got.read_gb = max(got.read_gb, sum(number_of(pid, "io", "rchar") for pid in pids) / 1e9)
        time.sleep(0.05)
    reader.join()
    if process.returncode:
        sys.exit("".join(lines))
    return got


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--width", type=int, default=1024, help="4096: the matrices of an 8B model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engine", choices=ENGINES, default="fsdp")
    parser.add_argument("--folder", type=Path, default=Path("outputs/loading_memory"))
    chosen = parser.parse_args()
    work, model = chosen.folder, chosen.folder / f"llama-{chosen.gigabytes:g}GB-{chosen.width}"
    work.mkdir(parents=True, exist_ok=True)
    if not (model / "tokenizer.json").exists():
        write_model(model, chosen.gigabytes, chosen.width)
    (work / "rows.jsonl").write_text(json.dumps({"instruction": "Say a.", "input": "", "output": "a"}) + "\n")
    recipe = work / "recipe.yml"
    keys = {
        "base_model": str(model),
        "datasets": [{"path": str(work / "rows.jsonl"), "type": "alpaca"}],
        "adapter": "qlora",
        "lora_r": 8,
        "sequence_len": 256,
        "max_steps": 1,
        "learning_rate": 1e-4,
        "bf16": True,
        "save_strategy": "no",
        "output_dir": str(work / "out"),
        "overwrite_output_dir": True,
        "dataset_prepared_path": str(work / "prepared"),
    }
    recipe.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
    size = sum(path.stat().st_size for path in model.glob("*.safetensors")) / 1e9
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={chosen.ranks}"]
    words = [*launch, "-m", "finetuner.train", str(recipe), *ENGINES[chosen.engine]]
    shutil.rmtree(work / "prepared", ignore_errors=True)
    small = work / "two-layers"
    if not (small / "tokenizer.json").exists():
        write_model(small, 0.0, 64)
    bare = measured([*words, f"base_model={small}"])
    print(
        f"{chosen.engine} on {chosen.ranks} rank(s); the file has {size:.2f} GB; with a model of two layers the ranks"
    )
    print(f"hold {bare.anonymous_gb:.2f} GB of anonymous memory and are ready after {bare.seconds:.0f} s")
    for what in ("no cache", "first start", "second start"):
        got = measured([*words, *([] if what == "no cache" else ["quantized_cache=true"])])
        extra = got.anonymous_gb - bare.anonymous_gb
        print(
            f"{what:13} +{extra:.2f} GB over all ranks ({extra / size:.0%} of the file), resident in all "
            f"{got.resident_gb:.2f} GB, read {got.read_gb - bare.read_gb:.2f} GB, ready after {got.seconds:.0f} s",
            flush=True,
        )
    cached = sum(path.stat().st_size for path in (work / "prepared" / "quantized").glob("*.safetensors")) / 1e9
    print(f"the cache has {cached:.2f} GB")


if __name__ == "__main__":
    main()
