"""Keys whose effect no other test is about: what changes in a run when they are set."""

import json
import shutil

import pytest
import torch
from support.results import largest_difference, weights_of
from support.rows import write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuner.data.chat_templates import choose_template
from finetuner.data.documents import TOO_SHORT
from finetuner.data.prepare import prepare_documents
from finetuner.errors import ModelError
from finetuner.models.compilation import compile_layers
from finetuner.models.load import load_model
from finetuner.recipe.sections import CompileSection, DataSection


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def data(path, kind="alpaca", **keys):
    return DataSection.model_validate({"datasets": [{"path": str(path), "type": kind}], "sequence_len": 512} | keys)


def test_documents_below_min_sample_len_are_dropped_and_counted(tokenizer, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "one"}, {"text": "many words in a row, and then some more"}])
    prepared = prepare_documents(data(rows, "completion", min_sample_len=8, max_dropped_fraction=1.0), tokenizer, 0)
    assert len(prepared.train) == 1
    assert sum(count for reason, count in prepared.counts.items() if TOO_SHORT in str(reason)) == 1
    assert len(prepare_documents(data(rows, "completion"), tokenizer, 0).train) == 2


TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}{% if loud %}!{% endif %}]{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant{% if loud %}!{% endif %}]{% endif %}"
)


def test_a_template_is_given_as_text_or_as_a_file_and_takes_the_values_it_asks_for(tokenizer, tmp_path):
    chats = [{"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]}]
    rows = write_rows(tmp_path / "chats.jsonl", chats)
    (tmp_path / "own.jinja").write_text(TEMPLATE)

    def text(**keys):
        section = data(rows, "chat_template", eot_tokens=["<|end|>"], **keys)
        tokenizer.chat_template = choose_template(section, None)
        ids, _ = prepare_documents(section, tokenizer, 0).train.document(0)
        return tokenizer.decode(ids).replace(" ", "")

    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    expected = "[user]Hm?<|end|>[assistant]Yes.<|end|>"
    assert expected in text(chat_template="jinja", chat_template_jinja=TEMPLATE)
    assert expected in text(chat_template="jinja", chat_template_jinja=str(tmp_path / "own.jinja"))
    loud = text(chat_template="jinja", chat_template_jinja=TEMPLATE, chat_template_kwargs={"loud": True})
    assert "[user!]Hm?<|end|>[assistant!]Yes.<|end|>" in loud


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_python_code_of_a_model_runs_only_where_the_recipe_trusts_it(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "own")
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    arguments = {"dtype": torch.float32, "attention": ("sdpa",)}
    with pytest.raises(ModelError):
        load_model(str(folder), trust_remote_code=False, **arguments)
    assert type(load_model(str(folder), trust_remote_code=True, **arguments)).__name__ == "OwnModel"


@pytest.mark.slow
def test_tf32_lets_matrix_products_be_rounded(write_recipe, train):
    before = torch.get_float32_matmul_precision()
    try:
        for wanted, expected in ((False, before), (True, "high")):
            train(write_recipe(tf32=wanted, max_steps=1, overwrite_output_dir=True))
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_mode_of_compiling_reaches_the_compiler(tiny_model, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: asked.append(how))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    compile_layers(model, CompileSection(torch_compile=True, torch_compile_mode="max-autotune-no-cudagraphs"))
    assert asked == [{"backend": "inductor", "mode": "max-autotune-no-cudagraphs"}] * len(model.model.layers)


@pytest.mark.slow
def test_a_second_start_reads_the_quantized_cache_and_trains_the_same(write_recipe, train, tmp_path):
    pytest.importorskip("bitsandbytes")
    keys = {"adapter": "qlora", "quantized_cache": True, "max_steps": 2}
    for name in ("first", "second"):
        train(write_recipe(f"{name}.yml", output_dir=str(tmp_path / name), **keys))
        (cached,) = (tmp_path / "prepared").rglob("*.safetensors")
        if name == "first":
            written = cached.stat().st_mtime_ns
    assert cached.stat().st_mtime_ns == written, "it was not written again"
    assert largest_difference(weights_of(tmp_path / "first"), weights_of(tmp_path / "second")) == 0.0
