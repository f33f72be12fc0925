"""hub_strategy: every_save uploads the weights of each save, and nothing private; a dead network stops nothing."""

import base64
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.rows import RecipeWriter
from test_upload import finetuner, hub  # noqa: F401  (the hub of this test, as a fixture)

from finetuner.errors import PlanError, RecipeError
from finetuner.export import step_uploads as module
from finetuner.export.hub import stale_weights
from finetuner.export.step_uploads import StepUploads, require_whole_checkpoints
from finetuner.recipe import load
from finetuner.recipe.sections import OutputSection

PRIVATE = ("optimizer.safetensors", "state.json", "position.json", "scaler.json", "mine.txt", "part-00000.safetensors")


def commits(asked: list[Any]) -> list[tuple[str, dict[str, bytes], list[str]]]:
    """(message, name -> content, deleted names) of each commit."""
    found = []
    for _, path, _, body in asked:
        if "/commit/" in path:
            lines = [json.loads(line) for line in body.decode().splitlines()]
            files = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines if x["key"] == "file"}
            gone = [x["value"]["path"] for x in lines if x["key"] == "deletedFile"]
            found.append((lines[0]["value"]["summary"], files, gone))
    return found


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", *PRIVATE):
        (folder / name).write_text(name)
    return folder


class Api:
    """The calls that an upload makes, with the errors that it is to meet."""

    def __init__(self, errors: list[Exception | None], waits: float = 0.0) -> None:
        self.errors, self.waits, self.sent = errors, waits, list[list[str]]()

    def create_repo(self, *arguments: Any, **named: Any) -> None:
        pass

    def model_info(self, repo_id: str) -> Any:
        return SimpleNamespace(siblings=None)

    def create_commit(self, repo_id: str, operations: list[Any], commit_message: str) -> None:
        time.sleep(self.waits)
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        self.sent.append([operation.path_in_repo for operation in operations])


def uploads(api: Api, monkeypatch: pytest.MonkeyPatch, pauses: tuple[float, ...] = (0.0, 0.0)) -> Any:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    said: list[str] = []
    return StepUploads("me/x", private=True, say=said.append, pauses=pauses), said


def test_of_a_checkpoint_only_what_a_result_may_have_is_sent(checkpoint: Path, monkeypatch: Any) -> None:
    api = Api([])
    ours, said = uploads(api, monkeypatch)
    ours.start(checkpoint, 2)
    ours.close(waits=True)
    assert api.sent == [["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]]
    assert said == ["step 2 is uploaded to me/x"]


def test_a_failing_network_is_tried_again_and_then_given_up_with_a_warning(checkpoint: Path, monkeypatch: Any) -> None:
    down = ConnectionError("no route\nto it")
    api = Api([down, down])
    ours, said = uploads(api, monkeypatch)
    ours.start(checkpoint, 2)
    ours._thread.join()
    assert said == ["step 2 is uploaded to me/x"] and len(api.sent) == 1
    for errors, tries in (([down] * 9, 3), ([OSError()] * 9, 3)):
        api = Api(errors)
        ours, said = uploads(api, monkeypatch)
        ours.start(checkpoint, 4)
        ours._thread.join()
        assert len(errors) == 9 - tries
        assert len(said) == 1 and said[0].startswith("warning: step 4 could not be uploaded to 'me/x': ")


def test_a_save_during_an_upload_is_left_out_and_one_whose_checkpoint_goes_is_still_sent(
    checkpoint: Path, monkeypatch: Any
) -> None:
    api = Api([], waits=0.3)
    ours, said = uploads(api, monkeypatch)
    ours.start(checkpoint, 2)
    ours.start(checkpoint, 4)
    for path in checkpoint.iterdir():
        path.unlink()
    ours.close(waits=True)
    assert said[0].startswith("note: step 4 is not uploaded") and said[1:] == ["step 2 is uploaded to me/x"]
    assert len(api.sent) == 1


def test_the_end_of_a_run_waits_for_no_further_try(checkpoint: Path, monkeypatch: Any) -> None:
    ours, said = uploads(Api([ConnectionError("down")] * 9), monkeypatch, pauses=(600.0,))
    ours.start(checkpoint, 2)
    started = time.monotonic()
    ours.close(waits=True)
    assert time.monotonic() - started < 30 and said[0].startswith("warning: step 2")


def test_weights_that_a_loader_would_prefer_are_replaced() -> None:
    there = ["README.md", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "mine.safetensors"]
    assert stale_weights(there, ["model.safetensors", "config.json"]) == [
        "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    ]  # fmt: skip
    assert stale_weights(["model.safetensors"], ["model.safetensors"]) == []


def test_shards_are_no_model_to_upload() -> None:
    section = OutputSection(hub_model_id="me/x", hub_strategy="every_save")
    require_whole_checkpoints(section, sharded=False)
    with pytest.raises(PlanError, match="FULL_STATE_DICT"):
        require_whole_checkpoints(section, sharded=True)


def test_checkpoints_with_an_optimizer_are_refused_by_name(write_recipe: RecipeWriter) -> None:
    for name in ("checkpoint", "all_checkpoints"):
        with pytest.raises(RecipeError, match=f"'{name}' is not supported yet: uploading the optimizer's state"):
            load(write_recipe(hub_strategy=name))
    notes = [str(note) for note in load(write_recipe(hub_strategy="every_save")).notes]
    assert any("hub_model_id does not say where" in note for note in notes)


@pytest.mark.slow
def test_a_run_uploads_each_save_and_then_its_result(hub: Any, write_recipe: RecipeWriter) -> None:  # noqa: F811
    address, asked = hub
    recipe = write_recipe(
        hub_model_id="me/x", hub_strategy="every_save", adapter="lora", max_steps=2, save_steps=1, micro_batch_size=2
    )
    done = finetuner(address, "train", recipe)
    assert done.returncode == 0, done.stderr
    assert "resume" not in done.stderr
    sent = commits(asked)
    messages = [message for message, _, _ in sent]
    assert messages[0] == "Training in progress, step 1" and messages[-1] == "Trained with finetuner"
    for _, files, _ in sent:
        assert {"adapter_model.safetensors", "adapter_config.json"} <= files.keys()
        assert not {"optimizer.safetensors", "state.json", "metrics.jsonl"} & files.keys()


@pytest.mark.slow
def test_a_run_without_a_network_ends_with_its_result_on_this_disk(write_recipe: RecipeWriter, tmp_path: Path) -> None:
    recipe = write_recipe(
        hub_model_id="me/x", hub_strategy="every_save", adapter="lora", max_steps=2, save_steps=1, micro_batch_size=2
    )
    done = finetuner("http://127.0.0.1:9", "train", recipe)
    assert "warning: step 1 could not be uploaded" in done.stdout + done.stderr, done.stderr
    assert done.returncode == 1 and "It is complete in" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_the_pauses_between_tries_are_bounded() -> None:
    assert sum(module._SECONDS_BETWEEN) < 60
