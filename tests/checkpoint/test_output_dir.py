"""One list says what may lie in output_dir: what is deleted with a run, what is uploaded, and what the README shows."""

from pathlib import Path

import pytest
from support.places import ROOT

from finetuner.checkpoint.folder import STATE, checkpoint_folder, list_checkpoints
from finetuner.checkpoint.output_dir import (
    CARD_MARK,
    CHECKPOINT,
    MODEL,
    OUTPUT_FILES,
    TOKENIZER,
    as_markdown,
    remove_run_files,
)
from finetuner.data.dropped_rows import LISTED
from finetuner.evaluation.tables import RESULTS
from finetuner.export.gguf_export import FORMATS
from finetuner.export.hub import result_files
from finetuner.export.merge_writer import TOKENIZER_FILES
from finetuner.models.quant_record import RECORD


def kinds_of(path: Path, output_dir: Path) -> list:
    return [kind for kind in OUTPUT_FILES if path in kind.found_in(output_dir)]


def lay(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_the_readme_shows_the_list():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert as_markdown() in readme, f"write it again into README.md:\n{as_markdown()}"


def test_every_name_that_a_command_writes_is_in_the_list_once(tmp_path):
    files = [
        *RESULTS, *(f"out-{form}.gguf" for form in FORMATS), *TOKENIZER_FILES, RECORD, LISTED, "Modelfile",
        "metrics.jsonl", "recipe.yml", "README.md", ".lock", "adapter_model.safetensors", "adapter_config.json",
        "model.safetensors", "model-00003-of-00012.safetensors", "model.safetensors.index.json", "config.json",
        "generation_config.json", ".out-f16.gguf.partial.gguf",
    ]  # fmt: skip
    lay(tmp_path, *files)
    folders = [
        checkpoint_folder(tmp_path, 100), tmp_path / "checkpoints/abandoned-step-00000003", tmp_path / "merged",
        tmp_path / "tensorboard", tmp_path / "wandb", tmp_path / ".merged.tmp", tmp_path / "final.tmp",
        tmp_path / "checkpoints/.step-00000100.tmp", checkpoint_folder(tmp_path, 10**8),
    ]  # fmt: skip
    for folder in folders:
        folder.mkdir(parents=True)
    for path in [*(tmp_path / name for name in files), *folders]:
        assert len(kinds_of(path, tmp_path)) == 1, path
    for name in ("notes.txt", "model_mine.safetensors", "mine.gguf", "steps", "config.json.orig", "optimizer.pt"):
        lay(tmp_path, name)
        assert not kinds_of(tmp_path / name, tmp_path), name
    assert list_checkpoints(tmp_path) == [checkpoint_folder(tmp_path, step) for step in (100, 10**8)]


def test_what_is_uploaded_is_the_result_with_its_scores_and_no_place_of_this_machine(tmp_path):
    result = (
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "evaluation.json", "evaluation.md",
        "quantization.json", "tokenizer.json",
    )  # fmt: skip
    lay(tmp_path, *result, "metrics.jsonl", "recipe.yml", "merge.json", "out-q8_0.gguf", "Modelfile", "notes.txt")
    lay(tmp_path, STATE, "manifest.json", "stream.json", "optimizer.safetensors", "scaler.json")  # of a checkpoint
    assert result_files(tmp_path) == list(result)


def test_a_merged_model_is_uploaded_with_its_bases_names_of_files(tmp_path):
    lay(tmp_path, "weights-1.safetensors", "weights-2.safetensors", "config.json", "merge.json")
    index = '{"weight_map": {"a": "weights-1.safetensors", "b": "weights-2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert result_files(tmp_path) == [
        "config.json", "model.safetensors.index.json", "weights-1.safetensors", "weights-2.safetensors",
    ]  # fmt: skip


def test_a_run_that_replaces_another_leaves_nothing_of_the_model_it_replaces(tmp_path):
    """Else its scores, its chat template and its GGUF file would pass for the new model's, and be uploaded."""
    tmp_path = tmp_path / "out"
    mine = [
        "README.md",
        "notes.txt",
        "mine.gguf",
        "mine-q8_0.gguf",
        "merged/model.safetensors",
        "wandb/offline-run/run.wandb",
        ".lock",
    ]
    gone = [
        "metrics.jsonl", "evaluation.json", "evaluation.md", "out-f16.gguf", "merged-q8_0.gguf", "Modelfile",
        "chat_template.jinja", "generation_config.json", "model-00001-of-00002.safetensors", "config.json",
        "checkpoints/step-00000100/state.json", "final.tmp/config.json", "tensorboard/events.out.tfevents.1",
    ]  # fmt: skip
    lay(tmp_path, *mine, *gone)
    remove_run_files(tmp_path, keep=tmp_path / "recipe.yml")
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted(mine)
    lay(tmp_path, "metrics.jsonl", "merged/merge.json")
    (tmp_path / "README.md").write_text(f"{CARD_MARK}\n# out")
    remove_run_files(tmp_path, keep=tmp_path / "recipe.yml")
    assert not (tmp_path / "merged").exists() and not (tmp_path / "README.md").exists()


def test_a_kill_while_a_run_is_deleted_leaves_it_a_run_of_ours(tmp_path, monkeypatch):
    lay(tmp_path, "metrics.jsonl", "config.json", "model.safetensors", "evaluation.md")
    removed = []

    def recorded(path: Path) -> None:
        removed.append(path.name)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", recorded)
        remove_run_files(tmp_path, keep=tmp_path / "recipe.yml")
    assert removed[-1] == "metrics.jsonl" and len(removed) == 4


@pytest.mark.slow
def test_scores_of_a_model_that_is_replaced_are_not_those_of_the_new_one(write_recipe, train, tmp_path):
    recipe = write_recipe(max_steps=1)
    train(recipe)
    lay(tmp_path / "out", "evaluation.json", "evaluation.md", "out-q8_0.gguf", "Modelfile", "notes.txt")
    train(recipe, "overwrite_output_dir=true")
    assert not {"evaluation.json", "evaluation.md"} & set(result_files(tmp_path / "out"))
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {"evaluation.json", "evaluation.md", "out-q8_0.gguf", "Modelfile"} & left and "notes.txt" in left


@pytest.mark.slow
def test_all_that_a_run_leaves_is_in_the_list_and_the_best_adapter_brings_no_row_of_the_data(
    write_recipe, train, tmp_path
):
    """A stream's position in a checkpoint has token ids of training rows; it was copied with the best weights."""
    rows, others = tmp_path / "rows.txt", tmp_path / "others.txt"
    rows.write_text("a b c d e f g\n" * 200)
    others.write_text("o n m l k j i\n" * 4)  # training makes them less likely
    text = {"path": str(rows), "type": "completion"}
    out = tmp_path / "out"
    logged = train(
        write_recipe(
            datasets=[text], test_datasets=[text | {"path": str(others)}], streaming=True, sequence_len=32,
            streaming_multipack_buffer_size=8, adapter="lora", max_steps=40, save_steps=1, eval_steps=1,
            load_best_model_at_end=True, early_stopping_patience=2, save_total_limit=0, learning_rate=0.1,
        )
    )  # fmt: skip
    scores = {row["step"]: row["eval_loss"] for row in logged if "eval_loss" in row}
    best = min(scores, key=lambda step: scores[step])
    assert best != max(scores), "the result is copied from a checkpoint"
    assert (checkpoint_folder(out, best) / "stream.json").is_file()
    assert not [path.name for path in out.iterdir() if path.name != "checkpoints" and not kinds_of(path, out)]
    sent = result_files(out)
    assert "stream.json" not in sent and {"adapter_model.safetensors", "tokenizer.json"} <= set(sent)
    saved = (checkpoint_folder(out, best) / "adapter_model.safetensors").read_bytes()
    assert (out / "adapter_model.safetensors").read_bytes() == saved
    assert CHECKPOINT.found_in(out) and TOKENIZER.found_in(out) and not MODEL.found_in(out)
