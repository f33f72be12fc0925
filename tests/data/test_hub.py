"""Models and rows come from the hub by their names; the hub is a server of this test."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from support.places import ROOT

pytestmark = pytest.mark.slow


@dataclass
class Repository:
    """Revision -> file -> content; a revision's commit is the hash of its name."""

    revisions: dict[str, dict[str, bytes]]
    read: list[str] = field(default_factory=list)  # "commit/file"

    def commit(self, revision: str) -> str | None:
        known = {name: hashlib.sha1(name.encode()).hexdigest() for name in self.revisions}
        return known.get(revision) or (revision if revision in known.values() else None)

    def files(self, revision: str) -> dict[str, bytes]:
        commit = self.commit(revision)
        return next(files for name, files in self.revisions.items() if self.commit(name) == commit)


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub to read from: facts of a repository, its tree, and its files whole or in part."""

    repositories: dict[str, Repository]  # "datasets/me/rows", "models/me/tiny"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("api/"):
            self._api(path.removeprefix("api/").split("/"))
        else:
            self._file(path.split("/"), body=True)

    def do_HEAD(self) -> None:
        self._file(unquote(urlsplit(self.path).path).strip("/").split("/"), body=False)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        is_json = "json" in self.headers.get("Content-Type", "")
        asked = json.loads(body)["paths"] if is_json else parse_qs(body)["paths"]
        self._api(unquote(urlsplit(self.path).path).strip("/").removeprefix("api/").split("/"), asked)

    def _api(self, parts: list[str], paths: list[str] | None = None) -> None:
        kind, owner, name, what, revision, *below = [*parts, "revision", "main"][: max(5, len(parts))]
        repository = self.repositories.get(f"{kind}/{owner}/{name}")
        commit = repository.commit(revision) if repository is not None else None
        if repository is None or commit is None:
            self._answer(b"{}", 404, {"X-Error-Code": "RepoNotFound" if repository is None else "RevisionNotFound"})
            return
        files = repository.files(revision)
        if what == "revision":
            names = [{"rfilename": one} for one in files]
            facts = {
                "_id": "1",
                "id": f"{owner}/{name}",
                "sha": commit,
                "siblings": names,
                "tags": [],
                "private": False,
            }
            self._answer(json.dumps(facts).encode())
            return
        chosen = [one for one in files if paths is None or one in paths]
        if what == "tree" and below:
            chosen = [one for one in chosen if one.startswith("/".join(below) + "/")]
        entries = [
            {"type": "file", "path": one, "size": len(files[one]), "oid": hashlib.sha1(files[one]).hexdigest()}
            for one in chosen
        ]
        self._answer(json.dumps(entries).encode())

    def _file(self, parts: list[str], *, body: bool) -> None:
        kind, *rest = parts if parts[0] == "datasets" else ["models", *parts]
        owner, name, _, revision, *file = rest
        repository = self.repositories.get(f"{kind}/{owner}/{name}")
        commit = repository.commit(revision) if repository is not None else None
        content = repository.files(revision).get("/".join(file)) if repository is not None and commit else None
        if repository is None or commit is None or content is None:
            self._answer(b"", 404, {"X-Error-Code": "EntryNotFound"}, body=body)
            return
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, asked = 200, self.headers.get("Range")
        if body and asked:
            start, stop = (int(one) if one else None for one in asked.removeprefix("bytes=").split("-"))
            whole, content = len(content), content[start : None if stop is None else stop + 1]
            headers["Content-Range"], status = f"bytes {start}-{(start or 0) + len(content) - 1}/{whole}", 206
        if body:
            repository.read.append(f"{commit}/{'/'.join(file)}")
        self._answer(content, status, headers, body=body)

    def _answer(
        self, content: bytes, status: int = 200, headers: dict[str, str] | None = None, body: bool = True
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {"Content-Type": "application/json"}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


def rows(word: str) -> bytes:
    of_one = ({"instruction": f"{word} {i}", "input": "", "output": f"{word} is {i}"} for i in range(20))
    return "".join(json.dumps(row) + "\n" for row in of_one).encode()


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[tuple[dict[str, Repository], str]]:
    """(repositories, address): me/rows with two revisions, and me/tiny, a model."""
    repositories = {
        "datasets/me/rows": Repository(
            {
                "main": {"train.jsonl": rows("newer"), "other/extra.jsonl": rows("extra")},
                "v1": {"train.jsonl": rows("older")},
            }
        ),
        "models/me/tiny": Repository(
            {"main": {path.name: path.read_bytes() for path in tiny_model.iterdir() if path.is_file()}}
        ),
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Serving", (Hub,), {"repositories": repositories}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield repositories, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def finetuner(hub: tuple[dict[str, Repository], str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """In a process of its own: huggingface_hub reads its variables once."""

    def run(*words: object, **variables: str) -> subprocess.CompletedProcess:
        env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")}
        env |= {"HF_ENDPOINT": hub[1], "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"} | variables
        env |= {"ACCELERATE_USE_CPU": "true", "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", "from finetuner.cli import main; main()", *map(str, words)]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)

    return run


def test_a_model_and_rows_are_named_by_their_places_on_the_hub(hub, finetuner, write_recipe, tmp_path):
    """Trained with the newest rows; the second time without the hub, from what was fetched."""
    keys = {"base_model": "me/tiny", "datasets": [{"path": "me/rows", "type": "alpaca", "split": "train[:10]"}]}
    recipe = write_recipe(**keys, max_steps=1)
    done = finetuner("train", recipe)
    assert done.returncode == 0, done.stderr
    assert "rows             10 to train on" in done.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
    again = finetuner("train", recipe, f"output_dir={tmp_path / 'again'}", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("entry", "word", "streaming"),
    [
        ({"revision": "v1"}, "older", False),
        ({"data_files": "other/extra.jsonl"}, "extra", True),
        ({"data_files": "train.jsonl", "revision": "v1", "ds_type": "json"}, "older", True),
    ],
)
def test_a_revision_and_the_files_of_a_dataset_can_be_chosen(
    entry, word, streaming, hub, finetuner, write_recipe, tiny_model
):
    keys = {"streaming": True, "max_steps": 1} if streaming else {}
    recipe = write_recipe(base_model=str(tiny_model), datasets=[{"path": "me/rows", "type": "alpaca"} | entry], **keys)
    done = finetuner("preview", recipe, "-n", "1")
    assert done.returncode == 0, done.stderr
    assert f"{word} is" in " ".join(done.stdout.split()), done.stdout


def test_what_the_hub_does_not_have_is_named(hub, finetuner, write_recipe, tiny_model):
    for entry in ({"path": "me/absent"}, {"path": "me/rows", "revision": "v9"}):
        recipe = write_recipe(base_model=str(tiny_model), datasets=[entry | {"type": "alpaca"}])
        done = finetuner("data", recipe)
        assert done.returncode == 2, done.stdout + done.stderr
        assert entry["path"] in done.stderr and "Traceback" not in done.stderr
