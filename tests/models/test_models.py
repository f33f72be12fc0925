"""The loss head, LoRA, new tokens and attention, on real tiny models."""

import pytest
import torch
from support.documents import FP32, documents
from support.tiny import make_model
from torch.nn import functional as F  # noqa: N812

from finetuner.data.batches import collate
from finetuner.data.token_store import IGNORE_INDEX, TokenStore
from finetuner.data.tokenizer import load_tokenizer
from finetuner.errors import ModelError
from finetuner.models.activation_checkpointing import recompute_activations
from finetuner.models.adapter import adapter_tensors, add_lora, read_adapter, write_adapter
from finetuner.models.attention import choose_attention
from finetuner.models.context_length import length_notes
from finetuner.models.embeddings import grow_embeddings
from finetuner.models.load import load_model
from finetuner.models.lora_targets import target_modules
from finetuner.models.trainable import train_in_fp32, trainable_parameters
from finetuner.objectives import logits as loss_module
from finetuner.objectives.logits import head_is_composable
from finetuner.objectives.loss_module import LossModule
from finetuner.objectives.next_token import NextToken
from finetuner.recipe.sections import AdapterSection, SpecialTokens, TokenizerSection
from finetuner.world import World


def reference_loss(model, store: TokenStore) -> torch.Tensor:
    """Row by row, without padding, over all logits."""
    total = torch.zeros(())
    for i in range(len(store)):
        ids, labels = (torch.tensor(part, dtype=torch.long) for part in store.document(i))
        logits = model(input_ids=ids[None]).logits[0, :-1].float()
        total = total + F.cross_entropy(logits, labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")
    return total


def tiny(kind: str):
    """Architectures whose logits are not simply head(hidden): capped, scaled, or with tied heads."""
    import transformers as tf

    common = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(3)
    return {
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**common, **heads)),
        "tied llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**common, **heads, tie_word_embeddings=True)),
        "gemma2": lambda: tf.Gemma2ForCausalLM(
            tf.Gemma2Config(**common, **heads, head_dim=8, final_logit_softcapping=0.5)
        ),
        "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**common, **heads, logit_scale=0.25, pad_token_id=0)),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4)),
    }[kind]().eval()  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "tied llama", "gemma2", "cohere", "gpt2"])
def test_token_loss_is_the_cross_entropy_of_the_models_own_logits(kind):
    model, store = tiny(kind), documents()
    head = LossModule(model, NextToken(), composed=head_is_composable(model)).eval()
    assert head.composed == (kind != "cohere"), "a head that scales its logits keeps its own forward"
    (loss,) = head(collate(store, [0, 1, 2]).tensors())
    torch.testing.assert_close(loss, reference_loss(model, store))


def test_chunked_loss_has_the_value_and_gradients_of_the_whole(monkeypatch):
    store = documents()
    results = []
    for chunk_bytes in (2**28, 4 * 512 * 3):  # all at once; three positions at a time
        monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk_bytes)
        model = tiny("llama")
        loss = LossModule(model, NextToken(), composed=True)(collate(store, [0, 1, 2]).tensors())
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0], results[1])


def test_a_batch_without_a_trained_token_gives_zero_and_zero_gradients():
    model = tiny("llama")
    loss = LossModule(model, NextToken(), composed=True)(collate(documents(), [-1]).tensors())
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_padding_does_not_reach_the_loss():
    model, store = tiny("llama"), documents()
    head = LossModule(model, NextToken(), composed=True)
    alone = sum(head(collate(store, [i]).tensors()) for i in range(3))
    torch.testing.assert_close(head(collate(store, [0, 1, 2]).tensors()), alone)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_adapter_gets_a_gradient_and_no_base_weight_does(tiny_model, checkpointing):
    model = load_model(str(tiny_model), **FP32)
    if checkpointing:
        recompute_activations(model)
    adapted = add_lora(model, AdapterSection(adapter="lora"), base_model="x", seed=1)
    adapted.train()
    LossModule(adapted, NextToken(), composed=True)(collate(documents(), [0, 1, 2]).tensors()).backward()
    grads = {name: p.grad for name, p in adapted.named_parameters()}
    matrices = [name for name in grads if "lora_B" in name]
    assert len(matrices) == 14, "seven linear layers in each of two blocks, not the head"
    assert all(grads[name] is not None and grads[name].any() for name in matrices)
    assert all(grad is None for name, grad in grads.items() if "lora_" not in name)


def test_adapters_are_the_same_on_every_rank_and_differ_by_seed(tiny_model):
    def fresh(seed: int) -> dict:
        return adapter_tensors(
            add_lora(load_model(str(tiny_model), **FP32), AdapterSection(adapter="lora"), base_model="x", seed=seed)
        )

    one, again, other = fresh(1), fresh(1), fresh(2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_adapter_files_hold_no_frozen_weight_and_load_in_peft(tiny_model, tmp_path):
    from peft import PeftModel

    adapted = add_lora(
        load_model(str(tiny_model), **FP32), AdapterSection(adapter="lora", lora_r=2), base_model="x", seed=1
    )
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    write_adapter(adapted, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 30_000
    loaded = PeftModel.from_pretrained(load_model(str(tiny_model), **FP32), str(tmp_path))
    ids = torch.arange(10)[None]
    torch.testing.assert_close(loaded(input_ids=ids).logits, adapted(input_ids=ids).logits)


def test_reading_an_adapter_of_another_shape_is_an_error(tiny_model, tmp_path):
    def lora(rank: int):
        return add_lora(
            load_model(str(tiny_model), **FP32), AdapterSection(adapter="lora", lora_r=rank), base_model="x", seed=1
        )

    write_adapter(lora(2), tmp_path)
    with pytest.raises(ModelError, match="not of this model and recipe"):
        read_adapter(lora(4), tmp_path)


def test_targets_by_name_reach_only_those_layers_and_an_unknown_one_lists_all(tiny_model):
    model = load_model(str(tiny_model), **FP32)
    with pytest.raises(ModelError, match="Did you mean 'v_proj'"):
        target_modules(model, ("v_prjo",))
    adapted = add_lora(model, AdapterSection(adapter="lora", lora_target_modules=("q_proj",)), base_model="x", seed=1)
    assert {name.split(".")[-4] for name in trainable_parameters(adapted)} == {"q_proj"}


def test_a_new_token_that_ends_turns_is_special(tiny_model):
    section = TokenizerSection(tokens=("<|eot|>", "<think>"))
    tokenizer = load_tokenizer(section, str(tiny_model), False, ends=("<|eot|>",)).tokenizer
    kinds = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    assert kinds["<|eot|>"] and not kinds["<think>"]
    ids = tokenizer("a<|eot|>", add_special_tokens=False)["input_ids"]
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|eot|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"
    words = tokenizer("a<|eot|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids[-1] not in words, "a row can say it without ending its turn"


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens_start_at_the_mean_and_are_trained_with_the_adapter(tied, tmp_path, tokenizer_folder):
    folder = make_model(tmp_path / "m", tokenizer_folder, tied=tied)
    section = TokenizerSection(special_tokens=SpecialTokens(pad_token="<pad>"), tokens=("<tool>",))
    vocabulary = load_tokenizer(section, str(folder), False)
    assert len(vocabulary.new_ids) == 2 and vocabulary.tokenizer.pad_token == "<pad>"
    model = load_model(str(folder), **FP32)
    before = model.get_input_embeddings().weight.detach().clone()
    assert grow_embeddings(model, len(vocabulary.tokenizer)) == 2
    after = model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(after[: len(before)], before)
    torch.testing.assert_close(after[-1], before.mean(dim=0))
    assert model.config.vocab_size == len(vocabulary.tokenizer)
    adapted = add_lora(model, AdapterSection(adapter="lora"), base_model="x", seed=1, new_token_ids=vocabulary.new_ids)
    train_in_fp32(adapted)
    rows = [name for name in trainable_parameters(adapted) if "trainable_tokens" in name]
    assert len(rows) == (1 if tied else 2), "a tied head follows the embedding"


def test_attention_is_chosen_at_run_time():
    cpu, gpu = World(), World(device="cuda", bf16=True)
    assert choose_attention("auto", cpu, "fp32") == ("sdpa", "eager")
    assert choose_attention("eager", cpu, "bf16") == ("eager",)
    assert choose_attention("auto", gpu, "fp32") == ("sdpa", "eager"), "flash attention has no fp32 kernels"
    with pytest.raises(ModelError, match="needs a GPU"):
        choose_attention("flash_attention_2", cpu, "bf16")


def test_flash_attention_is_taken_on_a_gpu_where_it_is_installed(tmp_path, monkeypatch):
    """The package cannot be built here; what is looked for is whether it can be imported."""
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    gpu = World(device="cuda", bf16=True)
    assert choose_attention("auto", gpu, "bf16") == ("sdpa", "eager")
    with pytest.raises(ModelError, match=r"finetuner\[flash\]"):
        choose_attention("flash_attention_2", gpu, "bf16")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert choose_attention("auto", gpu, "bf16") == ("flash_attention_2", "sdpa", "eager")


def test_pickled_weights_are_refused(tmp_path, tokenizer_folder):
    folder = make_model(tmp_path / "m", tokenizer_folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_model(str(folder), **FP32)


def test_weights_that_are_not_those_of_the_config_are_refused(tmp_path, tokenizer_folder):
    """transformers would train random numbers in their place, with a warning at most."""
    import json

    folder = make_model(tmp_path / "m", tokenizer_folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ModelError, match="more tensors are missing"):
        load_model(str(folder), **FP32)
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(folder), **FP32)
    (folder / "config.json").write_text(json.dumps(config))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(folder), **FP32)


def test_a_model_that_sees_later_tokens_is_refused():
    import transformers as tf

    config = tf.BertConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ModelError, match="not a causal language model"):
        head_is_composable(tf.BertLMHeadModel(config))


def test_a_row_beyond_learned_positions_is_refused_and_beyond_rotary_ones_is_noted():
    assert length_notes(tiny("llama"), 100) == []
    assert "was made for 2,048" in length_notes(tiny("llama"), 4000)[0]
    with pytest.raises(ModelError, match="sequence_len: 1024"):
        length_notes(tiny("gpt2"), 2000)


def test_attention_falls_back_where_an_architecture_has_no_better(tmp_path):
    import transformers as tf

    tf.BloomForCausalLM(tf.BloomConfig(vocab_size=512, hidden_size=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float32, attention=("sdpa", "eager"))
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ModelError):
        load_model(str(tmp_path), dtype=torch.float32, attention=("sdpa",))


def test_an_adapter_on_a_tied_head_is_refused(tied_model):
    with pytest.raises(ModelError, match="tied to the embedding"):
        target_modules(load_model(str(tied_model), **FP32), ("q_proj", "lm_head"))
