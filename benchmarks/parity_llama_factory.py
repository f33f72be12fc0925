"""Recipes of LLaMA-Factory's trained by it and by their conversion: the same tokens, labels and losses, step by step.

    python benchmarks/parity_llama_factory.py PYTHON [--steps 3] [--only CASE] [--folder FOLDER] [--record FILE]

PYTHON is the interpreter of an environment with llamafactory 0.9.5. On a CPU: `python3.11 -m venv lf`, then pip install
torch --index-url https://download.pytorch.org/whl/cpu, llamafactory==0.9.5 --no-deps, and transformers==5.6.0
datasets==4.0.0 accelerate==1.11.0 peft==0.18.1 trl==0.24.0 torchdata==0.11.0 einops pandas scipy sentencepiece tiktoken
modelscope omegaconf matplotlib fire av protobuf; it imports torchaudio, for which an empty module will do.

Each case is a recipe, its rows and its dataset_info.json, written into FOLDER, with a two-layer Llama of random
weights. In fp32, on the CPU, and in our order of rows, since each tool shuffles in its own way. --record writes the
tokens and labels that LLaMA-Factory made of the first rows as JSON, which tests/recipe/llama_factory_rows.json is.
"""

import argparse
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetuner.data.chat_templates import choose_template
from finetuner.data.first_row import first_row_at_hand
from finetuner.data.prepare import prepare_documents
from finetuner.data.shuffling import row_order
from finetuner.data.token_store import IGNORE_INDEX
from finetuner.data.tokenizer import load_tokenizer
from finetuner.recipe import load_recipe
from finetuner.recipe.convert import convert
from finetuner.run import train as run
from finetuner.training.metrics import read_metrics

WORKER = Path(__file__).with_name("parity_llama_factory_worker.py")
TOLERANCE = 1e-4
ROWS_A_STEP = 4
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
]
TALK = [
    ("Which river is the longest in Peru?", "The Ucayali, with the Apurimac.\nIt joins the Maranon."),
    ("Add 17 and 25.", "42"),
    ("¿Cómo se dice 'bread'?", "Pan."),
    ("Write a line of Python.", "print('hello, world')  # done"),
]
TOOL = {"name": "weather", "description": "It's 20° there", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "weather", "arguments": {"city": "Lima", "days": 2}}


def instructions() -> list[dict[str, Any]]:
    """Rows with and without input, system text and history, and with columns that are not named."""
    return [
        {
            "instruction": question,
            "input": ["", "Briefly."][i % 2],
            "output": answer,
            "system": ["", "You are kind."][i // 2 % 2],
            "history": [list(TALK[(i + k) % 4]) for k in range(i % 3)],
            "note": "seen",
        }
        for i, (question, answer) in enumerate(TALK * 3)
    ]


def chats() -> list[dict[str, Any]]:
    """ShareGPT rows: with and without a system text, of one round and of several, with tools and calls."""
    rows = []
    for i in range(12):
        talk: list[dict[str, str]] = [{"from": "system", "value": "Be brief."}] if i % 2 else []
        for k in range(1 + i % 3):
            question, answer = TALK[(i + k) % 4]
            talk += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        tools = ""
        if i % 4 == 3:
            tools = json.dumps([TOOL])
            talk += [
                {"from": "human", "value": "And Lima?"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": '{"celsius": 20}'},
                {"from": "gpt", "value": "20 degrees."},
            ]
        rows.append({"conversations": talk, "tools": tools})
    return rows


def plain_chats() -> list[dict[str, Any]]:
    """The ShareGPT rows that have no tools."""
    return [{"conversations": row["conversations"]} for row in chats() if not row["tools"]]


@dataclass(frozen=True)
class Case:
    """A recipe's own keys, its rows, and what dataset_info.json says of them."""

    rows: list[dict[str, Any]]
    info: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)


FULL = {"finetuning_type": "full"}
CHATS = {"formatting": "sharegpt"}
TOOLS = {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}}
ALL = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
CASES: dict[str, Case] = {
    "instructions": Case(instructions(), {"columns": ALL}, FULL),
    "instructions_bare": Case(instructions(), {}, {**FULL, "template": "llama3"}),
    "chats_tools": Case(chats(), TOOLS, FULL),
    "chats_thinking": Case(plain_chats(), CHATS, {**FULL, "template": "qwen3"}),
    "chats_not_thinking": Case(plain_chats(), CHATS, {**FULL, "template": "qwen3", "enable_thinking": False}),
    "chats_last_turn": Case(chats(), TOOLS, {**FULL, "mask_history": True}),
    "chats_prompts_too": Case(plain_chats(), CHATS, {**FULL, "train_on_prompt": True, "template": "chatml"}),
    "system_of_its_own": Case(plain_chats(), CHATS, {**FULL, "default_system": "Speak up.", "template": "zephyr"}),
    "lora": Case(instructions(), {}, {"lora_rank": 4}),
    "lora_rslora_named": Case(
        plain_chats(), CHATS, {"lora_rank": 4, "use_rslora": True, "lora_target": "q_proj,down_proj", "lora_alpha": 5}
    ),
    "dft": Case(instructions(), {}, {**FULL, "use_dft_loss": True}),
    "eaft": Case(plain_chats(), CHATS, {**FULL, "use_eaft_loss": True, "eaft_alpha": 1.5}),
    "cosine_warmup_decay": Case(
        instructions(),
        {},
        {**FULL, "lr_scheduler_type": "cosine", "warmup_ratio": 0.4, "weight_decay": 0.1, "max_grad_norm": 0.5},
    ),
}


def make_model(folder: Path) -> None:
    """Write a two-layer Llama and a byte-level BPE of some 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(pair) for pair in TALK] * 5 + ["user assistant system"] * 9, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0], bos_token=SPECIAL[3]
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def recipe_of(case: Case, steps: int) -> dict[str, Any]:
    """Return the recipe of a case, whose folders lie where it is run."""
    return {
        "model_name_or_path": "model", "stage": "sft", "do_train": True, "dataset": "rows", "template": "qwen",
        "cutoff_len": 2048, "max_steps": steps, "learning_rate": 1e-3, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "flash_attn": "disabled", "use_cpu": True, "save_strategy": "no",
        "report_to": "none", "output_dir": "theirs", "disable_tqdm": True, "logging_steps": 1,
    } | case.keys  # fmt: skip


def write_case(folder: Path, case: Case, steps: int) -> None:
    """Write model, rows, dataset_info.json and recipe."""
    make_model(folder / "model")
    (folder / "data").mkdir()
    (folder / "data" / "rows.json").write_text(json.dumps(case.rows, ensure_ascii=False))
    (folder / "data" / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json", **case.info}}))
    (folder / "lf.yml").write_text(yaml.safe_dump(recipe_of(case, steps), sort_keys=False, allow_unicode=True))


@dataclass(frozen=True)
class Compared:
    """Of each row (tokens, labels), and of each step the loss; by LLaMA-Factory and by us."""

    version: str
    rows: tuple[list[Any], list[Any]]
    losses: tuple[list[float], list[float]]

    @property
    def worst(self) -> float:
        """The largest difference of a loss."""
        return max(abs(a - b) for a, b in zip(*self.losses, strict=True))

    @property
    def differing_rows(self) -> list[int]:
        theirs, ours = self.rows
        return [i for i in range(max(map(len, self.rows))) if theirs[i : i + 1] != ours[i : i + 1]]


def our_rows(recipe: str) -> list[Any]:
    """Return (tokens, labels) of each row of a recipe of ours."""
    made = load_recipe(recipe)
    tokenizer = load_tokenizer(made.tokenizer, made.model.base_model, False).tokenizer
    tokenizer.chat_template = choose_template(made.data, tokenizer.chat_template)
    store = prepare_documents(made.data, tokenizer, made.output.seed).train
    return [[part.tolist() for part in store.document(i)] for i in range(len(store))]


def compare(name: str, python: str, folder: Path, steps: int = 3) -> Compared:
    """Train one case with both tools; `folder` must be the working directory."""
    case = CASES[name]
    write_case(folder, case, steps)
    converted = convert("lf.yml", first_row=first_row_at_hand).text
    Path("ours.yml").write_text(converted + "dataset_prepared_path: prepared\n")
    made = our_rows("ours.yml")
    order = row_order(42, 0, len(made)).tolist()
    Path("order.json").write_text(json.dumps(order))
    adapter = [] if case.keys.get("finetuning_type") == "full" else ["adapter"]
    command = [python, str(WORKER), "lf.yml", "order.json", "result.json", *adapter]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"LLaMA-Factory failed in case {name}:\n{done.stderr[-3000:]}")
    theirs = json.loads(Path("result.json").read_text())
    overrides = ["output_dir=run", "logging_steps=1", *[f"lora_model_dir={one}" for one in adapter]]
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    run.train(load_recipe("ours.yml", overrides), "ours.yml")
    losses = [row["loss"] for row in read_metrics(Path("run") / "metrics.jsonl") if "loss" in row]
    means = [loss * share for loss, share in zip(theirs["losses"], first_token_shares(made, order), strict=False)]
    return Compared(theirs["version"], (theirs["rows"], made), (means, losses))


def first_token_shares(rows: list[Any], order: list[int]) -> list[float]:
    """Return by how much LLaMA-Factory's loss of each step is too small.

    Its Trainer divides by all labels, a row's first one among them, which no position predicts: with train_on_prompt
    the loss is not the mean over the tokens that it sums.
    """
    shares = []
    for start in range(0, len(order), ROWS_A_STEP):
        labels = [rows[i][1] for i in order[start : start + ROWS_A_STEP]]
        counted = sum(label != IGNORE_INDEX for of_row in labels for label in of_row)
        shares.append(counted / (counted - sum(of_row[0] != IGNORE_INDEX for of_row in labels)))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", type=lambda path: str(Path(path).absolute()))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", choices=[*CASES])
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--record", type=lambda path: Path(path).absolute(), default=None)
    arguments = parser.parse_args()
    record: dict[str, Any] = {}
    for name in [arguments.only] if arguments.only else CASES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = ((arguments.folder or Path(temporary)) / name).absolute()
            folder.mkdir(parents=True)
            os.chdir(folder)
            compared = compare(name, arguments.python, folder, arguments.steps)
            os.chdir("/")
        differing = compared.differing_rows
        verdict = "the same" if not differing and compared.worst <= TOLERANCE else "DIFFERENT"
        rows = f"{len(differing)} of {len(compared.rows[0])} rows differ"
        print(f"{name:<22} {rows}, losses by {compared.worst:.1e} over {arguments.steps} steps: {verdict}", flush=True)
        record |= {"version": compared.version, name: compared.rows[0][:4]}
    if arguments.record:
        arguments.record.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
