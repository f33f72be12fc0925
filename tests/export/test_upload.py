"""A result goes to the hub, alone and private, or stays whole where it is; the hub is a server of this test."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support.places import ROOT

from finetuner.errors import ModelError, PlanError, RecipeError
from finetuner.export.hub import require_hub
from finetuner.recipe.sections import OutputSection


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub to take a commit; `asked` is every request with its body."""

    asked: list[tuple[str, str, dict[str, str], bytes]]
    large: bool = False  # weights go the way of large files
    stored: set[str]  # digests of large files that have arrived
    refuses: list[bool]  # whether the next commit is refused

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(("PUT", self.path, dict(self.headers), body))
        self.stored.add(self.path.rpartition("/")[2])
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(("POST", self.path, dict(self.headers), body))
        answer: dict = {"url": "https://huggingface.co/me/x", "id": "me/x"}
        if "/preupload/" in self.path:
            names = [f["path"] for f in json.loads(body)["files"]]
            modes = ["lfs" if self.large and n.endswith(".safetensors") else "regular" for n in names]
            files = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in zip(names, modes, strict=True)]
            answer = {"files": files}
        if self.path.endswith("/objects/batch"):
            address = f"http://{self.headers['Host']}/put"
            answer = {
                "objects": [
                    {"oid": o["oid"], "size": o["size"]}
                    | ({} if o["oid"] in self.stored else {"actions": {"upload": {"href": f"{address}/{o['oid']}"}}})
                    for o in json.loads(body)["objects"]
                ]
            }
        if "/commit/" in self.path:
            if self.refuses and self.refuses.pop():
                self._answer({"error": "the line was cut"}, status=400)
                return
            answer = {"commitUrl": "https://huggingface.co/me/x/commit/1", "commitOid": "1", "hookOutput": ""}
        self._answer(answer)

    def do_GET(self) -> None:
        self._answer({"id": "me/x", "sha": "0", "siblings": []})

    def _answer(self, answer: dict, status: int = 200) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[tuple[str, list]]:
    """(address, requests); its parameters, if any, are attributes of Hub."""
    asked: list = []
    attributes = {"asked": asked, "stored": set(), "refuses": []} | getattr(request, "param", {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Recording", (Hub,), attributes))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def finetuner(endpoint: str, *words: object) -> subprocess.CompletedProcess:
    """In a process of its own: huggingface_hub reads its variables once."""
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    env |= {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, "-c", "from finetuner.cli import main; main()", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def upload(folder: Path, endpoint: str, *, private: bool = True) -> subprocess.CompletedProcess:
    return finetuner(endpoint, "push", folder, "--to", "me/x", *([] if private else ["--public"]))


@pytest.fixture
def result(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    for name in (
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja", "metrics.jsonl",
        ".lock", "checkpoints/step-00000001/adapter_model.safetensors", "merged/model.safetensors",
    ):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.mark.slow
def test_the_files_of_the_result_alone_are_uploaded_to_a_private_repository(hub, result):
    address, asked = hub
    done = upload(result, address)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"done: {address}/me/x\n")
    made = next(json.loads(body) for _, path, _, body in asked if path == "/api/repos/create")
    assert made["name"] == "x" and made["organization"] == "me" and made["visibility"] == "private"
    commit = next(body for _, path, _, body in asked if "/commit/main" in path)
    lines = [json.loads(line) for line in commit.decode().splitlines()]
    sent = {x["value"]["path"]: base64.b64decode(x["value"]["content"]).decode() for x in lines if x["key"] == "file"}
    names = ("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json")
    assert sent == {name: name for name in names}
    assert all(
        {k.lower(): v for k, v in headers.items()}["authorization"] == "Bearer hf_secret" for _, _, headers, _ in asked
    )


@pytest.mark.slow
def test_a_repository_is_public_only_where_it_was_asked_for(hub, result):
    address, asked = hub
    assert upload(result, address, private=False).returncode == 0
    made = next(json.loads(body) for _, path, _, body in asked if path == "/api/repos/create")
    assert made.get("visibility", "public") == "public" and not made.get("private", False)
    assert OutputSection().hub_private_repo is True


@pytest.mark.slow
@pytest.mark.parametrize("hub", [{"large": True, "refuses": [False, True]}], indirect=True)
def test_a_second_try_sends_a_merged_models_weights_no_second_time(hub, result):
    address, asked = hub
    merged = result / "merged"
    for name in ("config.json", "merge.json", "README.md"):
        (merged / name).write_text(name)
    cut = upload(merged, address)
    assert cut.returncode == 1 and f"finetuner push {merged} --to me/x" in cut.stderr and "Traceback" not in cut.stderr
    sent = [body for method, _, _, body in asked if method == "PUT"]
    assert sent == [b"merged/model.safetensors"]
    asked.clear()
    done = upload(merged, address)
    assert done.returncode == 0, done.stderr
    assert [path for method, path, _, _ in asked if method == "PUT"] == []
    commit = next(body for _, path, _, body in asked if "/commit/main" in path)
    lines = [json.loads(line) for line in commit.decode().splitlines()]
    assert {x["value"]["path"] for x in lines[1:]} == {"config.json", "README.md", "model.safetensors"}


def test_what_to_upload_and_where_is_the_recipes_or_named(write_recipe, train, tmp_path, tiny_model):
    from finetuner.commands.push import push

    with pytest.raises(ModelError, match="neither an adapter nor a model"):
        push(str(tmp_path), "me/x", public=False)
    with pytest.raises(RecipeError, match="--to me/my-model"):
        push(str(tiny_model), None, public=False)
    recipe = write_recipe(hub_model_id="me/x", adapter="lora", output_dir=str(tiny_model.parent / "no"))
    with pytest.raises(ModelError, match="no' holds neither"):
        push(str(recipe), None, public=False)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PlanError, match="HF_HUB_OFFLINE forbids it"):  # the name is found in recipe.yml beside it
        recipe.rename(tmp_path / "recipe.yml")
        push(str(tmp_path), None, public=False)


@pytest.mark.slow
def test_without_the_hub_the_message_says_where_the_result_is_and_what_to_type(result):
    done = upload(result, "http://127.0.0.1:9")
    assert done.returncode == 1 and "hf_secret" not in done.stderr
    assert f"It is complete in {result}" in done.stderr and f"finetuner push {result} --to me/x" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_upload_that_cannot_begin_is_refused_before_the_run(monkeypatch, write_recipe, train, tmp_path):
    from huggingface_hub import constants

    require_hub(None)
    with pytest.raises(PlanError, match="HF_HUB_OFFLINE forbids it"):
        train(write_recipe(hub_model_id="me/x"))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(PlanError, match="'a/b/c' is no name of a repository"):
        require_hub("a/b/c")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PlanError, match="hf auth login"):
        require_hub("me/x")
