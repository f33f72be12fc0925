"""Generation stops where the model's config, the tokenizer or the chat template says, in every command alike."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from finetuner.commands.generate import generate_text
from finetuner.commands.text_model import SamplingOptions
from finetuner.evaluation.question_answering import MAX_ANSWER_TOKENS, HeldOutQuestion, answer_questions
from finetuner.models.generation import sample_text
from finetuner.models.stop_tokens import stop_token_ids

PROMPT = "the quick brown"


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def always_writing(folder, token: int):
    """A model whose likeliest next token is `token`, whatever stands before it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 100.0  # the first feature stays positive up to the head
        model.model.norm.weight.zero_()[0] = 1.0
        model.lm_head.weight.zero_()[token, 0] = 100.0
    return model


@pytest.mark.parametrize("eos", [None, 7, [7, 9]])
def test_stop_tokens_are_those_of_the_config_the_tokenizer_and_the_template_each_once(eos, tokenizer):
    named = [] if eos is None else [7] if eos == 7 else [7, 9]
    end_of_text, end_of_turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=eos)) == [*named, end_of_text, end_of_turn]
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=end_of_turn)) == [end_of_turn, end_of_text]
    assert stop_token_ids(tokenizer) == [end_of_text, end_of_turn]
    tokenizer.chat_template = None
    assert stop_token_ids(tokenizer) == [end_of_text]


ROLE = "{{ '<|' ~ ('u' if message.role == 'user' else 'a') ~ '|>' }}{{ message.content }}"


@pytest.mark.parametrize(
    ("behind_answers", "end"),
    [
        pytest.param("", "<|u|>", id="the next question's token closes an answer"),
        pytest.param("{{ '<|e|>' if not loop.last }}", "<|e|>", id="only an answer that is not the last one is ended"),
        pytest.param("{{ '<|r|>' if loop.last else '<|e|>' }}", "<|r|>", id="the last answer has an end of its own"),
        pytest.param("{{ ' so.' }}", None, id="a word is no end"),
    ],
)
def test_a_token_that_stands_behind_answers_stops_them_also_if_it_begins_the_next_turn(behind_answers, end, tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|u|>", "<|a|>", "<|e|>", "<|r|>"]})
    answer = f"{{% if message.role == 'assistant' %}}{behind_answers}{{% endif %}}"
    tokenizer.chat_template = f"{{% for message in messages %}}{ROLE}{answer}{{% endfor %}}"
    ends = ["<|endoftext|>"] + ([] if end is None else [end])
    assert stop_token_ids(tokenizer) == tokenizer.convert_tokens_to_ids(ends)


def test_samples_in_training_and_the_generate_command_stop_at_the_end_of_a_turn(tiny_model, tokenizer, tmp_path):
    model = always_writing(tiny_model, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert sample_text(model, tokenizer, PROMPT, seed=1, count=20) == PROMPT and len(calls) == 1
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    parts: list[str] = []
    generate_text(str(tmp_path), [], PROMPT, SamplingOptions(20, 0.0, 1.0, 0), parts.append)
    assert parts == [PROMPT, "", "\n"], "a token that is not written would be an empty text of its own"


def test_answers_in_an_evaluation_stop_at_a_token_that_only_the_models_config_names(tiny_model, tokenizer):
    token = tokenizer("fox").input_ids[-1]
    model = always_writing(tiny_model, token).eval()
    question = HeldOutQuestion(np.array(tokenizer(PROMPT).input_ids, dtype=np.int32), "fox")

    def answer() -> str:
        ((said, _),) = answer_questions(model, tokenizer, [question], lambda done, total: None)
        return said

    assert len(tokenizer(answer()).input_ids) == MAX_ANSWER_TOKENS
    model.generation_config.eos_token_id = [token]
    assert answer() == tokenizer.decode([token])
