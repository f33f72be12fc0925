"""Models for other tools: what was written is read back and computes the same."""

import json

import pytest
import torch
from support.tiny import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetuner.commands.export import export
from finetuner.errors import ModelError
from finetuner.export.gguf_source import SPLITS
from finetuner.export.ollama_modelfile import turns_of
from finetuner.models.gguf_header import read_gguf_header
from finetuner.models.gguf_import import import_gguf
from finetuner.models.load import load_model

gguf = pytest.importorskip("gguf", reason="needs the extra gguf: pip install 'finetuner[gguf]'")


def rounded(weight: torch.Tensor, form: str) -> torch.Tensor:
    """As the format says: q8_0 keeps 32 weights as whole numbers up to 127 and one scale in fp16."""
    if weight.ndim == 1:
        return weight
    if form == "f16":
        return weight.half().float()
    blocks = weight.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    steps = (blocks.abs() / scale + 0.5).floor() * blocks.sign()
    return (steps * scale.half().float()).reshape(weight.shape)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("form", ["f16", "q8_0"])
def test_gguf_holds_the_same_model_but_for_the_rounding_of_its_form(form, tied, tmp_path, tokenizer_folder, capsys):
    model = make_model(
        tmp_path / "model", tokenizer_folder, tied=tied, hidden_size=64, vocab_size=520, initializer_range=0.2
    )
    export(model, "gguf", form, tmp_path / "out")
    file = tmp_path / "out" / f"model-{form}.gguf"
    assert "verified, read back" in capsys.readouterr().out and list(file.parent.iterdir()) == [file]
    again = import_gguf(file, tmp_path / "again", "float32", report=lambda line: None)
    ids = torch.arange(3, 500, 7)[None]
    here, there = (AutoModelForCausalLM.from_pretrained(folder) for folder in (model, again))
    exact = here(input_ids=ids).logits
    with torch.no_grad():
        for parameter in here.parameters():
            parameter.copy_(rounded(parameter, form))
    found = there(input_ids=ids).logits
    torch.testing.assert_close(found, here(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert 1e-3 < (found - exact).abs().max() < 0.1 * exact.abs().max()
    here, there = (AutoTokenizer.from_pretrained(folder) for folder in (model, again))
    text = "<|im_start|>user\nNaïve  text, 10 times<|im_end|>"
    assert here(text)["input_ids"] == there(text)["input_ids"] and here.chat_template == there.chat_template
    header = read_gguf_header(file)
    assert header.values["tokenizer.ggml.pre"] == "gpt-2"
    assert header.values["tokenizer.ggml.eot_token_id"] == here.convert_tokens_to_ids("<|im_end|>")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.attn_q.weight"] == form.upper() and kinds["output_norm.weight"] == "F32"


def logits_of(folder) -> torch.Tensor:
    return load_model(str(folder), dtype=torch.float32, attention=("sdpa",))(
        input_ids=torch.arange(3, 500, 7)[None]
    ).logits


def make_qwen2(folder, tokenizer_folder):
    """With biases, and a tokenizer that composes and cuts text as Qwen's does."""
    from tokenizers import Regex, normalizers, pre_tokenizers
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    backend = tokenizer.backend_tokenizer
    pattern = next(pattern for pattern, name in SPLITS.items() if name == "qwen2")
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.normalizer = normalizers.NFC()
    tokenizer.save_pretrained(folder)
    return model


def make_gpt2(folder, tokenizer_folder, tied):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_inner": 160, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 80}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2, tie_word_embeddings=tied))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["f16", "q8_0"])
def test_a_qwen2_with_its_biases_and_its_tokenizer_is_read_back_the_same(form, tmp_path, tokenizer_folder):
    model = make_qwen2(tmp_path / "model", tokenizer_folder)
    export(tmp_path / "model", "gguf", form, tmp_path / "out")
    file = tmp_path / "out" / f"model-{form}.gguf"
    again = import_gguf(file, tmp_path / "again", "float32", report=lambda line: None)
    exact = logits_of(tmp_path / "model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(rounded(parameter, form))
    model.save_pretrained(tmp_path / "rounded")
    torch.testing.assert_close(logits_of(again), logits_of(tmp_path / "rounded"), rtol=1e-4, atol=1e-4)
    assert 1e-3 < (logits_of(again) - exact).abs().max() < 0.1 * exact.abs().max()
    header = read_gguf_header(file)
    assert (header.architecture, header.values["tokenizer.ggml.pre"]) == ("qwen2", "qwen2")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert kinds["blk.1.attn_k.bias"] == "F32" and kinds["blk.1.attn_k.weight"] == form.upper()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_llama_cpp_writes_the_same_text_with_the_file(kind, tmp_path, tokenizer_folder):
    llama_cpp = pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")
    folder = tmp_path / "model"
    if kind == "llama":
        make_model(folder, tokenizer_folder, hidden_size=64, initializer_range=0.3)
    elif kind == "qwen2":
        make_qwen2(folder, tokenizer_folder)
    else:
        make_gpt2(folder, tokenizer_folder, tied=True)
    export(folder, "gguf", "f16", tmp_path / "out")
    settings = llama_cpp.CommonParams()
    settings.model.path = str(tmp_path / "out" / "model-f16.gguf")
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.cpuparams.n_threads = 128, 1, False, 1
    settings.cache_type_k = settings.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    prompt = "Naïve  text,\n\twith 2  numbers: 10, 2026! It's the quick brown fox"
    wanted = {"prompt": prompt, "n_predict": 12, "temperature": 0, "ignore_eos": True}
    server = llama_cpp.Server(settings)
    answer = server.handle_completions(wanted)
    del server  # it has threads of its own
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(rounded(parameter, "f16"))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert answer["usage"]["prompt_tokens"] == ids.shape[1], "the text is cut alike"
    said = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)[0, ids.shape[1] :]
    assert answer["choices"][0]["text"] == tokenizer.decode(said)


def test_a_gpt_of_ours_that_is_a_llama_is_written_as_one(tmp_path, tokenizer_folder):
    from finetuner.models.gpt import GPTConfig, GPTForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
    kind = {"num_attention_heads": 4, "num_key_value_heads": 2, "norm": "rms", "activation": "swiglu"}
    for name, positions in (("model", "rotary"), ("other", "learned")):
        torch.manual_seed(0)
        config = GPTConfig(**shape, **kind, positions=positions, bias=False, initializer_range=0.2)
        GPTForCausalLM(config).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / name)
    export(tmp_path / "model", "gguf", "f16", tmp_path / "out")
    again = import_gguf(tmp_path / "out" / "model-f16.gguf", tmp_path / "again", "float32", report=lambda line: None)
    torch.testing.assert_close(logits_of(again), logits_of(tmp_path / "model"), rtol=2e-2, atol=2e-2)
    assert json.loads((again / "config.json").read_text())["model_type"] == "llama"
    with pytest.raises(ModelError, match="has no counterpart in other tools"):
        export(tmp_path / "other", "gguf", "f16", tmp_path / "out")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["f16", "q8_0"])
def test_a_gpt2_as_a_run_from_scratch_leaves_it_is_read_back_the_same(form, tied, tmp_path, tokenizer_folder):
    make_gpt2(tmp_path / "model", tokenizer_folder, tied)
    export(tmp_path / "model", "gguf", form, tmp_path / "out")
    again = import_gguf(
        tmp_path / "out" / f"model-{form}.gguf", tmp_path / "again", "float32", report=lambda line: None
    )
    exact, read = logits_of(tmp_path / "model").detach(), logits_of(again).detach()
    bound = {"f16": 0.01, "q8_0": 0.05}[form] * float(exact.abs().max())
    assert 0 < (read - exact).abs().max() < bound
    config = json.loads((again / "config.json").read_text())
    assert (config["model_type"], config["n_positions"], config["n_inner"]) == ("gpt2", 80, 160)


def test_what_gguf_would_change_is_refused_and_nothing_is_left(tmp_path, tokenizer_folder, tiny_model):
    model = make_model(tmp_path / "model", tokenizer_folder)
    config = json.loads((model / "config.json").read_text())
    cut = json.loads((model / "tokenizer.json").read_text())
    for file, settings, message in (
        ("config.json", config | {"model_type": "mistral"}, "model_type mistral"),
        ("config.json", config | {"attention_bias": True}, "biases"),
        ("tokenizer.json", cut | {"normalizer": {"type": "Lowercase"}}, "cuts text in a way"),
    ):
        before = (model / file).read_text()
        (model / file).write_text(json.dumps(settings))
        with pytest.raises(ModelError, match=message):
            export(model, "gguf", "f16", tmp_path / "out")
        (model / file).write_text(before)
    with pytest.raises(ModelError, match="f16, q8_0"):
        export(model, "gguf", "q2", tmp_path / "out")
    with pytest.raises(ModelError, match="gguf, ollama or vllm"):
        export(model, "onnx", "f16", tmp_path / "out")
    (model / "adapter_config.json").write_text("{}")
    for tool in ("gguf", "vllm"):
        with pytest.raises(ModelError, match="Merge it first"):
            export(model, tool, "f16", tmp_path / "out")
    assert not (tmp_path / "out").exists()


TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "with a beginning": "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content + "
    "'<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}",
    "a system turn of its own": "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "roles apart": "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n{% elif m.role == 'system' %}"
    "{{ m.content }}\n\n{% else %}A: {{ m.content }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_plain_chat_template_is_its_turns(name, tokenizer_folder):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATES[name]
    dialog = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2 + [
        {"role": "user", "content": "c"}
    ]
    turns = turns_of(tokenizer)
    for messages in (dialog, [{"role": "system", "content": "s"}, *dialog]):
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert turns.render(messages, asks=True) == wanted


def test_ollama_gets_the_file_its_template_and_where_to_stop(tmp_path, tokenizer_folder):
    model = make_model(tmp_path / "model", tokenizer_folder, hidden_size=64)
    export(model, "ollama", "q8_0", None)
    page = (model / "Modelfile").read_text()
    assert page.startswith("FROM ./model-q8_0.gguf\n") and (model / "model-q8_0.gguf").exists()
    assert '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ else if' in page
    assert page.endswith('<|im_start|>assistant\n"""\nPARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n')
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, match="llama-server --jinja"):
        turns_of(tokenizer)


def test_a_folder_that_vllm_can_serve_is_told_from_one_it_cannot(tmp_path, tokenizer_folder, capsys):
    model = make_model(tmp_path / "model", tokenizer_folder)
    export(model, "vllm", "f16", None)
    shown = capsys.readouterr().out
    assert f"serve it: vllm serve {model} --max-model-len 2048 --dtype float32" in shown and "chat template" in shown
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 4, "architectures": None}))
    with pytest.raises(ModelError, match=r"no architectures\n.*512 tokens, and the model rows for 4"):
        export(model, "vllm", "f16", None)
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        export(model, "vllm", "f16", None)
