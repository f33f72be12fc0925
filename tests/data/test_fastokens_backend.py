"""Byte-level tokenizers go through fastokens, and every token, offset and label is what `tokenizers` says."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.templates import CONTENTS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from finetuner.data.encoding import Encoder
from finetuner.data.fastokens_backend import CHECK_EVERY, CompiledTokenizer, FastokensBackend
from finetuner.data.formats.base import Rendered
from finetuner.data.prepare import prepare_documents
from finetuner.errors import DataError
from finetuner.recipe.sections import DataSection

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
LLAMA = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    ]
)
QWEN = LLAMA.replace("{1,3}", "")
CHINESE = "[一-龥぀-ゟ゠-ヿ]+"

PARTS = [
    *(" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "a", "Z", "the", "1", "23", "4567", " ", " ", "é", "é", "中", "字"),
    *("ำ", "👩‍👧", *SPECIAL, "<|", "|>", ".", "...", "__", "#", "½", "Ⅷ", "٣", "\0", "\4", "ﬁ", "क्"),
    *("\U000e0001", "Å", "한국", "가", "<tool_call>", "if x:\n    return", "ſ", "K"),
]


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def trained(
    splits: list[Any], *, normalizer: Any = None, alphabet: list[str] = LETTERS, ignore_merges: bool = False
) -> PreTrainedTokenizerBase:
    """A byte-level BPE of some 1,200 tokens; one added token of it is not special."""
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits or alphabet is not LETTERS)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    backend.decoder, backend.normalizer = decoders.ByteLevel(), normalizer
    chosen = random.Random(0)
    corpus = [Path(__file__).read_text(), *("".join(chosen.choices(PARTS, k=30)) for _ in range(200))]
    backend.train_from_iterator(
        corpus,
        trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False),
    )
    backend.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


# The shapes of families' tokenizers
SHAPES: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "gpt2": lambda: trained([]),
    "llama3": lambda: trained([split(LLAMA)], ignore_merges=True),
    "qwen": lambda: trained([split(QWEN)], normalizer=normalizers.NFC()),
    "deepseek": lambda: trained([split(r"\p{N}{1,3}"), split(CHINESE), split(LLAMA)]),
    "smollm, without some bytes": lambda: trained([pre_tokenizers.Digits(True)], alphabet=LETTERS[:200]),
}


@pytest.fixture(scope="module", params=SHAPES)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return SHAPES[request.param]()


def texts_of(seed: int, number: int) -> list[str]:
    chosen = random.Random(seed)
    return ["".join(chosen.choices(PARTS, k=chosen.randint(0, 40))) for _ in range(number)]


def fast(tokenizer: PreTrainedTokenizerBase) -> FastokensBackend:
    pytest.importorskip("fastokens")
    found = FastokensBackend.build(tokenizer)
    assert found is not None
    return found


def assert_same(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, whole: float = 0.0) -> None:
    """Ids of all, and offsets of those that are whole: more than the share `whole`."""
    encoding = fast(tokenizer).encode(texts)
    assert encoding is not None
    borders = np.append(0, np.cumsum(encoding.counts))
    for i, one in enumerate(tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)):
        its = slice(borders[i], borders[i + 1])
        assert encoding.ids[its].tolist() == one.ids, texts[i]
        if encoding.is_complete[i]:
            assert [tuple(pair) for pair in encoding.offsets[its].tolist()] == one.offsets, texts[i]
    assert encoding.is_complete.mean() > whole


def test_texts_have_the_tokens_and_offsets_of_tokenizers(tokenizer: PreTrainedTokenizerBase) -> None:
    assert_same(tokenizer, [*CONTENTS, *texts_of(0, 3000)])


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gpt2", "llama3", "qwen"])
def test_every_character_has_the_tokens_of_tokenizers(shape: str) -> None:
    """The two have their own tables of letters and digits: every character, by itself and between others; of the
    planes where none is assigned, some."""
    codes = [*range(0xD800), *range(0xE000, 0x40000), *range(0x40000, 0x110000, 61), *range(0xE0000, 0xE0200)]
    tokenizer = SHAPES[shape]()
    reader = fast(tokenizer)
    texts = [
        "".join(f"ab{chr(c)}{chr(c)}12{chr(c)} x {chr(c)}\n{chr(c)}" for c in codes[start : start + 50])
        for start in range(0, len(codes), 50)
    ]
    for start in range(0, len(texts), 500):
        some = texts[start : start + 500]
        ids, borders = reader._ids(some)
        for i, one in enumerate(tokenizer.backend_tokenizer.encode_batch_fast(some, add_special_tokens=False)):
            assert ids[borders[i] : borders[i + 1]].tolist() == one.ids, ascii(some[i])


def spans_of(text: str, seed: int) -> tuple[tuple[int, int], ...]:
    places = sorted(random.Random(seed).sample(range(len(text) + 1), k=min(4, len(text) + 1) // 2 * 2))
    return tuple(zip(places[::2], places[1::2], strict=True))


def test_documents_are_the_same_with_it_and_without(tokenizer: PreTrainedTokenizerBase) -> None:
    """Spans that cut tokens, contents that look like special tokens, texts that lack bytes among those that do not."""
    texts = [*CONTENTS, *texts_of(1, 1500)]
    rendered = [
        Rendered(text, spans_of(text, i), wraps=i % 2 == 0, contents=spans_of(text, -i - 1))
        for i, text in enumerate(texts)
    ]
    fast(tokenizer)
    with_it = Encoder(tokenizer, fast_after_characters=0)
    documents = list(zip(with_it.tokenize(rendered), Encoder(tokenizer).tokenize(rendered), strict=True))
    assert with_it.characters_until_fast < 0, "it was used"
    for text, (mine, expected) in zip(texts, documents, strict=True):
        assert mine[0].tolist() == expected[0].tolist(), text
        assert mine[1].tolist() == expected[1].tolist(), text


def test_texts_that_lack_bytes_or_change_are_left_to_tokenizers() -> None:
    lacking, changing = SHAPES["smollm, without some bytes"](), SHAPES["qwen"]()
    for tokenizer, text in ((lacking, "a\U0010ffffb"), (changing, "ele\u0301phant")):
        encoding = fast(tokenizer).encode(["as it is", text, "again"])
        assert encoding is not None
        assert encoding.is_complete.tolist() == [True, False, True]
    assert fast(lacking).encode(["half a pair: \ud83d"]) is None


def test_bytes_that_come_and_go_in_one_text_do_not_pass_for_none() -> None:
    """NFC makes the first letter three bytes longer and the last vowel three bytes shorter."""
    tokenizer = SHAPES["qwen"]()
    text = "\u09df is it so? no \u0995\u09c7\u09be"
    encoding = fast(tokenizer).encode([text])
    assert encoding is not None
    assert not encoding.is_complete[0]
    rendered = [Rendered(text, ((12, 14),), wraps=False)]
    (ids, labels), expected = (
        Encoder(tokenizer, fast_after_characters=after).tokenize(rendered)[0] for after in (0, 1 << 30)
    )
    assert ids.tolist() == expected[0].tolist()
    assert labels.tolist() == expected[1].tolist()
    assert tokenizer.decode(ids[labels != -100]).strip() == "no"


def test_what_a_tokenizers_file_says_of_cutting_and_of_special_tokens_is_not_heeded() -> None:
    tokenizer = plain()
    tokenizer.backend_tokenizer.enable_truncation(max_length=4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.split_special_tokens = True
    text = "a text of more than four tokens <|im_end|> and more"
    encoding = fast(tokenizer).encode([text])
    assert encoding is not None
    assert encoding.ids.tolist() == tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in encoding.ids


def test_gaps_in_the_vocabulary_are_no_tokens() -> None:
    vocabulary = {letter: i * 3 for i, letter in enumerate(LETTERS)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for after in (0, 1 << 30):
        ids, _ = Encoder(tokenizer, fast_after_characters=after).tokenize([Rendered("some text", (), wraps=False)])[0]
        assert ids.tolist() == tokenizer("some text")["input_ids"]


def plain() -> PreTrainedTokenizerBase:
    return trained([])


def swallowing() -> PreTrainedTokenizerBase:
    tokenizer = plain()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", rstrip=True, special=True)]})
    return tokenizer


def overlapping() -> PreTrainedTokenizerBase:
    tokenizer = plain()
    tokenizer.add_tokens([AddedToken("<|im_end|>\n", normalized=True)])
    return tokenizer


def sentencepiece() -> PreTrainedTokenizerBase:
    backend = Tokenizer(
        models.BPE(vocab={"a": 0, "▁": 1, "<unk>": 2}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def unigram() -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)])))


def with_part(name: str, value: Any) -> PreTrainedTokenizerBase:
    tokenizer = plain()
    setattr(tokenizer.backend_tokenizer, name, value)
    return tokenizer


def with_dropout() -> PreTrainedTokenizerBase:
    tokenizer = plain()
    tokenizer.backend_tokenizer.model.dropout = 0.1
    return tokenizer


OTHERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte fallback": sentencepiece,
    "unigram": unigram,
    "dropout": with_dropout,
    "special tokens take spaces": swallowing,
    "added tokens that overlap": overlapping,
    "a hexadecimal class": lambda: trained([split(r"\h+")]),
    "offsets trimmed": lambda: with_part("post_processor", processors.ByteLevel(trim_offsets=True)),
    "a space before all": lambda: with_part("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "small letters": lambda: with_part("normalizer", normalizers.Lowercase()),
    "no bytes": lambda: with_part("pre_tokenizer", None),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_tokenizers_are_left_to_tokenizers(make: Callable[[], PreTrainedTokenizerBase]) -> None:
    pytest.importorskip("fastokens")
    tokenizer = make()
    assert FastokensBackend.build(tokenizer) is None
    if make not in (unigram, with_dropout):  # a letter alone, and another text each time
        ids = [
            ids.tolist()
            for ids, _ in Encoder(tokenizer, fast_after_characters=0).tokenize([Rendered("a aa", (), False, ())])
        ]
        assert ids == [tokenizer("a aa", add_special_tokens=False)["input_ids"]]


def test_equal_tokenizers_share_one_and_changed_ones_do_not() -> None:
    one = plain()
    backend = one.backend_tokenizer
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend.to_str()), eos_token="<|endoftext|>")
    mine = fast(one)
    assert fast(other).compiled is mine.compiled
    other.add_tokens(["<new>"])
    assert fast(other).compiled is not mine.compiled
    assert_same(other, ["a <new> b"], whole=0.5)
    assert mine.encode(["a <new> b"]) is not None


class Wrong:
    """Gives the tokens of the text backwards, after some that it gives right."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, after: int) -> None:
        self.backend: Any = tokenizer.backend_tokenizer
        self.right = after

    def encode_batch_flat(self, texts: list[str]) -> tuple[bytes, bytes]:
        some = [one.ids for one in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
        given = [ids if i < self.right else ids[::-1] for i, ids in enumerate(some)]
        self.right -= len(texts)
        borders = np.cumsum([0, *map(len, given)]).astype("<u8")
        return np.concatenate(given).astype("<u4").tobytes(), borders.tobytes()


def test_a_text_that_the_two_read_differently_stops_the_run() -> None:
    tokenizer = plain()
    reader = FastokensBackend(
        tokenizer, CompiledTokenizer(Wrong(tokenizer, after=CHECK_EVERY), fast(tokenizer).compiled.byte_widths)
    )
    texts = ["the first text of many"] * CHECK_EVERY
    assert reader.encode(texts) is not None
    with pytest.raises(DataError, match=r"read a text differently, from token 0 on: .*\n.*pip uninstall fastokens"):
        reader.encode(texts)


@pytest.mark.slow
def test_it_is_used_for_many_rows_and_not_needed(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three million characters, through the whole preparation, with fastokens and as if it were not installed."""
    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join(text.replace("\n", " ").replace("\r", " ") * 12 for text in texts_of(2, 6000)))
    section = DataSection.model_validate(
        {"datasets": [{"path": str(rows), "type": "completion"}], "sequence_len": 100_000, "on_bad_row": "skip"}
    )
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    stores = [prepare_documents(section, tokenizer, seed=0).train]
    monkeypatch.setitem(sys.modules, "fastokens", None)  # as Python has it for a package that cannot be imported
    assert FastokensBackend.build(tokenizer) is None
    stores.append(prepare_documents(section, tokenizer, seed=0).train)
    assert stores[0].num_tokens > 1_000_000
    assert stores[0].sha256 == stores[1].sha256
