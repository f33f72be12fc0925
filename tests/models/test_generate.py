"""Text from a model: each token drawn as the model says, and shown as it comes."""

import shutil
from functools import partial

import pytest
import torch
from support.gpt import GPT2, IDS, make
from support.processes import run_command
from support.rows import write_rows
from support.tiny import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuner.cli import main
from finetuner.commands.conversation import hold_conversation
from finetuner.commands.generate import generate_text
from finetuner.commands.text_model import SamplingOptions
from finetuner.data.new_tokenizers import write_byte_tokenizer
from finetuner.errors import ModelError
from finetuner.models.generation import draw_token, generate_tokens, stream_text

GREEDY = partial(draw_token, temperature=0, top_p=1.0, generator=torch.Generator())


@pytest.mark.parametrize("choices", [{}, GPT2], ids=["llama", "gpt2"])
def test_the_likeliest_tokens_are_those_of_transformers_and_a_text_may_outgrow_the_context(choices):
    model = make(tie_word_embeddings=False, **choices)  # for 40 tokens; a tied one says one token again and again
    prompt = IDS[0, :6].tolist()
    expected = model.generate(IDS[:1, :6], max_new_tokens=34, do_sample=False, pad_token_id=0)[0, 6:].tolist()
    found = list(generate_tokens(model, prompt, count=100, choice=GREEDY, context=40))
    assert found[:34] == expected and len(found) == 100
    end = next(i for i in range(1, 34) if found[i] not in found[:i])
    assert list(generate_tokens(model, prompt, count=100, choice=GREEDY, context=40, stops=[found[end]])) == found[:end]
    # where it has grown over: the last half of the context, and nothing before it
    again = generate_tokens(model, (prompt + found)[41 - 20 : 41], count=5, choice=GREEDY, context=40)
    assert list(again) == found[35:40]


@pytest.mark.slow
def test_tokens_are_drawn_by_their_probability_and_only_the_likely_ones():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def drawn(temperature: float, top_p: float) -> list[float]:
        generator = torch.Generator().manual_seed(1)
        tokens = [draw_token(logits, temperature=temperature, top_p=top_p, generator=generator) for _ in range(4000)]
        return [tokens.count(i) / 4000 for i in range(4)]

    assert drawn(1.0, 1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert drawn(1.0, 0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert drawn(0.5, 1.0) == pytest.approx([x * x / 0.365 for x in (0.5, 0.3, 0.15, 0.05)], abs=0.03)
    assert drawn(1.0, 0.0) == drawn(0.0, 1.0) == [1, 0, 0, 0]


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(tmp_path):
    write_byte_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt, rest = tokenizer("say ").input_ids, tokenizer("é \U0001f642!").input_ids
    shown = list(stream_text(tokenizer, prompt, rest))
    assert [part for part in shown if part] == ["é", " ", "\U0001f642", "!"]


@pytest.mark.slow
def test_a_recipe_speaks_with_its_adapter_and_a_seed_says_the_same_again(write_recipe, train, tmp_path, tiny_model):
    recipe = write_recipe(adapter="lora", max_steps=8, learning_rate=0.02, micro_batch_size=8)
    with pytest.raises(ModelError, match=r"nothing is trained in .*out yet"):
        generate_text(str(recipe), [], "a", SamplingOptions(4, 0.0, 1.0, 0), print)
    train(recipe)

    def text(source: object, temperature: float, seed: int = 0) -> str:
        parts: list[str] = []
        generate_text(
            str(source), [], "### Instruction:\na b", SamplingOptions(12, temperature, 1.0, seed), parts.append
        )
        return "".join(parts)

    from peft import PeftModel

    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer("### Instruction:\na b", return_tensors="pt")
    expected = adapted.generate(**ids, max_new_tokens=12, do_sample=False)
    assert text(recipe, 0.0) == tokenizer.decode(expected[0], skip_special_tokens=True) + "\n"
    assert text(tmp_path / "out", 0.0) == text(recipe, 0.0) != text(tiny_model, 0.0)
    assert text(recipe, 1.0, 1) == text(recipe, 1.0, 1) != text(recipe, 1.0, 2)


def test_the_commands_make_a_tokenizer_and_write_text(write_recipe, tiny_model, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be or not to be " * 40)
    recipe = write_recipe(
        base_model="from-scratch", model={"preset": "gpt-nano"}, tokenizer={"train": {"vocab_size": 260}},
        datasets=[{"path": str(tmp_path / "text.txt"), "type": "completion"}],
    )  # fmt: skip
    with pytest.raises(SystemExit) as done:
        main(["tokenizer", str(recipe)])
    shown = capsys.readouterr().out
    assert done.value.code == 0 and "260 tokens" in shown
    assert "bytes per token  " in shown and "tokens per word  " in shown and "760 bytes" in shown
    with pytest.raises(SystemExit) as done:
        main(["generate", str(tiny_model), "--prompt", "to be", "--max-new-tokens", "3", "--temperature", "0"])
    assert done.value.code == 0 and capsys.readouterr().out.startswith("to be")


@pytest.fixture
def talk(tiny_model, capsys):
    """talk(lines, source, context=...) -> (what the model wrote, what was said about it)."""

    def talk(*lines: str, source: object = None, system: str = "", count: int = 6, write=None) -> tuple[str, list[str]]:
        parts: list[str] = []
        said: list[str] = []
        options = SamplingOptions(count, 1.0, 1.0, 3)
        hold_conversation(
            str(source or tiny_model), [], system, options, lambda: lines, write or parts.append, said.append
        )
        return "".join(parts), said

    return talk


def test_a_conversation_is_remembered_until_it_is_reset(talk, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    generator, turns, expected = torch.Generator().manual_seed(3), [{"role": "system", "content": "Be brief."}], ""
    for question in ("hello there", "and again"):
        turns.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
        choice = partial(draw_token, temperature=1.0, top_p=1.0, generator=generator)
        ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
        ids = list(generate_tokens(model, prompt, count=6, choice=choice, stops=ends))
        turns.append({"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)})
        expected += turns[-1]["content"] + "\n"
    wrote, said = talk("hello there", "  ", "and again", "/quit", "never", system="Be brief.")
    assert wrote == expected and len(said) == 1
    assert talk("/system Be brief.", "hello there", "and again")[0] == expected
    assert talk("hello there", "and again")[0] != expected  # the instruction counts
    # after a reset the first answer does not depend on what was said before it
    alone, first = talk("hello there", count=1)[0], talk("unlike", "/reset", "hello there", count=1)
    assert "(the conversation begins again)" in first[1] and "unlike" not in alone
    wrote, said = talk("/rest", "/system", "hello there")
    assert "there is no command '/rest'" in said[1] and "without instruction" in said[2] and wrote.endswith("\n")


def test_what_the_context_has_no_room_for_is_forgotten_and_said(talk, tmp_path, tokenizer_folder):
    small = make_model(tmp_path / "small", tokenizer_folder, max_position_embeddings=64)
    question = "a quick brown fox"
    wrote, said = talk(*[question] * 6, source=small, count=8)
    assert len(wrote.splitlines()) >= 6
    assert "(the context of 64 tokens is full: the oldest question and its answer are forgotten)" in said
    wrote, said = talk("fox " * 80, question, source=small, count=8)
    assert "the model has a context of 64, of which 8 are for the answer. Say it shorter" in said[1]
    assert wrote.count("\n") >= 1  # the next question is answered


def test_ctrl_c_ends_an_answer_and_not_the_conversation(talk):
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 2:
            raise KeyboardInterrupt

    _, said = talk("hello", "again", write=write)
    assert said[1] == "(stopped)" and written[2] == "\n" and len(written) > 4


def test_a_model_without_turns_is_said(talk, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"has no chat template(.|\n)*finetuner generate .*plain --prompt"):
        talk("hello", source=tmp_path / "plain")


@pytest.mark.slow
def test_the_command_talks_with_the_adapter_of_a_recipe_through_a_pipe(write_recipe, train, tmp_path, tiny_model):
    chats = [{"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]}] * 8
    rows = [{"path": str(write_rows(tmp_path / "chats.jsonl", chats)), "type": "chat_template"}]
    keys = {"adapter": "lora", "lora_modules_to_save": ["embed_tokens", "lm_head"], "logging_steps": 100}
    recipe = write_recipe(datasets=rows, max_steps=100, learning_rate=0.02, micro_batch_size=8, **keys)
    train(recipe)
    done = run_command("finetuner.cli", "chat", recipe, "--temperature", "0", given="Hm?\n/quit\n")
    assert (done.code, done.out) == (0, "Yes.\n"), done.text
    assert "/reset forgets the conversation" in done.err and "Traceback" not in done.err
