"""Recipes of TRL's trained by TRL and by their conversion: the same tokens, labels and losses, step by step.

    python benchmarks/parity_trl.py PYTHON [--steps 3] [--only CASE] [--folder FOLDER] [--record FILE]

PYTHON is the interpreter of an environment with trl (`pip install trl peft`; 1.16.0 with transformers 5.23 was used
last). Each case is a recipe and rows, written into FOLDER, with a two-layer Llama of random weights. In fp32, on the
CPU, dropout 0, and in our order of rows, since each tool shuffles in its own way. With assistant_only_loss TRL puts
templates of its own in the place of some known ones, whose answers begin or end with the line break beside them: the
case here has a template with {% generation %} marks, which both heed. --record writes the first rows' tokens and labels
of TRL as JSON, which tests/recipe/trl_rows.json is.
"""

import argparse
import json
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetuner.data.chat_templates import choose_template
from finetuner.data.first_row import first_row_at_hand
from finetuner.data.prepare import prepare_documents
from finetuner.data.shuffling import row_order
from finetuner.data.tokenizer import load_tokenizer
from finetuner.recipe import load, load_recipe
from finetuner.recipe.convert import convert
from finetuner.run import train as run
from finetuner.training.metrics import read_metrics

WORKER = Path(__file__).with_name("parity_trl_worker.py")
TOLERANCE = 1e-4
NUM_RECORDED = 6
TURN = "{{ '<|im_start|>' + message['role'] + '\n' }}"
PLAIN = TURN + "{{ message['content'] + '<|im_end|>' + '\n' }}"
MARKED = (
    TURN + "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
)
CLOSED = TURN + "{{ message['content'] + '<|im_end|>' }}"  # nothing stands behind a turn's end


def template(turn: str) -> str:
    """A ChatML template with turns of this form."""
    begin = "{% for message in messages %}" + turn + "{% endfor %}"
    return begin + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TALK = [
    ("Which river is the longest in Peru?", "The Ucayali, with the Apurimac.\nIt joins the Maranon."),
    ("Add 17 and 25.", "42"),
    ("¿Cómo se dice 'bread'?", "Pan."),
    ("Write a line of Python.", "print('hello, world')  # done"),
]


def chats() -> list[dict[str, Any]]:
    """Rows of messages: with and without a system text, of one round and of several."""
    rows = []
    for i in range(12):
        rounds = [TALK[(i + k) % len(TALK)] for k in range(1 + i % 3)]
        messages = [{"role": "system", "content": "You are brief."}] if i % 2 else []
        for question, answer in rounds:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer * (1 + i % 4)}]
        rows.append({"messages": messages})
    return rows


def pairs() -> list[dict[str, Any]]:
    """Rows of two texts."""
    return [
        {"prompt": f"Q: {question} ({i})\nA:", "completion": " " + answer}
        for i, (question, answer) in enumerate(TALK * 3)
    ]


def chat_pairs() -> list[dict[str, Any]]:
    """Rows of two lists of messages, the prompt with a system text in every second."""
    rows = []
    for row in chats():
        *prompt, answer = row["messages"]
        rows.append({"prompt": prompt, "completion": [answer]})
    return rows


def texts() -> list[dict[str, Any]]:
    """Rows of one text."""
    return [{"text": f"{question} {answer}"} for question, answer in TALK * 3]


@dataclass(frozen=True)
class Case:
    """A recipe's own keys, its rows, and the tokenizer's chat template. `begins`: it puts <s> before each text."""

    rows: list[dict[str, Any]]
    keys: dict[str, Any] = field(default_factory=dict)
    template: str = template(PLAIN)
    begins: bool = False


LORA = {"use_peft": True, "lora_dropout": 0.0}
CASES: dict[str, Case] = {
    "chats": Case(chats()),
    "chats_assistant_only": Case(chats(), {"assistant_only_loss": True}, template(MARKED)),
    "chats_template_in_a_file": Case(chats(), {"chat_template_path": "FOLDER/template.jinja"}),
    "chats_cut": Case(chats(), {"max_length": 40}),
    "pairs": Case(pairs()),
    "pairs_whole": Case(pairs(), {"completion_only_loss": False}),
    "chat_pairs": Case(chat_pairs(), {}, template(CLOSED)),
    "texts": Case(texts()),
    "texts_begun": Case(texts(), begins=True),
    "pairs_begun": Case(pairs(), begins=True),
    "chats_begun": Case(chats(), template="{{ bos_token }}" + template(PLAIN), begins=True),
    "dft": Case(chats(), {"loss_type": "dft"}),
    "lora": Case(chats(), LORA),
    "lora_rslora_named": Case(chats(), {**LORA, "use_rslora": True, "lora_target_modules": ["q_proj", "down_proj"]}),
    "cosine_warmup_decay": Case(
        chats(),
        {"lr_scheduler_type": "cosine", "warmup_steps": 0.4, "weight_decay": 0.1, "max_grad_norm": 0.5},
    ),
    "constant_with_ignored_warmup": Case(chats(), {"lr_scheduler_type": "constant", "warmup_steps": 2}),
}


def make_model(folder: Path, case: Case) -> None:
    """Write a two-layer Llama and a byte-level BPE of some 400 tokens, with the case's template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [*SPECIAL, "<s>"] if case.begins else SPECIAL
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(pair) for pair in TALK] * 5 + ["user assistant system"] * 9, trainer)
    begin = {"bos_token": "<s>"} if case.begins else {}
    if case.begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0], **begin)
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    fast.chat_template = case.template
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def write_case(folder: Path, case: Case, steps: int) -> Path:
    """Write model, rows and TRL's recipe into a folder; return the recipe."""
    make_model(folder / "model", case)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in case.rows))
    recipe: dict[str, Any] = {
        "model_name_or_path": str(folder / "model"), "dataset_name": str(folder / "rows.jsonl"), "max_steps": steps,
        "learning_rate": 1e-3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": False,
        "use_cpu": True, "save_strategy": "no", "report_to": "none", "output_dir": str(folder / "theirs"),
        "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    (folder / "template.jinja").write_text(template(CLOSED.replace("<|im_end|>", "' + eos_token + '")))
    path = folder / "trl.yml"
    text = yaml.safe_dump(recipe | case.keys, sort_keys=False, allow_unicode=True)
    path.write_text(text.replace("FOLDER", str(folder)))
    return path


def learned(row: Any) -> tuple[list[int], list[int]]:
    """Return a row's tokens, and its labels from the second token on: the first is predicted from nothing."""
    ids, labels = row
    return ids, labels[1:]


@dataclass(frozen=True)
class Compared:
    """Of each row (tokens, labels), and of each step the loss; by TRL and by us. `version`: TRL's."""

    version: str
    rows: tuple[list[Any], list[Any]]
    losses: tuple[list[float], list[float]]

    @property
    def worst(self) -> float:
        """The largest difference of a loss."""
        return max(abs(a - b) for a, b in zip(*self.losses, strict=True))

    @property
    def differing_rows(self) -> list[int]:
        """Numbers of the rows of which tokens or labels differ."""
        theirs, ours = (list(map(learned, rows)) for rows in self.rows)
        return [i for i in range(max(map(len, self.rows))) if theirs[i : i + 1] != ours[i : i + 1]]


def our_rows(recipe: Path) -> list[Any]:
    """Return (tokens, labels) of each row of a recipe of ours."""
    made = load(recipe).recipe
    source = made.tokenizer.tokenizer or made.model.base_model
    tokenizer = load_tokenizer(made.tokenizer, source, False).tokenizer
    tokenizer.chat_template = choose_template(made.data, tokenizer.chat_template)
    store = prepare_documents(made.data, tokenizer, made.output.seed).train
    return [[part.tolist() for part in store.document(i)] for i in range(len(store))]


def compare(name: str, python: str, folder: Path, steps: int = 3) -> Compared:
    """Train one case with both tools, in `folder`."""
    case = CASES[name]
    recipe = write_case(folder, case, steps)
    ours = folder / "ours.yml"
    converted = convert(recipe, first_row=first_row_at_hand).text
    ours.write_text(converted + f"dataset_prepared_path: {folder / 'prepared'}\n")
    made = our_rows(ours)
    order = row_order(42, 0, len(made)).tolist()
    (folder / "order.json").write_text(json.dumps(order))
    adapter = [str(folder / "adapter")] if case.keys.get("use_peft") else []
    files = [str(recipe), str(folder / "order.json"), str(folder / "result.json"), *adapter]
    done = subprocess.run([python, str(WORKER), *files], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"TRL failed in case {name}:\n{done.stderr[-3000:]}")
    theirs = json.loads((folder / "result.json").read_text())
    overrides = [f"output_dir={folder / 'run'}", "logging_steps=1", *[f"lora_model_dir={one}" for one in adapter]]
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    run.train(load_recipe(str(ours), overrides), str(ours))
    losses = [row["loss"] for row in read_metrics(folder / "run" / "metrics.jsonl") if "loss" in row]
    return Compared(theirs["version"], (theirs["rows"], made), (theirs["losses"], losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", choices=[*CASES])
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--record", type=Path, default=None)
    arguments = parser.parse_args()
    record: dict[str, Any] = {}
    for name in [arguments.only] if arguments.only else CASES:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (arguments.folder or Path(temporary)) / name
            folder.mkdir(parents=True)
            compared = compare(name, arguments.python, folder, arguments.steps)
        differing = compared.differing_rows
        verdict = "the same" if not differing and compared.worst <= TOLERANCE else "DIFFERENT"
        rows = f"{len(differing)} of {len(compared.rows[0])} rows differ"
        print(f"{name:<30} {rows}, losses by {compared.worst:.1e} over {arguments.steps} steps: {verdict}")
        record |= {"version": compared.version, name: compared.rows[0][:NUM_RECORDED]}
    if arguments.record:
        arguments.record.write_text("{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in record.items()))
        arguments.record.open("a").write("\n}\n")


if __name__ == "__main__":
    main()
