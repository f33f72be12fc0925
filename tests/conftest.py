"""Tiny real things: a two-layer Llama, a tokenizer trained on the spot, rows, recipes, commands."""

import json
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before any test imports a library that would look for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads cost tiny models more than they give, most of all where another process wants the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SHARED_DATA = ROOT.parent / "shared" / "data"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]


@pytest.fixture(scope="session")
def hf_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`datasets` caches what it reads; the tests' rows go to a folder that vanishes."""
    return tmp_path_factory.mktemp("hf-cache")


@pytest.fixture(autouse=True)
def _own_cache(hf_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hf_cache)


@pytest.fixture(autouse=True)
def _own_accelerate_state() -> None:
    """Accelerate's state outlives its Accelerator: no test may find the precision of the one before it."""
    if "accelerate.state" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 512 tokens with ChatML turns; its end of text is <|endoftext|>, and it adds no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [Path(__file__).read_text(), "the quick brown fox jumps over the lazy dog " * 20, "### Response:\n\n" * 20]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", bos_token="<|bos|>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = CHATML
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


def make_model(
    folder: Path, tokenizer_folder: Path, *, tied: bool = False, dtype: str = "float32", **config: int
) -> Path:
    """A two-layer Llama of 512 tokens with random weights, saved with the tokenizer beside it."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512} | config
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, eos_token_id=0)
    )
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny-llama"), tokenizer_folder)


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny-tied-llama"), tokenizer_folder, tied=True)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def alpaca_rows(count: int) -> list[dict]:
    """Rows of unequal length."""
    words = list(string.ascii_lowercase[:15])
    return [
        {
            "instruction": " ".join(words[: 2 + i % 5]) + f" {i}?",
            "input": "" if i % 3 else "given " * (1 + i % 4),
            "output": " ".join(words[i % 4 : i % 4 + 1 + (7 * i) % 11]) + ".",
        }
        for i in range(count)
    ]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", alpaca_rows(20))


RecipeWriter = Callable[..., Path]


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_model: Path, rows_file: Path) -> RecipeWriter:
    """write_recipe(key=value, ...) -> a recipe for the tiny model; None leaves a key out."""

    def write(name: str = "recipe.yml", **keys: object) -> Path:
        values: dict[str, object] = {
            "base_model": str(tiny_model),
            "datasets": [{"path": str(rows_file), "type": "alpaca"}],
            "sequence_len": 256,
            "learning_rate": 1e-3,
            "bf16": False,
            "output_dir": str(tmp_path / "out"),
            "dataset_prepared_path": str(tmp_path / "prepared"),
        }
        values |= keys
        path = tmp_path / name
        path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items() if v is not None))
        return path

    return write


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def run_command(
    *arguments: object, ranks: int = 0, cwd: Path | None = None, timeout: int = 300, given: str = ""
) -> Result:
    """Run `python -m MODULE ...` (ranks=0), or the same under torchrun with so many CPU ranks; `given` is its input."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "PYTEST_"))}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "ACCELERATE_USE_CPU": "true"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, TESTS, *sorted(p for p in TESTS.iterdir() if p.is_dir()))))
    launch = [sys.executable, "-m"]
    if ranks:
        launch += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    command = [*launch, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd or ROOT, env=env, capture_output=True, text=True, timeout=timeout, input=given
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict]]:
    """train(recipe, "key=value", ...) runs it in this process on one CPU rank; gives the rows of its metrics."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from finetuner.recipe import load
    from finetuner.run import train as run
    from finetuner.training.metrics import read_metrics

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def train_here(recipe: Path, *overrides: str) -> list[dict]:
        loaded = load(recipe, overrides)
        for state in (AcceleratorState, GradientState, PartialState):  # Accelerate's state outlives its Accelerator
            state._reset_state()
        run.train(loaded.recipe, str(recipe), map(str, loaded.notes))
        return read_metrics(Path(loaded.recipe.output.output_dir) / "metrics.jsonl")

    return train_here


def weights_of(folder: Path) -> dict:
    """Every tensor of the safetensors files that a run left in its output folder."""
    from safetensors.torch import load_file

    tensors: dict = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    assert tensors, f"no weights in {folder}"
    return tensors


def largest_difference(left: dict, right: dict) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name].double() - right[name].double()).abs().max()) for name in left)


def unfinished(source: Path, out: Path, step: int) -> Path:
    """A folder with the run of `source` as it was at `step`."""
    name = f"checkpoints/step-{step:08}"
    shutil.copytree(source / name, out / name)
    shutil.copy(source / "metrics.jsonl", out)
    return out
