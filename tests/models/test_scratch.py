"""From raw text to a model that other tools load: tokenizer, shape, random weights, training, result."""

import importlib.util
import json
import math
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from support.places import ROOT
from support.processes import run_command
from support.results import largest_difference, unfinished, weights_of
from support.rows import write_rows
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from finetuner.cli import main
from finetuner.commands.conversation import hold_conversation
from finetuner.commands.text_model import SamplingOptions
from finetuner.data.new_tokenizers import train_bpe, write_byte_tokenizer, write_char_tokenizer
from finetuner.data.token_bytes import token_bytes
from finetuner.data.tokenizer_source import resolve_tokenizer
from finetuner.errors import ModelError, PlanError, RecipeError
from finetuner.models.empty_model import meta_model
from finetuner.models.from_scratch import scratch_config
from finetuner.models.gpt import GPTForCausalLM
from finetuner.plan.run import Plan
from finetuner.recipe import load_recipe
from finetuner.recipe.sections import GPTSection
from finetuner.world import World

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n  Speak, speak. \U0001f642 déjà\tvu\r\n"
TINY = {"layers": 2, "heads": 4, "key_value_heads": 2, "width": 32, "context": 64}


class Words:
    """As much of a tokenizer as a shape asks for."""

    bos_token_id = eos_token_id = pad_token_id = 0

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    lines = [f"{i} and {i * i}: " + "the quick brown fox jumps over the lazy dog"[: 10 + i % 30] for i in range(120)]
    (tmp_path / "held_out.txt").write_text(TEXT * 4)
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(lines) + TEXT)
    return path


@pytest.fixture
def recipe(write_recipe, corpus):
    def write(**keys: object) -> Path:
        held_out = corpus.with_name("held_out.txt")
        values: dict[str, object] = {
            "base_model": "from-scratch",
            "model": TINY,
            "tokenizer": "char",
            "datasets": [{"path": str(corpus), "type": "completion", "sample_by": "document"}],
            "test_datasets": [{"path": str(held_out), "type": "completion", "sample_by": "document"}],
            "sequence_len": 64,
            "excess_length_strategy": "split",
            "micro_batch_size": 4,
            "max_steps": 6,
        }
        return write_recipe(**(values | keys))

    return write


@pytest.fixture
def write_rows_of(tmp_path):
    def write(rows) -> Path:
        return write_rows(tmp_path / f"rows{len(list(tmp_path.glob('rows*')))}.jsonl", list(rows))

    return write


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_a_text_comes_back_from_its_tokens_and_each_token_from_the_disk(kind, tmp_path):
    if kind == "byte":
        write_byte_tokenizer(tmp_path)
    elif kind == "char":
        write_char_tokenizer([TEXT, "xyz"], tmp_path)
    else:
        train_bpe([TEXT] * 3, 300, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.is_fast and tokenizer.eos_token_id not in ids
    if kind == "byte":
        assert ids == list(TEXT.encode()) and len(tokenizer) == 257
    elif kind == "char":
        assert len(ids) == len(TEXT) and len(tokenizer) == len(set(TEXT + "xyz")) + 2
        assert tokenizer("Q").input_ids == [tokenizer.unk_token_id]
    else:
        assert len(tokenizer) == 300 and len(ids) < len(TEXT.encode())
        assert tokenizer.decode(tokenizer("ünseen \U0001f9ea").input_ids) == "ünseen \U0001f9ea"


@pytest.mark.parametrize(
    ("preset", "vocabulary", "parameters"),
    [
        ("gpt2-small", 50_257, 124_439_808),  # as published
        ("gpt2-medium", 50_257, 354_823_168),
        ("gpt2-large", 50_257, 774_030_080),
        ("llama-1b", 128_256, 1_235_814_400),
        ("gpt-nano", 65, 803_968 + 65 * 128),
    ],
)
def test_presets_have_the_sizes_that_they_are_named_for(preset, vocabulary, parameters):
    model = meta_model(
        scratch_config(GPTSection(preset=preset), Words(vocabulary)), dtype=torch.float32, attention=("sdpa",)
    )
    assert model.num_parameters() == parameters


def test_a_key_beside_a_preset_stands_above_it_and_the_vocabulary_must_hold_the_tokens():
    config = scratch_config(GPTSection(preset="gpt2-small", layers=3, dropout=0.1, vocabulary=320), Words(300))
    assert (config.num_hidden_layers, config.hidden_size, config.dropout, config.vocab_size) == (3, 768, 0.1, 320)
    with pytest.raises(ModelError, match=r"vocabulary is 200, but the tokenizer has 300(.|\n)*vocabulary: 320"):
        scratch_config(GPTSection(preset="gpt2-small", vocabulary=200), Words(300))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": None}, "base_model: from-scratch needs a `model:` block"),
        ({"base_model": "a/b", "tokenizer": None}, "model describes a model from scratch"),
        ({"model": {"layers": 2, "heads": 4}}, "model has no width, context"),
        ({"model": TINY | {"width": 30}}, "width 30 cannot be divided among 4 heads.*such as 32"),
        ({"model": TINY | {"width": 36}}, "a head is 9 wide"),
        ({"model": TINY | {"key_value_heads": 3}}, "4 heads cannot share 3 key_value_heads"),
        ({"model": {"preset": "gpt2-small", "rope_theta": 5e5}}, "rope_theta has no effect with learned positions"),
        ({"model": {"preset": "gpt2-smal"}}, "Did you mean 'gpt2-small'"),
        ({"sequence_len": 65}, "sequence_len is 65, but the model has a context of 64"),
        ({"adapter": "lora"}, "nothing to adapt"),
        ({"tokenizer": None}, "brings no tokenizer"),
        ({"tokenizer": {"train": {"vocab_size": 100}}}, "vocab_size is 100, but must be at least 257"),
        ({"tokenizer": {"train": {"vocab_size": 300, "files": ["./no.txt"]}}}, "there is no file './no.txt'"),
        ({"base_model": "a/b", "model": None}, "a new tokenizer is for a model from scratch"),
        ({"datasets": [{"path": "a/b", "type": "alpaca"}]}, "must be plain text"),
        ({"streaming": True}, "a stream is not read before training. Write `tokenizer: byte`"),
        ({"datasets": [{"path": "a/b", "type": "completion", "sample_by": "document"}]}, "sample_by is for text files"),
    ],
)
def test_what_cannot_be_is_said(keys, message, recipe):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe(**keys))


def test_a_text_file_is_one_row_where_the_recipe_says_so(recipe, train, tmp_path, corpus):
    train(recipe(tokenizer="byte", max_steps=1))
    prepared = next(path for path in (tmp_path / "prepared").glob("*/prepared.json"))
    assert json.loads(prepared.read_text())["num_rows"] == 2  # a file to train on, and a held-out one
    begun = next((tmp_path / "prepared" / "tokenizers").glob("*/tokenizer.json")).parent
    from finetuner.data.cache import read_prepared

    store = read_prepared(prepared.parent).train
    tokens = [int(i) for row in range(len(store)) for i in store.document(row)[0]]
    tokenizer = AutoTokenizer.from_pretrained(begun)
    assert tokenizer.decode(tokens[:-1]) == corpus.read_bytes().decode() and tokens[-1] == tokenizer.eos_token_id


def test_a_run_from_scratch_resumes_bitwise_and_its_result_is_an_ordinary_llama(recipe, train, tmp_path):
    path = recipe(model=TINY | {"dropout": 0.1}, save_steps=3)
    whole = train(path)
    assert whole[-1]["eval_loss"] < whole[0]["loss"]
    out = unfinished(tmp_path / "out", tmp_path / "again", 3)
    shutil.rmtree(tmp_path / "prepared" / "scratch")  # where it began is not needed any more
    again = train(path, f"output_dir={out}", "resume_from_checkpoint=true")
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (whole, again)]
    assert losses[0] == losses[1]
    assert largest_difference(weights_of(tmp_path / "out"), weights_of(out)) == 0.0

    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    ours = GPTForCausalLM.from_pretrained(out / "checkpoints/step-00000006").eval()
    theirs = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(theirs).__name__ == "LlamaForCausalLM"
    ids = AutoTokenizer.from_pretrained(out)("the quick brown fox", return_tensors="pt").input_ids
    assert torch.allclose(ours(ids).logits, theirs(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("choices", "model_type", "note"),
    [
        ({"preset": "gpt2-small", "layers": 2, "heads": 2, "width": 16, "context": 64}, "gpt2", False),
        (TINY | {"norm": "layer"}, "finetuner_gpt", True),
    ],
    ids=["gpt2", "mixed"],
)
def test_the_best_weights_of_other_shapes_are_written_as_what_they_are(
    choices, model_type, note, recipe, train, tmp_path, capsys
):
    keys = {"load_best_model_at_end": True, "eval_steps": 1, "save_steps": 1, "max_steps": 3, "learning_rate": 0.05}
    rows = train(recipe(model=choices, **keys))
    out = tmp_path / "out"
    assert json.loads((out / "config.json").read_text())["model_type"] == model_type
    assert ("only finetuner reads it" in capsys.readouterr().out) == note
    losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    best = min(losses, key=losses.__getitem__)
    ours = GPTForCausalLM.from_pretrained(out / f"checkpoints/step-{best:08}").eval()
    written = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.arange(12)[None]
    assert torch.allclose(ours(ids).logits, written(ids).logits, atol=1e-5)


@pytest.mark.slow
def test_samples_are_shown_while_training_and_change_nothing(recipe, train, tmp_path, capsys):
    path = recipe(model=TINY | {"dropout": 0.1}, tokenizer="byte", max_steps=5)
    train(path)
    assert " writes: " not in capsys.readouterr().out
    train(path, f"output_dir={tmp_path / 'shown'}", "generate_samples=2", "generate_prompt=the quick")
    shown = capsys.readouterr().out
    assert shown.count(" writes: ") == 2 and "step 4 writes: the quick" in shown
    assert largest_difference(weights_of(tmp_path / "out"), weights_of(tmp_path / "shown")) == 0.0


def test_a_shape_that_does_not_fit_is_refused_before_its_weights_are_drawn(recipe, train, tmp_path):
    path = recipe(model={"layers": 64, "heads": 8, "width": 65536, "context": 64})
    with pytest.raises(PlanError, match=r"'from-scratch' does not fit(.|\n)*fewer layers"):
        train(path)
    assert not (tmp_path / "prepared" / "scratch").exists()


def test_a_seed_draws_the_weights_and_a_text_makes_the_tokenizer(recipe, corpus, tmp_path):
    def resolve(path):
        loaded = load_recipe(path)
        return resolve_tokenizer(loaded.tokenizer, loaded.data, World())

    path = recipe(tokenizer={"train": {"vocab_size": 280, "files": [str(corpus)]}})
    first = resolve(path)
    assert resolve(path) == first
    assert len(AutoTokenizer.from_pretrained(first)) == 280
    corpus.write_text("another text")
    assert resolve(path) != first


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "spaces"])
def test_the_bytes_of_its_tokens_are_the_bytes_of_a_text(kind, tmp_path):
    if kind == "spaces":  # as Llama 2's and Gemma's
        parts = {"▁sp": 0, "eak": 1, "▁": 2, "é": 3, "<0x0A>": 4, "<unk>": 5}
        tokenizer = Tokenizer(models.BPE(vocab=parts, merges=[], unk_token="<unk>", byte_fallback=True))
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
        assert token_bytes(fast) == (3, 3, 1, 2, 1, 0)
        return
    {"byte": write_byte_tokenizer, "char": partial(write_char_tokenizer, [TEXT]),
     "bpe": partial(train_bpe, [TEXT] * 3, 300)}[kind](tmp_path)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    sizes = token_bytes(tokenizer)
    assert sum(sizes[i] for i in tokenizer(TEXT).input_ids) == len(TEXT.encode())
    assert sizes[tokenizer.eos_token_id] == 0


def test_bits_per_byte_are_the_loss_in_bits_over_the_bytes_of_the_held_out_text(recipe, train, corpus):
    row = train(recipe(tokenizer="byte", max_steps=2))[-1]
    text = corpus.with_name("held_out.txt").read_bytes()
    firsts = -(-(len(text) + 1) // 64)  # of each row of 64 tokens the first is not predicted; end of text has no byte
    bits = row["eval_loss"] * (len(text) + 1 - firsts) / math.log(2)
    assert row["eval_bits_per_byte"] == pytest.approx(bits / (len(text) - firsts), rel=1e-6)
    assert 7 < row["eval_bits_per_byte"] < 9  # hardly trained: near log2(257)


@pytest.mark.parametrize(
    ("given", "tokens"), [("300M", 300_000_000), ("1.5B", 1_500_000_000), ("64k", 64_000), (4096, 4096)]
)
def test_a_budget_of_tokens_gives_the_steps(given, tokens, recipe):
    loaded = load_recipe(recipe(max_steps=None, max_tokens=given))
    assert loaded.schedule.max_tokens == tokens
    plan = Plan.from_recipe(loaded, World())
    schedule = plan.schedule(loaded, num_rows=100, num_tokens=6000)  # 60 a row, 4 rows a step
    assert schedule.total_steps == -(-tokens // 240)
    streamed = load_recipe(recipe(max_steps=None, max_tokens=given, streaming=True, tokenizer="byte"))
    assert plan.schedule(streamed, 0).total_steps == -(-tokens // 256)


def test_a_budget_that_is_none_is_refused(recipe):
    with pytest.raises(RecipeError, match="must be a number of tokens, such as 300M"):
        load_recipe(recipe(max_steps=None, max_tokens="much"))
    with pytest.raises(RecipeError, match="max_steps and max_tokens are both given"):
        load_recipe(recipe(max_tokens="1M"))


IN_PARTS = {"fsdp": ["full_shard", "auto_wrap"], "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}


def test_a_run_in_shards_resumes_bitwise_from_a_checkpoint_in_parts(recipe, train, tmp_path):
    path = recipe(model=TINY | {"dropout": 0.1}, save_steps=2, max_steps=4, **IN_PARTS)
    train(path)
    assert list((tmp_path / "out/checkpoints/step-00000002").glob("part-*")), "it is written in parts"
    out = unfinished(tmp_path / "out", tmp_path / "again", 2)
    train(path, f"output_dir={out}", "resume_from_checkpoint=true")
    assert largest_difference(weights_of(tmp_path / "out"), weights_of(out)) == 0.0


@pytest.mark.slow
def test_two_ranks_that_share_the_model_or_copy_it_train_it_as_one_rank_does(recipe, train, tmp_path):
    """The second launch goes on under DDP from where FSDP was after two of four steps."""
    keys = {"tokenizer": {"train": {"vocab_size": 300}}, "sample_packing": True, "max_steps": 4, "save_steps": 2}
    train(recipe(**keys), f"output_dir={tmp_path / 'one'}")
    two = recipe(**keys, micro_batch_size=2, dataset_prepared_path=str(tmp_path / "anew"))

    def launched(*words: str) -> dict:
        done = run_command("finetuner.train", two, *words, ranks=2)
        assert done.code == 0, done.text
        return weights_of(Path(words[0].removeprefix("output_dir=")))

    in_parts = [f"fsdp={json.dumps(IN_PARTS['fsdp'])}", f"fsdp_config={json.dumps(IN_PARTS['fsdp_config'])}"]
    shared = launched(f"output_dir={tmp_path / 'shared'}", *in_parts)
    assert largest_difference(weights_of(tmp_path / "one"), shared) < 2e-5
    copies = unfinished(tmp_path / "shared", tmp_path / "copies", 2)
    copied = launched(f"output_dir={copies}", "resume_from_checkpoint=true")
    assert largest_difference(copied, shared) < 2e-5


@pytest.mark.slow
def test_the_whole_life_of_a_model_by_the_examples(train, write_rows_of, tmp_path, capsys):
    """From scratch, text from it, LoRA on what was exported, and a conversation with the result."""
    functions = [f"def f{i}(x):\n    return x * {i}\n\n" for i in range(10)]
    texts = write_rows_of({"text": "".join(functions[i % 7 :] * 12)} for i in range(16))
    question = "Write the one-sentence docstring of this Python function."
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "Return it."}]
    chats = write_rows_of({"messages": turns} for _ in range(32))
    begun, tuned, prepared = tmp_path / "begun", tmp_path / "tuned", f"dataset_prepared_path={tmp_path / 'prepared'}"
    of_texts = [f"datasets.0.path={texts}", f"test_datasets.0.path={texts}", "bf16=false", prepared]
    smaller = ["model.layers=2", "model.width=48", "tokenizer.train.vocab_size=320", "max_tokens=100k"]
    rates = ["learning_rate=5e-3", "warmup_steps=5", "lr_scheduler_kwargs.num_decay_steps=10", "eval_strategy=no"]
    steps = ["eval_steps=null", "save_steps=null", "excess_length_strategy=split"]
    rows = train(ROOT / "examples/gpt_stdlib.yml", f"output_dir={begun}", *of_texts, *smaller, *rates, *steps)
    assert rows[-1]["loss"] < rows[0]["loss"] - 1

    arguments = ["generate", str(begun), "--prompt", "def ", "--max-new-tokens", "20", "--temperature", "0.5"]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0 and "def " in capsys.readouterr().out

    of_chats = [f"datasets.0.path={chats}", f"test_datasets.0.path={chats}", "bf16=false", prepared]
    recipe = ROOT / "examples/gpt_stdlib_lora.yml"
    ours = [f"base_model={begun}", f"output_dir={tuned}"]
    rows = train(recipe, *ours, *of_chats, "num_epochs=20", "learning_rate=1e-2", "eval_steps=1000")
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert losses[-1] < 0.1 < 3 < losses[0]
    capsys.readouterr()
    heard: list[str] = []
    hold_conversation(str(recipe), ours, "", SamplingOptions(20, 0.0, 1.0, 0), lambda: [question], heard.append, print)
    assert "".join(heard) == "Return it.\n"


def test_a_sample_that_is_cut_off_is_judged_without_the_statement_that_it_was_in():
    spec = importlib.util.spec_from_file_location("scratch_quality", ROOT / "benchmarks" / "scratch_quality.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    whole = "import os\n\n\ndef f(x):\n    if x:\n        return 1\n"
    cut = module.Sample(whole + "\n@cached\ndef g(y, z", ended=False)
    assert cut.judged == whole + "\n" and cut.is_python
    assert module.Sample(whole, ended=True).is_python
    assert not module.Sample(whole + "def g(y, z", ended=True).is_python
    assert not module.Sample("def f(x:\n    pass\nx = 1\nif x", ended=False).is_python
    assert not module.Sample("import o", ended=False).is_python, "nothing is left to judge"
    assert module.Sample("if a:\n    b()\nelse:\n    c(", ended=False).judged == ""
