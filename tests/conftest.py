"""Tiny real things: a two-layer Llama, a tokenizer trained on the spot, rows, recipes."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.register_assert_rewrite("support")

from support.rows import RecipeWriter, alpaca_rows, write_rows  # noqa: E402
from support.tiny import make_model, make_tokenizer  # noqa: E402

# Before any test imports a library that would look for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads cost tiny models more than they give, most of all where another process wants the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(trylast=True)  # of the tests that marks have left
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with many slow tests first where workers share the files, so that none ends long after the others."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: (-slow[item.path], -tests[item.path]))


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
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny-llama"), tokenizer_folder)


@pytest.fixture(scope="session")
def tied_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny-tied-llama"), tokenizer_folder, tied=True)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", alpaca_rows(20))


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
