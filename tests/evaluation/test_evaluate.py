"""`finetuner evaluate`: the figures of base, adapter and merged model."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from support.places import ROOT
from support.rows import alpaca_rows, write_rows
from support.tiny import make_model

from finetuner.cli import main
from finetuner.commands.evaluate import evaluate
from finetuner.commands.merge import merge
from finetuner.errors import DataError, ModelError, RecipeError
from finetuner.evaluation.answer_scores import f1, normalized, score_answers
from finetuner.evaluation.benchmark_tasks import TaskScore, scores_of
from finetuner.objectives.text_score import TextScore, total


@pytest.mark.parametrize(
    ("answer", "reference", "wanted"),
    [
        ("the Eiffel Tower.", "Eiffel tower", 1.0),
        ("Denver Broncos", "the Denver Broncos of 2016", 2 * (2 / 2) * (2 / 4) / (2 / 2 + 2 / 4)),
        ("no", "yes", 0.0),
        ("", "", 1.0),
        ("the", "", 1.0),
        ("", "something", 0.0),
        ("blue blue", "blue", 2 / 3),
    ],
)
def test_overlap_is_squads(answer, reference, wanted):
    assert f1(answer, reference) == pytest.approx(wanted) == pytest.approx(f1(reference, answer))


def test_answers_are_the_same_but_for_case_punctuation_and_articles():
    assert normalized("  The  U.S. ‘a’ ") == "us ‘ ’"
    score = score_answers([("A cat.", "cat"), ("dog", "the cat")])
    assert (score.exact_match, score.f1, score.num_rows) == (0.5, 0.5, 2)


def test_bits_per_byte_is_the_loss_in_another_unit():
    both = total([TextScore(math.log(2) * 8, 4, 8), TextScore(math.log(2) * 8, 12, 8)])
    assert both.bits_per_byte == pytest.approx(1) and both.loss == pytest.approx(math.log(2))
    assert both.perplexity == pytest.approx(2)


@pytest.mark.slow
def test_the_loss_is_the_one_that_training_logged_and_merging_changes_nothing(
    write_recipe, train, tmp_path, tokenizer_folder, capsys
):
    base = make_model(tmp_path / "base", tokenizer_folder)
    rows = [{"instruction": f"What is {i} and {i}?", "input": "", "output": f"{2 * i}"} for i in range(24)]
    long = [{"instruction": "Count.", "input": "", "output": " ".join(map(str, range(20, 60 + i)))} for i in range(3)]
    files = [write_rows(tmp_path / "questions.jsonl", rows[18:]), write_rows(tmp_path / "texts.jsonl", long)]
    recipe = write_recipe(
        base_model=str(base),
        datasets=[{"path": str(write_rows(tmp_path / "train.jsonl", rows[:18])), "type": "alpaca"}],
        test_datasets=[{"path": str(path), "type": "alpaca"} for path in files],
        adapter="lora",
        lora_r=8,
        tokens=["<new>"],
        learning_rate=0.02,
        max_steps=4,
        eval_on_start=True,
        eval_steps=4,
    )
    logged = [row for row in train(recipe) if "eval_loss" in row]
    merge(str(recipe), ["verify=false"])
    capsys.readouterr()
    evaluate(str(tmp_path / "out" / "merged"), [], questions=4)
    shown = capsys.readouterr().out
    first, adapted, merged = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [one["model"] for one in (first, adapted, merged)] == ["base", "adapter", "merged"]
    assert first["loss"] == pytest.approx(logged[0]["eval_loss"], abs=1e-6)
    assert adapted["loss"] == pytest.approx(logged[-1]["eval_loss"], abs=1e-6)
    assert merged["loss"] == pytest.approx(adapted["loss"], abs=1e-5) and adapted["loss"] < first["loss"] - 0.02
    assert list(adapted["sources"]) == ["questions.jsonl", "texts.jsonl"]
    for name, one in adapted["sources"].items():
        assert one["loss"] == pytest.approx(logged[-1][f"eval_loss/{name}"], abs=1e-6)
    texts = sum(len(row["output"]) for row in long)
    assert adapted["sources"]["texts.jsonl"]["num_bytes"] == texts
    assert adapted["num_questions"] == 4 and 0 <= adapted["exact_match"] <= adapted["f1"] <= 1
    page = (tmp_path / "out" / "evaluation.md").read_text()
    _the_same_without_the_runs_folder(tmp_path, files, first, adapted, merged)
    assert page.strip() in shown and "| merged | texts.jsonl |" in page and "F1" in page


def _the_same_without_the_runs_folder(tmp_path, files, *wanted):
    """An adapter by itself, and a merged folder by itself, find what they were made of."""
    for what in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "alone").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "out" / what, tmp_path / "alone")
    shutil.copytree(tmp_path / "out" / "merged", tmp_path / "moved")
    data = [str(file) for file in files]
    keys = ["bf16=false", "sequence_len=256", f"dataset_prepared_path={tmp_path / 'prepared'}"]
    for target, count in (("alone", 2), ("moved", 3)):
        evaluate(str(tmp_path / target), keys, questions=0, data=data, type="alpaca", out=tmp_path / "results")
        found = json.loads((tmp_path / "results" / "evaluation.json").read_text())
        assert len(found) == count
        for one, other in zip(found, wanted, strict=False):
            assert one["model"] == other["model"]
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
            assert one["sources"]["texts.jsonl"]["num_bytes"] == other["sources"]["texts.jsonl"]["num_bytes"]


@pytest.mark.slow
def test_a_model_by_itself_is_measured_on_a_file_or_on_the_held_out_rows_of_a_recipe(
    write_recipe, tiny_model, tmp_path, capsys
):
    recipe = write_recipe(val_set_size=5)
    evaluate(str(recipe), [], questions=0, out=tmp_path / "of-run")
    evaluate(str(tiny_model), [], questions=0, recipe=str(recipe), out=tmp_path / "of-recipe")
    (base,), (alone,) = (json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("of-run", "of-recipe"))
    assert base | {"model": "model"} == alone and alone["num_tokens"] > 0
    rows = write_rows(tmp_path / "own.jsonl", alpaca_rows(3))
    keys = ["bf16=false", f"dataset_prepared_path={tmp_path / 'prepared'}"]
    evaluate(str(tiny_model), keys, questions=0, data=[str(rows)], type="alpaca", out=tmp_path / "of-file")
    (found,) = json.loads((tmp_path / "of-file" / "evaluation.json").read_text())
    assert list(found["sources"]) == ["own.jsonl"]
    assert "| model | all |" in capsys.readouterr().out
    for options, message in (
        ({"data": ["a.jsonl"]}, "needs --type beside it"),
        ({"data": ["a.jsonl"], "type": "alpaca"}, "there is no file 'a.jsonl'"),
        ({"data": ["a.jsonl"], "type": "alpaca", "recipe": "r.yml"}, "Remove one of the two"),
        ({"type": "alpaca"}, "Give --data FILE"),
    ):
        with pytest.raises(RecipeError, match=message):
            evaluate(str(tiny_model), [], **options)
    with pytest.raises(ModelError, match="holds no model"):
        evaluate(str(tmp_path), keys, data=[str(rows)], type="alpaca")


HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None


@pytest.mark.skipif(HAS_LM_EVAL, reason="lm-eval is there")
def test_without_lm_eval_tasks_name_the_command_that_installs_it(tiny_model, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(tiny_model), "--tasks", "hellaswag"])
    assert stopped.value.code == 2 and "pip install 'finetuner[eval]'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", str(tiny_model), "--limit", "3"])
    assert "Name some: --tasks" in capsys.readouterr().err


def test_figures_of_tasks_are_listed_by_task_metric_and_filter():
    found = {
        "results": {
            "b": {"alias": "b", "acc,none": 0.5, "acc_stderr,none": 0.1, "exact_match,strict": 1, "sample_len": 4},
            "a": {"alias": "a", "acc,none": 0.25, "acc_stderr,none": "N/A"},
        },
        "n-samples": {"b": {"original": 9, "effective": 4}},
        "group_subtasks": {"a": ["b"]},
    }
    assert scores_of(found, ["a", "b"]) == [
        TaskScore("a", "acc", 0.25, None, 4),
        TaskScore("b", "acc", 0.5, 0.1, 4),
        TaskScore("b", "exact_match (strict)", 1.0, None, 4),
    ]


def run_evaluate(*words: object) -> subprocess.CompletedProcess:
    """In a process of its own: libraries read their folders from the environment once."""
    command = [sys.executable, "-c", "from finetuner.cli import main; main()", "evaluate", *map(str, words)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


TASK = """
task: colors
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
@pytest.mark.skipif(not HAS_LM_EVAL, reason="needs lm-eval: pip install 'finetuner[eval]'")
def test_a_task_of_ones_own_is_run_by_lm_eval_on_every_model_without_a_network(
    write_recipe, train, tmp_path, monkeypatch
):
    """The right answer is always the second; a model that learned to say it is right, and one that did not is not."""
    rows = write_rows(tmp_path / "one.jsonl", [{"instruction": "Say it.", "input": "", "output": "blue"}] * 8)
    train(write_recipe(datasets=[{"path": str(rows), "type": "alpaca"}], max_steps=25, learning_rate=0.01))
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay it.\n\n### Response:"
    )
    asked = [{"question": prompt, "choices": ["the quick brown fox", "blue"], "answer": 1}] * 6
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "colors.yaml").write_text(TASK.format(rows=write_rows(tmp_path / "asked.jsonl", asked)))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    out = tmp_path / "out"
    words = ("--tasks", "colors", "--include-path", folder, "--limit", 4)
    done = run_evaluate(out, *words)
    assert done.returncode == 0, done.stderr
    base, trained = json.loads((out / "evaluation.json").read_text())
    assert (base["tasks"]["colors"]["num_rows"], trained["tasks"]["colors"]["acc"]) == (4, 1.0)
    assert "| colors | 4 | acc |" in (out / "evaluation.md").read_text()
    assert (tmp_path / "hf" / "datasets").is_dir(), "the data are where HF_HOME says"
    lost = run_evaluate(out, "--tasks", "colorz,arc_easy", "--include-path", folder)
    assert lost.returncode == 2 and "has no task 'colorz'" in lost.stderr and "colors" in lost.stderr
    away = run_evaluate(out, "--tasks", "arc_easy", "--limit", 1)
    assert away.returncode == 2 and "HF_HOME, HF_DATASETS_CACHE" in away.stderr and "Traceback" not in away.stderr


@pytest.mark.slow
def test_a_model_that_learned_the_answers_scores_full_marks(write_recipe, train, tmp_path):
    rows = write_rows(tmp_path / "one.jsonl", [{"instruction": "Say it.", "input": "", "output": "the quick fox"}] * 8)
    recipe = write_recipe(
        datasets=[{"path": str(rows), "type": "alpaca"}], val_set_size=2, max_steps=25, learning_rate=0.01
    )
    train(recipe)
    evaluate(str(recipe), [], questions=10)
    before, after = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (after["model"], after["exact_match"], after["f1"]) == ("trained", 1.0, 1.0)
    assert before["exact_match"] == 0 and before["bits_per_byte"] > after["bits_per_byte"]


def test_without_held_out_rows_or_a_recipe_it_says_what_to_write(write_recipe, tmp_path, capsys):
    with pytest.raises(DataError, match="val_set_size"):
        evaluate(str(write_recipe()), [])
    nowhere = tmp_path / "some" / "where"
    nowhere.mkdir(parents=True)
    with pytest.raises(RecipeError, match="--data FILE --type alpaca"):
        evaluate(str(nowhere), [])
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(nowhere)])
    assert stopped.value.code == 2
