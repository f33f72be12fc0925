"""`finetuner evaluate`: the figures of base, adapter and merged model."""

import json
import math

import pytest
from conftest import make_model, write_rows

from finetuner import commands
from finetuner.cli import main
from finetuner.errors import DataError, RecipeError
from finetuner.evaluate import evaluate
from finetuner.scores import TextScore, f1, normalised, score_answers, total

pytestmark = pytest.mark.slow


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
    assert normalised("  The  U.S. ‘a’ ") == "us ‘ ’"
    score = score_answers([("A cat.", "cat"), ("dog", "the cat")])
    assert (score.exact_match, score.f1, score.num_rows) == (0.5, 0.5, 2)


def test_bits_per_byte_is_the_loss_in_another_unit():
    both = total([TextScore(math.log(2) * 8, 4, 8), TextScore(math.log(2) * 8, 12, 8)])
    assert both.bits_per_byte == pytest.approx(1) and both.loss == pytest.approx(math.log(2))
    assert both.perplexity == pytest.approx(2)


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
    commands.merge(str(recipe), ["verify=false"])
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
    assert page.strip() in shown and "| merged | texts.jsonl |" in page and "F1" in page


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
        evaluate(str(write_recipe()), [], questions=0)
    nowhere = tmp_path / "some" / "where"
    nowhere.mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"no recipe\.yml"):
        evaluate(str(nowhere), [], questions=0)
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", str(nowhere)])
    assert stopped.value.code == 2
