"""How much memory it takes to load a model for QLoRA, against the size of its file.

    python benchmarks/loading_memory.py [--gigabytes 2] [--ranks 2] [--engine fsdp]

A Llama with random weights is written once; a recipe of one step is then run on it twice, with quantized_cache. The
peak is the largest sum over the ranks of their anonymous memory (what a file's pages do not back), read twenty times a
second, less what the ranks have before they load: an interpreter with torch in it is 0.5 GB by itself. Once until the
last line of progress, and once until the run has tried the model out with a forward pass of a few tokens.
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
from pathlib import Path

ENGINES = {
    "ddp": [],
    "fsdp": ["fsdp=[full_shard, auto_wrap]"],
    "zero3": ["deepspeed={zero_optimization: {stage: 3}}"],
}


def write_model(folder: Path, gigabytes: float) -> None:
    """Random bf16 weights, layer by layer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    width = 1024
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


def memory_of(pid: int) -> tuple[int, int]:
    """(anonymous bytes, resident bytes)"""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    kilobytes = [re.search(rf"{name}:\s+(\d+)", status) for name in ("RssAnon", "VmRSS")]
    anonymous, resident = (int(match[1]) * 1024 if match else 0 for match in kilobytes)
    return anonymous, resident


def measured(words: list[str]) -> dict[str, float]:
    """Run a command; the seconds until the model is in its engine and the peaks over all ranks, in GB."""
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    marks: dict[str, float] = {}
    lines: list[str] = []

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("loading the model"):
                marks["loading"] = time.monotonic()
            if line.startswith("recipe "):
                marks.setdefault("loaded", time.monotonic())

    reader = threading.Thread(target=listen)
    reader.start()
    started, anonymous, resident = time.monotonic(), [], []
    times: list[float] = []
    while process.poll() is None:
        sums = [memory_of(pid) for pid in ranks_of(process.pid)]
        if "loaded" not in marks:  # what a step takes is another matter
            times.append(time.monotonic())
            anonymous.append(sum(a for a, _ in sums))
            resident.append(sum(r for _, r in sums))
        time.sleep(0.05)
    reader.join()
    if process.returncode:
        sys.exit("".join(lines))
    return {
        "seconds": marks["loaded"] - started,
        "anonymous_gb": max(anonymous) / 1e9,
        "loading_gb": max(a for a, at in zip(anonymous, times, strict=True) if at <= marks.get("loading", at)) / 1e9,
        "resident_gb": max(resident) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engine", choices=ENGINES, default="fsdp")
    parser.add_argument("--folder", type=Path, default=Path("outputs/loading_memory"))
    chosen = parser.parse_args()
    work, model = chosen.folder, chosen.folder / f"llama-{chosen.gigabytes:g}GB"
    work.mkdir(parents=True, exist_ok=True)
    if not (model / "tokenizer.json").exists():
        write_model(model, chosen.gigabytes)
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
    small = work / "nothing"
    if not (small / "tokenizer.json").exists():
        write_model(small, 0.0)
    bare = measured([*words, f"base_model={small}"])
    print(f"{chosen.engine} on {chosen.ranks} rank(s); the file has {size:.2f} GB; without a model the ranks hold")
    print(f"  {bare['anonymous_gb']:.2f} GB of anonymous memory and are ready after {bare['seconds']:.0f} s")
    for what in ("no cache", "first start", "second start"):
        got = measured([*words, *([] if what == "no cache" else ["quantized_cache=true"])])
        loading, extra = (got[key] - bare["anonymous_gb"] for key in ("loading_gb", "anonymous_gb"))
        print(
            f"{what:13} +{loading:.2f} GB over all ranks while it loads ({loading / size:.0%} of the file), "
            f"+{extra:.2f} GB ({extra / size:.0%}) when it has been tried out, resident in all "
            f"{got['resident_gb']:.2f} GB, ready after {got['seconds']:.0f} s",
            flush=True,
        )
    cached = sum(path.stat().st_size for path in (work / "prepared" / "quantized").glob("*.safetensors")) / 1e9
    print(f"the cache has {cached:.2f} GB")


if __name__ == "__main__":
    main()
