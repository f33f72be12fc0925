"""Packed rows learn what their documents learn alone: apart, whole, and none twice."""

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import alpaca_rows, write_rows
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from finetuner.data.batches import BatchLayout, collate
from finetuner.data.packing import Packs, best_fit_decreasing
from finetuner.data.token_store import IGNORE_INDEX, TokenStore
from finetuner.errors import ModelError
from finetuner.models.document_isolation import require_isolation
from finetuner.objectives.loss_module import LossModule
from finetuner.objectives.next_token import NextToken

GENERATOR = np.random.default_rng(5)
LENGTHS = (7, 5, 9, 3, 6, 4, 8, 6)
PACKED = BatchLayout(packed=True)


@pytest.fixture(scope="module")
def store() -> TokenStore:
    def document(length: int):
        ids = GENERATOR.integers(1, 400, length).astype(np.int32)
        labels = ids.copy()
        labels[: length // 3] = IGNORE_INDEX
        return ids, labels

    return TokenStore.of(map(document, LENGTHS))


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request, tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=request.param).eval()


# --- what is put together ---


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.integers(1, 50), max_size=200))
def test_every_document_is_in_one_pack_and_no_pack_is_over_full(lengths):
    members, starts = best_fit_decreasing(np.array(lengths, dtype=np.int64), 50)
    assert sorted(members.tolist()) == list(range(len(lengths)))
    filled = [sum(lengths[m] for m in members[a:b]) for a, b in pairwise(starts)]
    assert all(0 < tokens <= 50 for tokens in filled)
    assert sum(tokens <= 25 for tokens in filled) <= 1  # two half-empty packs would be one


@pytest.mark.parametrize("mix", ["lognormal", "bimodal"])
def test_packs_are_at_least_ninety_nine_percent_full(mix):
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(6, 1, 20_000)
    if mix == "bimodal":
        lengths = generator.choice([200, 1500], 20_000) * generator.normal(1, 0.2, 20_000)
    lengths = np.clip(lengths, 1, 4096).astype(np.int64)
    _, starts = best_fit_decreasing(lengths, 4096)
    assert lengths.sum() / ((len(starts) - 1) * 4096) >= 0.99


# --- what the model sees ---


def test_positions_begin_anew_with_each_document_and_its_first_token_is_no_target(store):
    packs = Packs.of(store, 16)
    batch = collate(packs, list(range(len(packs))), PACKED)
    assert batch.attention_mask is None
    expected = Counter()
    for i in range(len(packs)):
        positions = np.concatenate([np.arange(len(ids)) for ids, _ in packs.documents(i)])
        assert batch.position_ids[i, : len(positions)].tolist() == positions.tolist()
        expected += Counter(int(t) for _, labels in packs.documents(i) for t in labels[1:] if t != IGNORE_INDEX)
    assert Counter(batch.targets.tolist()) == expected


def test_a_changed_document_leaves_the_logits_of_its_neighbours_as_they_are(model, store):
    packs = Packs.of(store, 16)
    batch = collate(packs, [0], PACKED)
    first = len(packs.documents(0)[0][0])
    changed = batch.input_ids.clone()
    changed[0, :first] = torch.tensor(GENERATOR.integers(1, 400, first))

    @torch.no_grad()
    def logits(ids: torch.Tensor, **positions: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, use_cache=False, **positions).logits[0]  # with a cache, packs are not looked for

    one, other = (logits(ids, position_ids=batch.position_ids)[first:] for ids in (batch.input_ids, changed))
    alone = logits(batch.input_ids[:, first:], position_ids=batch.position_ids[:, first:])
    joined, joined_changed = (logits(ids)[first:] for ids in (batch.input_ids, changed))
    assert torch.allclose(one, other, atol=1e-6)
    assert torch.allclose(one, alone, atol=1e-5)
    assert not torch.allclose(joined, joined_changed, atol=1e-3), "as one document they would differ"
    require_isolation(model)


@pytest.mark.parametrize("layout", [PACKED, BatchLayout(packed=True, pad_to=24)], ids=["as long as it is", "padded"])
def test_packs_have_the_loss_and_the_gradient_of_their_documents(model, store, layout):
    packs = Packs.of(store, 16)
    loss = LossModule(model, NextToken(), composed=True)

    def outcome(rows, numbers, how):
        batch = collate(rows, numbers, how)
        model.zero_grad()
        (value,) = loss(batch.tensors())
        value.backward()
        return value.item(), [p.grad.clone() for p in model.parameters()]

    value, gradients = outcome(packs, list(range(len(packs))), layout)
    expected, of_documents = outcome(store, list(range(len(store))), BatchLayout())
    assert value == pytest.approx(expected, rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, of_documents, strict=True))


def test_joined_documents_are_read_as_one_text(model, store):
    """pretrain_multipack_attn: false. Every token but a row's first is predicted from all that stands before it."""
    packs = Packs.of(store, 16)
    number = next(i for i in range(len(packs)) if len(packs.documents(i)) > 1)
    ids = np.concatenate([ids for ids, _ in packs.documents(number)])
    labels = np.concatenate([labels for _, labels in packs.documents(number)])
    batch = collate(packs, [number], BatchLayout(packed=True, joined=True))
    assert batch.input_ids[0].tolist() == ids.tolist()
    assert batch.position_ids[0].tolist() == list(range(len(ids)))
    assert batch.targets.tolist() == [label for label in labels[1:] if label != IGNORE_INDEX]
    with torch.no_grad():
        as_one = model(torch.from_numpy(ids)[None].long()).logits
        as_batch = model(batch.input_ids, position_ids=batch.position_ids).logits
        apart = model(batch.input_ids, position_ids=collate(packs, [number], PACKED).position_ids).logits
    assert torch.allclose(as_one, as_batch, atol=1e-5)
    assert not torch.allclose(as_one, apart, atol=1e-3), "documents that are kept apart are read otherwise"


def test_a_deep_model_in_bf16_is_taken_although_its_kernels_round():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=24, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, attn_implementation="sdpa",
    )  # fmt: skip
    require_isolation(LlamaForCausalLM(config).to(torch.bfloat16))


def test_a_model_that_cannot_keep_documents_apart_is_refused_by_name():
    config = BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
    with pytest.raises(ModelError, match=r"BloomForCausalLM with '.*' attention"):
        require_isolation(BloomForCausalLM(config))


# --- whole runs ---


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_run_is_the_run_of_its_documents(attention, write_recipe, train, tmp_path):
    def run(name: str, **keys):
        recipe = write_recipe(
            f"{name}.yml",
            output_dir=str(tmp_path / name),
            attn_implementation=attention,
            micro_batch_size=40,  # all rows in one step
            max_steps=3,
            val_set_size=4,
            **keys,
        )
        return train(recipe)

    plain = run("plain")
    for keys in (
        {"sample_packing": True},
        {"eval_sample_packing": True},
        {"sample_packing": True, "pad_to_sequence_len": True},
    ):
        packed = run("-".join(keys), **keys)
        for row, expected in zip(packed, plain, strict=True):
            for key in {"loss", "grad_norm", "eval_loss", "num_tokens"} & expected.keys():
                assert row[key] == pytest.approx(expected[key], rel=1e-5), (keys, key)


@pytest.mark.slow
def test_grouping_rows_by_length_saves_padding_and_shows_every_row_once(write_recipe, train, tmp_path, capsys):
    rows = write_rows(
        tmp_path / "many.jsonl", [row | {"output": "it " * (1 + 5 * (i % 7))} for i, row in enumerate(alpaca_rows(56))]
    )
    found = {}
    for grouped in (False, True):
        recipe = write_recipe(
            datasets=[{"path": str(rows), "type": "alpaca"}], micro_batch_size=8, group_by_length=grouped,
            output_dir=str(tmp_path / str(grouped)),
        )  # fmt: skip
        metrics = train(recipe)
        share = re.search(r"([\d.]+)% of the tokens computed are padding", capsys.readouterr().out)
        assert share
        found[grouped] = float(share[1]), sum(row["num_tokens"] for row in metrics if "loss" in row)
    assert found[True][0] < 0.5 * found[False][0]
    assert found[True][1] == found[False][1]


def test_eval_packing_follows_packing_unless_it_is_said() -> None:
    from finetuner.data.cache import packs_held_out
    from finetuner.recipe.sections import PackingSection

    answers = {
        (True, None): True, (False, None): False, (True, False): False, (False, True): True,
    }  # fmt: skip
    for (train, held_out), expected in answers.items():
        assert packs_held_out(PackingSection(sample_packing=train, eval_sample_packing=held_out)) is expected
