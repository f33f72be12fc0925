"""The output folder: the list of all that a run and the commands on its result leave in it, the lock that one run at a
time has, and room on its disk.

`OUTPUT_FILES` is the one list. What `overwrite_output_dir` deletes, what `push` uploads, where checkpoints are found
and README's table all read it; a file that is not in it is not ours and is never touched.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from finetuner.errors import CheckpointError
from finetuner.storage.disk_errors import explain_disk_errors
from finetuner.storage.locks import exclusive_lock

LOCK = ".lock"
METRICS = "metrics.jsonl"  # its presence says that a run wrote in the folder
CARD_MARK = "<!-- written by finetuner -->"


@dataclass(frozen=True)
class OutputFile:
    """One kind of file or folder in output_dir.

    In `names`, NAME stands for any text and five or more digits for any number. `is_ours` is asked before a path of
    that name is deleted.
    """

    names: tuple[str, ...]
    meaning: str
    writer: str  # the command
    is_uploaded: bool = False  # by `push` and `hub_model_id`
    is_deleted: bool = True  # by `overwrite_output_dir`
    is_ours: Callable[[Path], bool] = Path.exists

    def found_in(self, folder: Path) -> list[Path]:
        """Paths in `folder` that have one of the names."""
        found = []
        for name in self.names:
            parent, _, last = name.rpartition("/")
            if (folder / parent).is_dir():
                found += [path for path in (folder / parent).iterdir() if _is_named(path.name, last)]
        return found

    def has_name(self, path: str) -> bool:
        """Whether a path, relative to the folder, has one of the names."""
        return any(_is_named(path, name) for name in self.names)


def _is_named(name: str, pattern: str) -> bool:
    return re.fullmatch(re.sub(r"\d{5,}", r"\\d{5,}", re.escape(pattern)).replace("NAME", ".+"), name) is not None


def _has_card_mark(path: Path) -> bool:
    return path.is_file() and CARD_MARK in path.read_text(encoding="utf-8", errors="replace")


def _has_only_events(path: Path) -> bool:
    return path.is_dir() and all(file.name.startswith("events.out.tfevents") for file in path.iterdir())


def _has_state(path: Path) -> bool:
    return (path / "state.json").exists()


def _has_merge_mark(path: Path) -> bool:
    return (path / "merge.json").exists()


def _is_our_export(path: Path) -> bool:
    """`finetuner export` names a file by its folder, that of the merged model by "merged"."""
    return path.name == "Modelfile" or path.name.rpartition("-")[0] in (path.parent.resolve().name, "merged")


ADAPTER = OutputFile(
    ("adapter_model.safetensors", "adapter_config.json", "quantization.json"),
    "the trained LoRA adapter, and with QLoRA how its base was quantized; `peft.PeftModel.from_pretrained` loads it "
    "(where the recipe adds tokens, after `resize_token_embeddings` on the base)",
    "train",
    is_uploaded=True,
    is_ours=Path.is_file,
)
MODEL = OutputFile(
    (
        "model.safetensors", "config.json", "generation_config.json", "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    ),
    "or, without `adapter: lora`, the trained model",
    "train",
    is_uploaded=True,
    is_ours=Path.is_file,
)  # fmt: skip
TOKENIZER = OutputFile(
    (
        "tokenizer.json", "chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
        "sentencepiece.bpe.model", "tekken.json",
    ),
    "the tokenizer as it was trained with",
    "train",
    is_uploaded=True,
    is_ours=Path.is_file,
)  # fmt: skip
CARD = OutputFile(
    ("README.md",),
    "the model card: base model, data, figures, recipe and versions. One of your own is left as it is",
    "train",
    is_uploaded=True,
    is_ours=_has_card_mark,
)
CHECKPOINT = OutputFile(
    ("checkpoints/step-00000100",),
    "weights, optimizer and position, each with a checksum; complete or absent, whenever the run is killed",
    "train",
    is_ours=_has_state,
)
OUTPUT_FILES = (
    ADAPTER,
    MODEL,
    TOKENIZER,
    CARD,
    OutputFile(
        (METRICS,),
        "one line per logged step: loss, learning rate, gradient norm, tokens, speed, memory; and evaluations",
        "train",
        is_ours=Path.is_file,
    ),
    OutputFile(
        ("recipe.yml",),
        "the recipe with every default written out; it is itself a valid recipe",
        "train",
        is_ours=Path.is_file,
    ),
    OutputFile(
        ("dropped.jsonl",),
        "with `streaming: true`, the rows that were not trained on as they are, and why",
        "train",
        is_ours=Path.is_file,
    ),
    CHECKPOINT,
    OutputFile(
        ("checkpoints/abandoned-step-00000100",),
        "checkpoints of later steps than the one a run was resumed from",
        "train",
        is_ours=_has_state,
    ),
    OutputFile(
        ("tensorboard",), "the figures of `metrics.jsonl` for TensorBoard", "train", is_ours=_has_only_events
    ),
    OutputFile(
        ("wandb",), "Weights & Biases' own files; runs that were offline are synced from there", "train",
        is_deleted=False,
    ),
    OutputFile(("merged",), "base and adapter in one model; upload it by itself", "merge", is_ours=_has_merge_mark),
    OutputFile(
        ("evaluation.json", "evaluation.md"),
        "scores of the base, the adapter and the merged model",
        "evaluate",
        is_uploaded=True,
        is_ours=Path.is_file,
    ),
    OutputFile(
        ("NAME-f16.gguf", "NAME-q8_0.gguf", "Modelfile"),
        "the model for llama.cpp, and how Ollama is to run it",
        "export",
        is_ours=_is_our_export,
    ),
    OutputFile((LOCK,), "locked by the run that writes here", "train", is_deleted=False),
    OutputFile(
        (
            "checkpoints/.step-00000100.tmp", "checkpoints/.step-00000100.old.tmp", "final.tmp",
            ".final.tmp.tmp", ".final.tmp.old.tmp", ".merged.tmp", ".merged.old.tmp",
            "metrics.jsonl.tmp", "dropped.jsonl.tmp", ".NAME.partial.gguf",
        ),
        "left half written by a kill; the next run or merge replaces it",
        "train, merge, export",
    ),
)  # fmt: skip


def as_markdown() -> str:
    """Return OUTPUT_FILES as the table in README.md."""
    lines = ["| file | what it is | written by | `push` sends it | `overwrite_output_dir` deletes it |"]
    lines.append("|---|---|---|---|---|")
    for kind in OUTPUT_FILES:
        shown = [f"`{name}`" for name in kind.names[: 3 if len(kind.names) <= 3 else 2]]
        names = ", ".join(shown + ["..."] * (len(shown) < len(kind.names)))
        uploaded, deleted = ("yes" if answer else "no" for answer in (kind.is_uploaded, kind.is_deleted))
        lines.append(f"| {names} | {kind.meaning} | {kind.writer} | {uploaded} | {deleted} |")
    return "\n".join(lines)


@contextmanager
def claimed(folder: Path, *, replaces: bool) -> Iterator[None]:
    """Lock the folder for the length of a run; nothing else in it is changed.

    Raises CheckpointError if it cannot be written to, if another run has it, if it has an earlier run's files and the
    recipe does not say that they may be replaced, or if it has a model that no run wrote.
    """
    with ExitStack() as stack:
        with explain_disk_errors(
            CheckpointError,
            f"cannot write to output_dir '{folder}'",
            "Name a folder that you may write to: output_dir=...",
        ):
            is_locked = stack.enter_context(exclusive_lock(folder / LOCK, wait=False))
        if not is_locked:
            raise CheckpointError(
                f"another run is writing to '{folder}' at this moment.\nName another folder: output_dir=..."
            )
        _require_replaceable(folder, replaces=replaces)
        yield


def _require_replaceable(folder: Path, *, replaces: bool) -> None:
    has_run = (folder / METRICS).exists()
    model = ADAPTER.found_in(folder) + MODEL.found_in(folder)
    if model and not has_run:
        raise CheckpointError(
            f"'{folder}' holds a model that no run wrote there ({model[0].name}).\nName another folder: output_dir=..."
        )
    if has_run and not replaces:
        raise CheckpointError(
            f"'{folder}' holds an earlier run. Write one of:\n"
            "  resume_from_checkpoint=true   to go on with it\n"
            "  output_dir=ANOTHER            to keep it and start again\n"
            "  overwrite_output_dir=true     to delete it and start again"
        )


def remove_run_files(folder: Path, keep: Path | None) -> None:
    """Delete what an earlier run left and OUTPUT_FILES says may go, but not `keep`, the recipe that is being run."""
    if not (folder / METRICS).exists():
        return
    kinds = [kind for kind in OUTPUT_FILES if kind.is_deleted]
    doomed = [path for kind in kinds for path in kind.found_in(folder) if kind.is_ours(path)]
    # metrics.jsonl last: without it, what a kill has left here would be taken for somebody else's.
    for path in sorted(doomed, key=lambda path: path.name == METRICS):
        if path.is_dir():
            shutil.rmtree(path)
        elif keep is None or path.resolve() != keep.resolve():
            path.unlink()


def require_space(folder: Path, checkpoint_bytes: int, count: int) -> None:
    """Raises CheckpointError unless the disk has room for `count` checkpoints. Those that are in the folder count as
    room, since they will be pruned."""
    present_bytes = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    free_bytes = shutil.disk_usage(folder).free
    needed_bytes = checkpoint_bytes * count - present_bytes
    if needed_bytes > free_bytes:
        raise CheckpointError(
            f"{count} checkpoints of {_size(checkpoint_bytes)} need {_size(needed_bytes)} more, and '{folder}' has "
            f"{_size(free_bytes)} free.\n"
            "Keep fewer (save_total_limit=1), make room, or name a folder on another disk: output_dir=..."
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
