"""PreparedData once: documents on disk, in a folder whose name says all that they depend on.

    <dataset_prepared_path>/<key>/      train.* and held_out.* tokens, packs, dropped.jsonl; prepared.json
    <dataset_prepared_path>/<key>.lock  held by the process that prepares
    <dataset_prepared_path>/files/      digests of data files, so that an unchanged file is not read again
    <dataset_prepared_path>/fetched/    data files from an address

The folder is written aside and renamed, so that it is whole or not there. One process of each node prepares; the others
look for the folder, in no collective that could time out.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetuner.data.fetch import fetch, held, is_address
from finetuner.data.packing import Packs
from finetuner.data.prepare import prepare_documents
from finetuner.data.prepared_data import PreparedData, SourceShare, pack_documents, require_few_dropped
from finetuner.data.sources import TableSource, load_source
from finetuner.data.token_store_writer import map_store, store_facts
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection, DatasetEntry, PackingSection
from finetuner.storage.progress import ProgressReport, no_progress
from finetuner.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "prepared.json"
POLL_SECONDS = 0.3
SETTLED_NS = 100_000_000
# Keys that change nothing about the documents, or only whether they are used.
_NO_MATTER = {"dataset_prepared_path", "max_dropped_fraction"}


def prepare_once(
    section: DataSection,
    packing: PackingSection,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    world: World,
    report: ProgressReport = no_progress,
) -> PreparedData:
    """The documents of the recipe: prepared now and kept, or mapped from where an earlier start left them.

    The first rank of each node prepares, and the others wait for its folder. Safe for any number of processes at once.
    Raises DataError if a row is unusable, or the recipe's folder cannot be written to.
    """
    root = Path(section.dataset_prepared_path)
    stamps = _stamps(section)  # before the files are read for the key
    try:
        (root / "files").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write to '{root}': {error.strerror}.\nName a folder that you may write to: "
            "dataset_prepared_path=..."
        ) from error
    folder = root / cache_key(section, packing, tokenizer, seed)
    while not (folder / MARK).exists():
        if world.local_rank == 0:
            with _lock(root / f"{folder.name}.lock") as is_ours:
                if is_ours and not (folder / MARK).exists():
                    _write(folder, section, packing, tokenizer, seed, report, stamps)
                    break
        time.sleep(POLL_SECONDS)
    prepared = read_prepared(folder)
    require_few_dropped(prepared, section)
    return prepared


def prepared_already(
    section: DataSection, packing: PackingSection, tokenizer: "PreTrainedTokenizerBase", seed: int
) -> PreparedData | None:
    """What prepare_once left, or None if it would have to prepare anew."""
    root = Path(section.dataset_prepared_path)
    if not (root / "files").is_dir():
        return None
    folder = root / cache_key(section, packing, tokenizer, seed)
    return read_prepared(folder) if (folder / MARK).exists() else None


def cache_key(section: DataSection, packing: PackingSection, tokenizer: "PreTrainedTokenizerBase", seed: int) -> str:
    """Equal only if the same documents would come out."""
    facts = {
        "data": section.model_dump(mode="json", exclude=_NO_MATTER),
        "packing": [packing.sample_packing, packs_held_out(packing)],
        "seed": seed,
        "tokenizer": tokenizer_facts(tokenizer),
        "sources": [source_facts(entry, section) for entry in (*section.datasets, *section.test_datasets)],
        "code": _code_facts(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def packs_held_out(packing: PackingSection) -> bool:
    chosen = packing.eval_sample_packing
    return packing.sample_packing if chosen is None else chosen


def read_prepared(folder: Path) -> PreparedData:
    """Map a folder that prepare_once wrote."""
    facts = json.loads((folder / MARK).read_text(encoding="utf-8"))
    train, held_out = (map_store(folder, name, facts[name]) for name in ("train", "held_out"))

    def packs(name: str, store: Any) -> Packs | None:
        if name not in facts["packs"]:
            return None
        arrays = [np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("members", "starts")]
        capacity, parts = facts["packs"][name]
        return Packs(store, arrays[0], arrays[1], capacity, tuple(parts))

    return PreparedData(
        train,
        held_out,
        Counter(facts["counts"]),
        facts["num_rows"],
        tuple(SourceShare(*share) for share in facts["shares"]),
        packs("train", train),
        packs("held_out", held_out),
        folder / "dropped.jsonl",
    )


def _write(
    folder: Path,
    section: DataSection,
    packing: PackingSection,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    report: ProgressReport,
    stamps: list[Any],
) -> None:
    mine = f"{folder.name}.{platform.node()}"
    for left in folder.parent.glob(f"{mine}.*.tmp"):  # by a process that was killed: this one has the lock
        shutil.rmtree(left, ignore_errors=True)
    aside = folder.with_name(f"{mine}.{os.getpid()}.tmp")
    aside.mkdir()
    try:
        prepared = prepare_documents(section, tokenizer, seed, report, into=aside)
        prepared = pack_documents(
            prepared, section.sequence_len, train=packing.sample_packing, held_out=packs_held_out(packing)
        )
        facts: dict[str, Any] = {
            "train": store_facts(prepared.train),
            "held_out": store_facts(prepared.held_out),
            "counts": dict(prepared.counts),
            "num_rows": prepared.num_rows,
            "shares": prepared.shares,
            "packs": {},
        }
        for name, packs in (("train", prepared.train_packs), ("held_out", prepared.held_out_packs)):
            if packs is not None:
                np.save(aside / f"{name}.members.npy", packs.members)
                np.save(aside / f"{name}.starts.npy", packs.starts)
                facts["packs"][name] = [packs.capacity, packs.packs_per_group]
        (aside / MARK).write_text(json.dumps(facts), encoding="utf-8")
        if _stamps(section) != stamps:  # the name would speak of other bytes than were prepared
            raise DataError("a data file was written to while it was being prepared. Start again when it is whole.")
        shutil.rmtree(folder, ignore_errors=True)  # without its mark: of no use
        aside.rename(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise DataError(
            f"cannot write the prepared tokens to '{folder.parent}': {error.strerror}.\n"
            "Make room, or name a folder on another disk: dataset_prepared_path=..."
        ) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Whether this process has it; the kernel lets go of it when a process dies."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Equal only if a text becomes the same tokens."""
    return hashlib.sha256(json.dumps(tokenizer_facts(tokenizer), sort_keys=True).encode()).hexdigest()


def tokenizer_facts(tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    backend: Any = tokenizer.backend_tokenizer
    return [
        hashlib.sha256(backend.to_str().encode()).hexdigest(),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]


def _code_facts() -> list[str]:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    # not by importing `datasets`, which is most of what a start costs that finds its rows prepared
    return [digest.hexdigest(), *(_version(name) for name in ("datasets", "fastokens", "tokenizers", "transformers"))]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def source_facts(entry: DatasetEntry, section: DataSection) -> Any:
    """What the rows of an entry depend on: the bytes of its files, or the hub's and the network's files as they lie in
    the library's cache."""
    memo = Path(section.dataset_prepared_path) / "files"
    path = Path(entry.path).expanduser()
    if path.is_file():
        return _file_digest(path, memo)
    if path.is_dir():
        return [[str(p.relative_to(path)), _file_digest(p, memo)] for p in _files_at(path)]
    if is_address(entry.path):
        return [_file_digest(file, memo) for file in fetch(entry.path, memo.with_name("fetched"))]
    source = load_source(entry, memo.with_name("fetched"))
    assert isinstance(source, TableSource), "a hub dataset"
    files = [Path(file["filename"]) for file in source.rows.cache_files]
    return [[file.name, file.stat().st_size] for file in files] + [str(file.parent) for file in files]


def _files_at(path: Path) -> list[Path]:
    """The file, or those of the folder; none where nothing is on this disk."""
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return [path] if path.is_file() else []


def _stamps(section: DataSection) -> list[Any]:
    """What changes with every write to a data file on this disk."""
    entries = (*section.datasets, *section.test_datasets)
    return [_stamp(file) for entry in entries for file in _files_at(Path(entry.path).expanduser())]


def _stamp(path: Path) -> list[Any]:
    """Its path, size, times and place on disk. A copy may keep the time of the last edit, but not that of the
    copying."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _file_digest(path: Path, memo: Path) -> str:
    """sha256 of the file, remembered under its stamp, unless it was written to only now: the clock of files ticks in
    hundredths of a second, so the next write might leave the same stamp."""
    stamp = _stamp(path)
    note = memo / hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:32]
    if not note.exists():
        with held(note.with_name(f"{note.name}.lock")):  # ranks of a node need not all read it
            if not note.exists():
                is_settled = time.time_ns() - max(path.stat().st_ctime_ns, path.stat().st_mtime_ns) > SETTLED_NS
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if not is_settled or _stamp(path) != stamp:
                    return digest
                aside = note.with_name(f"{note.name}.{os.getpid()}.tmp")
                aside.write_text(digest, encoding="ascii")
                aside.replace(note)
    return note.read_text(encoding="ascii")
