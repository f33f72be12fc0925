"""A file or folder is complete or absent, whatever ends its writer; and one process builds what many want."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.places import ROOT

from finetuner.errors import DataError
from finetuner.storage.atomic import TASK, flush_folder, move_into, staged_file, staged_folder, staging_of
from finetuner.storage.build_once import build_once
from finetuner.storage.disk_errors import explain_disk_errors
from finetuner.storage.json_lines import append_rows, read_rows, replace_rows
from finetuner.storage.locks import exclusive_lock
from finetuner.storage.manifest import find_damage, seal_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_in(code: str, *arguments: object) -> None:
    """Run `code` in a process of its own until it prints, and kill it there."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGKILL)


def test_a_folder_is_replaced_as_one_and_follows_the_umask(tmp_path):
    folder = tmp_path / "a"
    for text in ("one", "two"):
        with staged_folder(folder) as staging:
            assert staging == staging_of(folder) and not names(staging)
            (staging / f"{text}.txt").write_text(text)
            (staging / f"{text}.txt").chmod(0o600)
            assert not (folder / f"{text}.txt").exists()
        assert names(tmp_path) == ["a"] and names(folder) == [f"{text}.txt"]
    (tmp_path / "probe").touch()
    assert (folder / "two.txt").stat().st_mode == (tmp_path / "probe").stat().st_mode


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt(), ValueError()])
def test_a_writer_that_fails_leaves_what_was_there_and_nothing_else(error, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old.txt").touch()
    (tmp_path / "b").write_text("old")
    with pytest.raises(type(error)), staged_folder(tmp_path / "a") as staging:
        (staging / "new.txt").touch()
        raise error
    with pytest.raises(type(error)), staged_file(tmp_path / "b") as staging:
        staging.write_text("ne")
        raise error
    assert names(tmp_path) == ["a", "b"] and names(tmp_path / "a") == ["old.txt"]
    assert (tmp_path / "b").read_text() == "old"


WRITE = """
import sys, time
from pathlib import Path
from finetuner.storage.atomic import staged_folder
with staged_folder(Path(sys.argv[1]), task=sys.argv[2] or None) as staging:
    (staging / "half").touch()
    print("here", flush=True)
    time.sleep(60)
"""


def test_a_kill_leaves_no_folder_and_the_next_writer_begins_with_an_empty_one(tmp_path):
    killed_in(WRITE, tmp_path / "a", "")
    assert names(tmp_path) == [".a.tmp"]
    with staged_folder(tmp_path / "a") as staging:
        assert not names(staging)


def test_a_killed_task_is_resumed_by_the_same_task_alone(tmp_path):
    killed_in(WRITE, tmp_path / "a", "task 1")
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "a", task="task 1") as staging:
        assert names(staging) == ["half", TASK]
        (staging / "more").touch()
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="wrong"), staged_folder(tmp_path / "a", task="task 1") as staging:
        assert names(staging) == ["half", "more", TASK]
        raise ValueError("wrong")
    assert not staging.exists(), "a mistake is not resumed"
    killed_in(WRITE, tmp_path / "a", "task 1")
    with staged_folder(tmp_path / "a", task="task 2") as staging:
        assert names(staging) == [TASK]
    assert names(tmp_path) == ["a"] and not names(tmp_path / "a")


def test_the_last_of_the_files_that_are_moved_says_that_all_are_there(tmp_path, monkeypatch):
    source, folder = tmp_path / "source", tmp_path / "folder"
    for place, text in ((folder, "old"), (source, "new")):
        (place / "templates").mkdir(parents=True)
        for name in ("a", "config.json", "z", "templates/t"):
            (place / name).write_text(text)
    (folder / "notes").touch()
    moved = []
    replace = Path.replace

    def recorded(path: Path, target: Path) -> Path:
        moved.append((path.name, (folder / "config.json").exists()))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", recorded)
    move_into(source, folder, last="config.json")
    assert [name for name, _ in moved][-1] == "config.json" and not any(is_there for _, is_there in moved)
    assert names(folder) == ["a", "config.json", "notes", "templates", "z"] and not names(source)
    assert {(folder / name).read_text() for name in ("a", "config.json", "z", "templates/t")} == {"new"}


HOLD = """
import sys, time
from pathlib import Path
from finetuner.storage.locks import exclusive_lock
with exclusive_lock(Path(sys.argv[1])):
    print("here", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_one_process_at_a_time_and_the_kernel_releases_that_of_a_dead_one(tmp_path):
    path = tmp_path / "new" / ".lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"here\n"
        with exclusive_lock(path, wait=False) as is_ours:
            assert not is_ours
        started = time.monotonic()
        threading.Timer(0.3, process.kill).start()
        with exclusive_lock(path) as is_ours:
            assert is_ours and time.monotonic() - started > 0.25
    with exclusive_lock(path, wait=False) as is_ours:
        assert is_ours and path.exists()


BUILD = """
import sys, time
from pathlib import Path
from finetuner.storage.build_once import build_once
def fill(staging):
    (staging / "half").touch()
    print("here", flush=True)
    time.sleep(60)
build_once(Path(sys.argv[1]), fill, is_builder=True)
"""


def test_one_builds_and_all_others_and_all_later_ones_use_it(tmp_path):
    folder = tmp_path / "prepared" / "key"
    killed_in(BUILD, folder)
    assert [name for name in names(folder.parent) if name.endswith(".tmp")], "left by the kill"
    filled = []

    def fill(staging: Path) -> None:
        filled.append(staging)
        time.sleep(0.1)
        (staging / "mark").touch()

    def ask(is_builder: bool) -> None:
        assert build_once(folder, fill, is_builder=is_builder, mark="mark") == folder
        assert names(folder) == ["mark"]

    threads = [threading.Thread(target=ask, args=(builds,)) for builds in (True, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    ask(True)
    assert len(filled) == 1
    assert names(folder.parent) == ["key", "key.lock"], "nothing is left of the one that was killed"
    (folder / "mark").unlink()  # a folder without its mark is built again
    ask(True)
    assert len(filled) == 2


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fill(staging: Path) -> None:
        (staging / "half").touch()
        raise DataError("a row is wrong")

    with pytest.raises(DataError, match="a row is wrong"):
        build_once(tmp_path / "key", fill, is_builder=True)
    assert names(tmp_path) == ["key.lock"]


def test_a_file_system_that_cannot_flush_a_folder_is_no_reason_to_fail(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _refusing(errno.EINVAL))
        flush_folder(tmp_path)
        patch.setattr(os, "fsync", _refusing(errno.EIO))
        with pytest.raises(OSError, match="Input/output error"):
            flush_folder(tmp_path)


def _refusing(number: int):
    def fsync(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    return fsync


def test_a_manifest_finds_a_changed_a_short_and_a_missing_file(tmp_path):
    for name, text in (("a", "abc"), ("b/c", "defg")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert find_damage(tmp_path) == "manifest.json cannot be read (FileNotFoundError)"
    seal_folder(tmp_path)
    assert find_damage(tmp_path) is None
    for change, damage in (("abd", "a is not what was written"), ("ab", "a has 2 of 3 bytes")):
        (tmp_path / "a").write_text(change)
        assert find_damage(tmp_path) == damage
    (tmp_path / "a").unlink()
    assert find_damage(tmp_path) == "a is missing"
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    assert find_damage(tmp_path) == "it has format 2, this version reads 1"


def test_rows_of_a_file_outlive_a_last_line_that_was_cut_short(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    replace_rows(path, [{"a": 1}])
    append_rows(path, [{"a": 0.1}, {"b": "é\u2028"}])
    with path.open("a") as file:
        file.write('{"a": 1')
    assert read_rows(path) == [{"a": 1}, {"a": 0.1}, {"b": "é\u2028"}]
    replace_rows(path, read_rows(path)[1:])
    assert names(tmp_path) == ["rows.jsonl"] and len(read_rows(path)) == 2


def test_an_error_of_the_disk_becomes_ours_with_what_to_type_and_others_stay():
    with (
        pytest.raises(DataError, match=r"^cannot write 'x': No space left on device\.\nMake room\.$"),
        explain_disk_errors(DataError, "cannot write 'x'", "Make room."),
    ):
        raise OSError(28, os.strerror(28))
    with pytest.raises(ValueError, match="y"), explain_disk_errors(DataError, "cannot write 'x'", "Make room."):
        raise ValueError("y")
