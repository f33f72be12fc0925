"""Text from a model: each token drawn as the model says, and shown as it comes."""

from functools import partial

import pytest
import torch
from test_gpt import GPT2, IDS, make
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuner.cli import main
from finetuner.errors import ModelError
from finetuner.generate import Manner, generate
from finetuner.models.sampling import as_text, choose, sampled
from finetuner.models.vocabularies import write_byte_tokenizer

pytestmark = pytest.mark.slow

GREEDY = partial(choose, temperature=0, top_p=1.0, generator=torch.Generator())


@pytest.mark.parametrize("choices", [{}, GPT2], ids=["llama", "gpt2"])
def test_the_likeliest_tokens_are_those_of_transformers_and_a_text_may_outgrow_the_context(choices):
    model = make(tie_word_embeddings=False, **choices)  # for 40 tokens; a tied one says one token again and again
    prompt = IDS[0, :6].tolist()
    expected = model.generate(IDS[:1, :6], max_new_tokens=34, do_sample=False, pad_token_id=0)[0, 6:].tolist()
    found = list(sampled(model, prompt, count=100, choice=GREEDY, context=40))
    assert found[:34] == expected and len(found) == 100
    end = next(i for i in range(1, 34) if found[i] not in found[:i])
    assert list(sampled(model, prompt, count=100, choice=GREEDY, context=40, ends=[found[end]])) == found[:end]
    # where it has grown over: the last half of the context, and nothing before it
    again = sampled(model, (prompt + found)[41 - 20 : 41], count=5, choice=GREEDY, context=40)
    assert list(again) == found[35:40]


def test_tokens_are_drawn_by_their_probability_and_only_the_likely_ones():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def drawn(temperature: float, top_p: float) -> list[float]:
        generator = torch.Generator().manual_seed(1)
        tokens = [choose(logits, temperature=temperature, top_p=top_p, generator=generator) for _ in range(4000)]
        return [tokens.count(i) / 4000 for i in range(4)]

    assert drawn(1.0, 1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert drawn(1.0, 0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert drawn(0.5, 1.0) == pytest.approx([x * x / 0.365 for x in (0.5, 0.3, 0.15, 0.05)], abs=0.03)
    assert drawn(1.0, 0.0) == drawn(0.0, 1.0) == [1, 0, 0, 0]


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(tmp_path):
    write_byte_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    prompt, rest = tokenizer("say ").input_ids, tokenizer("é \U0001f642!").input_ids
    shown = list(as_text(tokenizer, prompt, rest))
    assert [part for part in shown if part] == ["é", " ", "\U0001f642", "!"]


def test_a_recipe_speaks_with_its_adapter_and_a_seed_says_the_same_again(write_recipe, train, tmp_path, tiny_model):
    recipe = write_recipe(adapter="lora", max_steps=8, learning_rate=0.02, micro_batch_size=8)
    with pytest.raises(ModelError, match=r"nothing is trained in .*out yet"):
        generate(str(recipe), [], "a", Manner(4, 0.0, 1.0, 0), print)
    train(recipe)

    def text(source: object, temperature: float, seed: int = 0) -> str:
        parts: list[str] = []
        generate(str(source), [], "### Instruction:\na b", Manner(12, temperature, 1.0, seed), parts.append)
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
