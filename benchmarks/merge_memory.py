"""Time and memory of merging a LoRA adapter, against PEFT's load, merge and save.

    python benchmarks/merge_memory.py [--gigabytes 2.5] [--rounds 2] [--folder outputs/merge_memory]

A Llama with random bf16 weights is written in one shard and in five, and an adapter of rank 16 on all its linear
layers. Both ways then merge it in processes of their own, turn about. The peak is the kernel's figure of resident
memory (VmHWM), less that of the same process after its imports.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

BEFORE = """
import json, sys, time
from pathlib import Path

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

base, adapter, output = sys.argv[1:]
"""
OURS = """
from finetuner.export.merge_writer import merge_adapter
imported, started = resident("VmHWM"), time.monotonic()
merge_adapter(Path(adapter), base, Path(output))
"""
PEFT = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama
imported, started = resident("VmHWM"), time.monotonic()
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
model.merge_and_unload().save_pretrained(output)
"""
AFTER = """
print(json.dumps([time.monotonic() - started, (resident("VmHWM") - imported) / 1e6]))
"""


def write_model(folder: Path, gigabytes: float) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    width, inner = 2048, 8192
    layer = 4 * width * width + 3 * width * inner
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * 32000 * width) / layer))
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=16, vocab_size=32000
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "one", max_shard_size="1TB")
    model.save_pretrained(folder / "five", max_shard_size=f"{gigabytes / 5 * 1.05:.3f}GB")
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.float().save_pretrained(folder / "adapter")


def measured(code: str, base: Path, adapter: Path, output: Path) -> list[float]:
    """[seconds, megabytes above the imports]"""
    shutil.rmtree(output, ignore_errors=True)
    words = [sys.executable, "-c", BEFORE + code + AFTER, str(base), str(adapter), str(output)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("outputs/merge_memory"))
    chosen = parser.parse_args()
    work = chosen.folder / f"{chosen.gigabytes:g}GB"
    if not (work / "adapter").exists():
        write_model(work, chosen.gigabytes)
    for shards in ("one", "five"):
        files = list((work / shards).glob("*.safetensors"))
        size = sum(path.stat().st_size for path in files) / 1e9
        print(f"{size:.2f} GB in {len(files)} file(s)")
        for _ in range(chosen.rounds):
            for name, code in (("ours", OURS), ("PEFT", PEFT)):
                seconds, megabytes = measured(code, work / shards, work / "adapter", work / f"merged-{name}")
                print(f"  {name}: {seconds:6.1f} s, {megabytes:6.0f} MB above the imports", flush=True)


if __name__ == "__main__":
    main()
