"""What a user sees when something is wrong: one screen that says what to type, exit code 2, no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.places import ROOT
from support.processes import exit_of, run_command
from support.results import largest_difference, weights_of
from support.rows import alpaca_rows, write_rows

from finetuner import cli


def _unwritable(tmp_path: Path) -> str:
    (tmp_path / "file").write_text("in the way")
    return str(tmp_path / "file" / "out")  # a folder below a file: not even root may make it


MISTAKES = {
    "a misspelled key": ({"learning_rat": 1e-4}, "Did you mean 'learning_rate'?"),
    "text for a number": ({"learning_rate": "2e-4"}, "Write 2e-4 without quotes."),
    "a missing file": ({"datasets": [{"path": "nowhere.jsonl", "type": "alpaca"}]}, "there is no file 'nowhere.jsonl'"),
    "no rows per step": ({"micro_batch_size": 0}, "micro_batch_size is 0, but must be at least 1"),
    "a target that matches nothing": (
        {"adapter": "lora", "lora_target_modules": ["q_porj"]},
        "Did you mean 'q_proj'?\nIts linear layers are: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj",
    ),
    "fp16 on a CPU": ({"fp16": True}, "Write `fp16: false`"),
    "flash attention on a CPU": ({"attn_implementation": "flash_attention_2"}, "Write `attn_implementation: auto`"),
    "no chat template rows": ({"datasets": None}, "'datasets' is missing"),
}


@pytest.mark.parametrize("keys, hint", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_screen_that_says_what_to_type(keys, hint, write_recipe, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert exit_of("train", write_recipe(**keys)) == 2
    _assert_helpful(capsys.readouterr().err, hint)


def test_an_empty_dataset_and_a_missing_column_say_what_there_is(write_recipe, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert exit_of("train", write_recipe(datasets=[{"path": str(empty), "type": "alpaca"}])) == 2
    _assert_helpful(capsys.readouterr().err, "is empty (0 bytes)")
    other = write_rows(tmp_path / "other.jsonl", [{"question": "a", "answer": "b"}])
    assert exit_of("train", write_recipe(datasets=[{"path": str(other), "type": "alpaca"}])) == 2
    _assert_helpful(capsys.readouterr().err, "Its columns are: question, answer.")


def test_an_unwritable_output_folder_is_named(write_recipe, tmp_path, capsys):
    assert exit_of("train", write_recipe(output_dir=_unwritable(tmp_path))) == 2
    _assert_helpful(capsys.readouterr().err, "output_dir=...")


def _assert_helpful(message: str, hint: str) -> None:
    assert hint in message
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 24, "one screen"


@pytest.mark.slow
def test_the_same_from_the_shell_with_two_ranks_is_said_once(write_recipe):
    recipe = write_recipe(adapter="lora", lora_target_modules=["nothing"])
    alone = run_command("finetuner.train", recipe)
    assert alone.code == 2 and "Traceback" not in alone.text and "Its linear layers are" in alone.err
    two = run_command("finetuner.train", recipe, ranks=2, fresh=True)
    assert two.code != 0 and two.text.count("Its linear layers are") == 1


@pytest.mark.slow
def test_torchrun_with_one_rank_is_one_rank(write_recipe):
    done = run_command("finetuner.train", write_recipe(max_steps=1), ranks=1, fresh=True)
    assert done.code == 0 and "engine           one rank" in done.out, done.text


@pytest.mark.slow
def test_accelerate_launch_that_lost_its_ranks_is_an_error_and_several_ranks_run(write_recipe, tmp_path):
    """Without a GPU, `--num_processes 2` alone starts one process and says nothing."""
    env = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"}
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", "2"]
    command = ["-m", "finetuner.train", str(write_recipe(max_steps=1))]
    lost = subprocess.run([*launch, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert lost.returncode != 0 and "accelerate launch --multi_gpu --num_processes 2" in lost.stderr
    kept = subprocess.run(
        [*launch, "--multi_gpu", *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert kept.returncode == 0, kept.stderr
    assert "2 rows = 2 ranks x 1 micro-batch x 1 accumulation" in kept.stdout
    forked = run_command(*command[1:], f"output_dir={tmp_path / 'forked'}", ranks=2)
    assert forked.code == 0, forked.text
    same = largest_difference(weights_of(tmp_path / "out"), weights_of(tmp_path / "forked"))
    assert same == 0.0, "the ranks that other tests fork are those of a launcher, to the bit"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_of_the_table_has_its_module_and_help(name, capsys):
    assert exit_of(name, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Usage:" in shown and cli.COMMANDS[name] in shown


def test_an_unknown_command_names_the_nearest(capsys):
    assert exit_of("trian") == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_help_imports_no_command_and_a_wrong_recipe_is_said_before_torch_is_imported(write_recipe):
    recipe = write_recipe(nonsense=1)
    for words in (["--help"], ["train", recipe], ["merge", recipe], ["evaluate", recipe], ["preview", recipe]):
        code = (
            "import sys; from finetuner import cli\n"
            "try: cli.main(sys.argv[1:])\n"
            "except SystemExit: pass\n"
            "commands = [name for name in sys.modules if name.startswith('finetuner.commands.')]\n"
            "heavy = {'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules); assert not heavy, heavy\n"
            "assert not commands or '--help' not in sys.argv, commands"
        )
        done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert words == ["--help"] or "unknown key 'nonsense'" in done.stderr


def test_check_imports_nothing_heavy(write_recipe):
    """Which is what keeps it under half a second (measured in benchmarks/, not here)."""
    code = (
        "import sys; from finetuner import cli\n"
        "try: cli.main(['check', sys.argv[1]])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, write_recipe()], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "no mistakes" in done.stdout


def test_check_names_every_mistake_and_exits_with_2(write_recipe, capsys):
    assert exit_of("check", write_recipe(micro_batch_size=0, logging_steps="big", nonsense=1)) == 2
    error = capsys.readouterr().err
    assert "3 mistakes" in error
    assert exit_of("check", write_recipe(), "learning_rate=fast") == 2
    assert "<override 1>: learning_rate is the text 'fast', but must be a number." in capsys.readouterr().err


def test_overrides_reach_the_run(write_recipe, train, tmp_path):
    rows = train(write_recipe(max_steps=3, lr_scheduler="constant"), "learning_rate=5e-4", "max_steps=1")
    assert [row["learning_rate"] for row in rows] == [5e-4]


def test_merge_before_training_names_the_command(write_recipe, capsys):
    recipe = write_recipe(adapter="lora")
    assert exit_of("merge", recipe) == 2
    _assert_helpful(capsys.readouterr().err, f"accelerate launch -m finetuner.train {recipe}")


def test_train_and_merge_modules_are_the_commands(write_recipe):
    """`python -m finetuner.train` parses like `finetuner train`, and merge likewise."""
    for module in ("finetuner.train", "finetuner.merge"):
        done = run_command(module, write_recipe(nonsense=json.dumps(alpaca_rows(1))), fresh=True)
        assert done.code == 2 and "unknown key 'nonsense'" in done.err and "Traceback" not in done.err
