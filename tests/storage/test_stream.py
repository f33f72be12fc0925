"""A model that is read tensor by tensor is the model that is read whole, in a fraction of its memory."""

import json
from pathlib import Path

import pytest
import torch
from support.processes import run_command
from support.tiny import make_model
from transformers import AutoModelForCausalLM

from finetuner.errors import ModelError
from finetuner.models.lazy_weights import lazy_model
from finetuner.models.load import load_model
from finetuner.models.quant_format import QuantFormat
from finetuner.models.quant_record import record_of

CPU = torch.device("cpu")
NF4 = QuantFormat("nf4", torch.bfloat16, double=True, compute_dtype=torch.bfloat16)


def streamed(folder: Path, form: QuantFormat | None = None, cache: Path | None = None, **keys):
    dtype = torch.float32 if form is None else form.dtype
    found = lazy_model(
        str(folder), dtype=dtype, attention=("sdpa",), quant_format=form, device=CPU, cache_folder=cache, **keys
    )
    assert found is not None
    model, weights = found
    weights.materialize_all(CPU)
    return model


def assert_same_model(ours, theirs) -> None:
    mine, expected = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], expected[name]) for name in mine)
    buffers = dict(theirs.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in ours.named_buffers())
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()


@pytest.mark.parametrize("form", [None, NF4, QuantFormat("fp4", torch.float32)], ids=["whole", "nf4", "fp4"])
@pytest.mark.parametrize("which", ["tiny_model", "tied_model"])
def test_streamed_is_loaded(form, which, request):
    folder = request.getfixturevalue(which)
    dtype = torch.float32 if form is None else form.dtype
    theirs = load_model(str(folder), dtype=dtype, attention=("sdpa",), quant_format=form)
    ours = streamed(folder, form)
    assert_same_model(ours, theirs)
    assert record_of(ours) == record_of(theirs)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (which == "tied_model")


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma2"])
def test_other_architectures_stream_or_are_loaded_whole(kind, tmp_path):
    from transformers import AutoConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {} if kind == "gpt2" else {"num_key_value_heads": 1, "intermediate_size": 48, "head_dim": 16}
    config = AutoConfig.for_model(kind, **sizes, **more)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    theirs = load_model(str(tmp_path), dtype=torch.float32, attention=("eager",))
    found = lazy_model(str(tmp_path), dtype=torch.float32, attention=("eager",), quant_format=None, device=CPU)
    assert found is not None
    found[1].materialize_all(CPU)
    assert_same_model(found[0], theirs)


def test_a_model_whose_files_name_other_tensors_is_not_streamed(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = {f"old.{name}": value for name, value in load_file(tiny_model / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    assert lazy_model(str(tmp_path), dtype=torch.float32, attention=("sdpa",), quant_format=None, device=CPU) is None


def test_the_second_start_reads_the_packed_bytes_and_an_edited_model_is_packed_anew(tokenizer_folder, tmp_path):
    folder, cache = make_model(tmp_path / "model", tokenizer_folder), tmp_path / "cache"
    first = streamed(folder, NF4, cache)
    assert len(list(cache.glob("*.safetensors"))) == 1
    assert not list(cache.glob("*.tmp")), "it has its name"
    read: list[tuple[int, int]] = []
    again = streamed(folder, NF4, cache, report=lambda done, total: read.append((done, total)))
    assert_same_model(again, first)
    assert read[-1][0] == read[-1][1] < 0.6 * (folder / "model.safetensors").stat().st_size

    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-3] ^= 0x40
    (folder / "model.safetensors").write_bytes(weights)
    streamed(folder, NF4, cache)
    assert len(list(cache.glob("*.safetensors"))) == 2


def test_a_cache_that_lost_its_end_is_written_anew(tiny_model, tmp_path):
    first = streamed(tiny_model, NF4, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert_same_model(streamed(tiny_model, NF4, tmp_path), first)
    assert file.read_bytes() == whole


def test_a_start_that_was_cut_short_leaves_nothing_that_is_used(tiny_model, tmp_path):
    found = lazy_model(
        str(tiny_model), dtype=NF4.dtype, attention=("sdpa",), quant_format=NF4, device=CPU, cache_folder=tmp_path
    )
    assert found is not None
    found[1].materialize([found[0].model.embed_tokens.weight], CPU)
    assert not list(tmp_path.glob("*.safetensors"))
    streamed(tiny_model, NF4, tmp_path)
    assert not list(tmp_path.glob("*.safetensors")), "the first has the lock, and the second leaves the file to it"
    cache = found[1].cache
    assert cache is not None and cache.file is not None
    cache.file.file.close()  # as when its process dies
    cache.lock.close()
    streamed(tiny_model, NF4, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 and not list(tmp_path.glob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_refused(tiny_model, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ModelError, match="cannot write the quantized model"):
        streamed(tiny_model, NF4, tmp_path / "cache")


@pytest.mark.slow
def test_ranks_load_their_parts_and_a_few_tensors_and_read_each_file_once(tiny_model, tokenizer_folder, tmp_path):
    if not Path("/proc/self/io").exists():
        pytest.skip("the system does not say what memory a process has and what it reads")
    folder = make_model(
        tmp_path, tokenizer_folder, dtype="bfloat16", hidden_size=512, intermediate_size=2048, num_hidden_layers=40
    )
    size = (folder / "model.safetensors").stat().st_size
    done = run_command("support.loading_worker", tiny_model, folder, ranks=2)
    assert done.code == 0, done.text
    main, other = json.loads(done.out.partition("RANKS ")[2])
    held = main["held"] + other["held"]
    assert size > 300e6 and held < 0.27 * size
    assert size <= main["read"] < 1.02 * size and other["read"] < 0.02 * size
    assert main["loading"] + other["loading"] < held + 0.15 * size
    assert main["trying"] + other["trying"] < 0.15 * size, "it keeps the layers that it has let go of"
