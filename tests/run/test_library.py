"""The package as a library: the same runs, and the same files, from a recipe that is a value."""

import finetuner
from finetuner.recipe import load_recipe


def test_a_recipe_that_is_a_value_is_trained_and_written_beside_the_result(write_recipe, tmp_path):
    out = tmp_path / "out"
    file = write_recipe(adapter="lora", max_steps=1)
    result = finetuner.train(load_recipe(file))
    assert (result.folder, result.steps) == (out, 1)
    assert load_recipe(out / "recipe.yml") == load_recipe(file)
    assert finetuner.merge(load_recipe(out / "recipe.yml")).folder == out / "merged"

    changed = load_recipe(file, ["max_steps=2", "overwrite_output_dir=true"])
    assert finetuner.train(changed).steps == 2
    assert load_recipe(out / "recipe.yml") == changed, "not the recipe of the run that was replaced"


def test_the_copy_of_a_recipe_can_be_the_recipe_and_stays_as_it_is(write_recipe, tmp_path):
    finetuner.train(write_recipe(max_steps=1))
    copy = tmp_path / "out" / "recipe.yml"
    text = copy.read_text() + "overwrite_output_dir: true # mine\n"
    copy.write_text(text.replace("overwrite_output_dir: false", "", 1))
    before = copy.read_text()
    finetuner.train(copy)
    assert copy.read_text() == before


def test_a_file_of_another_tool_is_trained_with_its_notes(write_recipe, tmp_path, capsys):
    file = write_recipe(adapter="lora", max_steps=1)
    file.write_text(file.read_text() + "mean_resizing_embeddings: true\n")
    expected = [str(note) for note in finetuner.recipe.load(file).notes]
    finetuner.train(file)
    shown = capsys.readouterr().out
    assert expected and all(note.splitlines()[0] in shown for note in expected)
