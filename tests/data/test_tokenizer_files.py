"""Folders with a vocabulary of another library alone: loaded, and token for token what that library makes of a text."""

import base64
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rows import RecipeWriter, write_rows
from support.templates import real_file, trained_texts
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetuner.data.encoding import Encoder
from finetuner.data.formats.base import Rendered
from finetuner.data.prepare import prepare_documents
from finetuner.data.tokenized_rows import build_tokenizer
from finetuner.data.tokenizer import load_tokenizer
from finetuner.data.tokenizer_files import llama3_special_tokens
from finetuner.errors import ModelError, RecipeError
from finetuner.recipe import load
from finetuner.recipe.sections import DataSection, TokenizerSection
from finetuner.world import World

TEXTS = [
    "", "a", "a b", "a  b", "a   b\n\n  c", "\n", "\ta\t", "trailing  ", "1234567",
    "naïve café “x” 中文 日本語 🙂🏽 привет",
    "\r\n x \r\n", "a\u00a0b\u200b", "I'm you'RE", "<0x0A>", "\x00", "x" * 100, "def f(x):\n    return x**2  # ok\n",
    "a▁b", "ﬁ ½ é é",
]  # fmt: skip
LEADING = [" ", "  a", " a b", "\u2581a"]
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def loaded(folder: Path, **keys: Any) -> PreTrainedTokenizerBase:
    return load_tokenizer(TokenizerSection(**keys), str(folder), False).tokenizer


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def real_texts() -> list[str]:
    """Real lines where they are on this machine."""
    try:
        lines = real_file("gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
        lines += real_file("wikitext2_valid.txt").read_text(encoding="utf-8").splitlines()[:80]
        return [line for line in lines if "<unk>" not in line]  # which is a special token of many
    except pytest.skip.Exception:
        return []


def require_equal(tokenizer: PreTrainedTokenizerBase, encode: Callable[[str], Any], texts: list[str]) -> None:
    for text in texts:
        assert ids(tokenizer, text) == list(encode(text)), text


def require_it_survives_saving(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, "<s>[INST] a [/INST]"]:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.bos_token_id, again.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


# --- SentencePiece ---


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of Llama's kind, trained on the spot; [INST] and [/INST] are words in it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    return train_sentencepiece(sentencepiece, tmp_path_factory.mktemp("spm"))


def train_sentencepiece(sentencepiece: Any, folder: Path, **settings: Any) -> Path:
    corpus = Path(__file__).parents[1] / "support" / "corpus.txt"
    options = {
        "model_type": "bpe", "vocab_size": 600, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True,
    } | settings  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "m"), minloglevel=2, hard_vocab_limit=False, **options
    )
    (folder / "m.model").rename(folder / "tokenizer.model")
    return folder / "tokenizer.model"


def folder_of(file: Path, folder: Path, name: str = "tokenizer.model", **configs: Any) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copyfile(file, folder / name)
    for config, values in configs.items():
        (folder / f"{config}.json").write_text(json.dumps(values))
    return folder


def test_a_folder_with_a_sentencepiece_model_alone_gives_its_tokens(sentencepiece_file: Path, tmp_path: Path) -> None:
    import sentencepiece

    own = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    tokenizer = loaded(folder_of(sentencepiece_file, tmp_path / "bare"))
    require_equal(tokenizer, own.encode, TEXTS + LEADING + real_texts())
    assert tokenizer("a")["input_ids"] == [own.bos_id(), *own.encode("a")]
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id) == (own.eos_id(), own.unk_id())
    require_it_survives_saving(tokenizer, tmp_path / "saved")


@pytest.mark.parametrize("legacy", [True, False])
def test_legacy_says_whether_a_section_behind_a_special_token_has_a_space(
    sentencepiece_file: Path, tmp_path: Path, legacy: bool
) -> None:
    config = LLAMA | {"legacy": legacy, "add_bos_token": True, "add_eos_token": False}
    tokenizer = loaded(folder_of(sentencepiece_file, tmp_path / "t", tokenizer_config=config))
    behind = tokenizer.convert_ids_to_tokens(ids(tokenizer, "<s>the"))[1:]
    assert "".join(behind) == ("▁the" if legacy else "the")


def test_the_settings_beside_the_file_are_heeded(sentencepiece_file: Path, tmp_path: Path) -> None:
    config = LLAMA | {"add_bos_token": False, "add_eos_token": True, "chat_template": "{{ messages }}"}
    tokenizer = loaded(folder_of(sentencepiece_file, tmp_path / "t", tokenizer_config=config))
    assert tokenizer("a")["input_ids"] == [*ids(tokenizer, "a"), tokenizer.eos_token_id]
    assert tokenizer.chat_template == "{{ messages }}"


def test_tokens_and_special_tokens_of_the_recipe_are_added(sentencepiece_file: Path, tmp_path: Path) -> None:
    section = TokenizerSection.model_validate({"tokens": ["<|im_end|>"], "special_tokens": {"pad_token": "<pad>"}})
    made = load_tokenizer(section, str(folder_of(sentencepiece_file, tmp_path / "t")), False)
    assert len(made.new_ids) == 2 and made.tokenizer.pad_token == "<pad>"


def test_a_model_without_a_space_before_texts_and_with_symbols_of_its_own_is_read(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    settings = {"add_dummy_prefix": False, "user_defined_symbols": ["<start>", "<end>"], "bos_piece": "<bos>"}
    file = train_sentencepiece(sentencepiece, tmp_path, **settings)
    own = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = loaded(tmp_path)
    require_equal(tokenizer, own.encode, [*TEXTS, *LEADING, "a<start>b<end>"])
    assert tokenizer.bos_token == "<bos>"


@pytest.mark.parametrize("settings", [{"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"}])
def test_a_model_that_cannot_be_read_exactly_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    train_sentencepiece(sentencepiece, tmp_path, vocab_size=500, remove_extra_whitespaces=True, **settings)
    with pytest.raises(ModelError, match="cannot be read as sentencepiece reads it"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    "content, kind, package",
    [
        (b"\n\x0e\n\x05<unk>", "a SentencePiece model", "pip install sentencepiece protobuf"),
        (b'{"config": {}}', "a tekken vocabulary", "pip install mistral-common, or: pip install 'finetuner[mistral]'"),
        (b"IQ== 0\nIg== 1\n", "a tiktoken file", "pip install tiktoken, or: pip install 'finetuner[tiktoken]'"),
    ],
)
def test_a_missing_package_is_named_for_the_file_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, kind: str, package: str
) -> None:
    for name in ("sentencepiece", "mistral_common.tokens.tokenizers.tekken", "mistral_common", "tiktoken"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    (tmp_path / ("tekken.json" if kind == "a tekken vocabulary" else "tokenizer.model")).write_bytes(content)
    with pytest.raises(ModelError) as error:
        loaded(tmp_path)
    assert kind in str(error.value) and package in str(error.value)


@pytest.mark.parametrize(
    "content, advice",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Type: git lfs pull"),
        (b"<html>not found</html>", "is neither a SentencePiece model nor a tiktoken file"),
    ],
)
def test_another_file_of_that_name_is_named_for_what_it_is(tmp_path: Path, content: bytes, advice: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ModelError, match=advice):
        loaded(tmp_path)


def test_a_tokenizer_json_comes_before_the_other_files(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "t")
    (folder / "tokenizer.model").write_bytes(b"anything")
    assert ids(loaded(folder), "a b") == ids(AutoTokenizer.from_pretrained(tokenizer_folder), "a b")


def test_a_rendered_text_of_llama_2_has_one_begin_and_one_end(sentencepiece_file: Path, tmp_path: Path) -> None:
    import sentencepiece

    own = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    tokenizer = loaded(folder_of(sentencepiece_file, tmp_path / "t"))
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "<s>[INST] What is 0+1? [/INST] It is 1. </s>"}])
    section = DataSection.model_validate({"datasets": [{"path": str(rows), "type": "completion"}], "sequence_len": 200})
    found, labels = prepare_documents(section, tokenizer, seed=0).train.document(0)
    middle = own.encode("[INST] What is 0+1? [/INST] It is 1. ")
    assert found.tolist() == [own.bos_id(), *middle, own.eos_id()]
    assert labels.tolist() == [-100, *middle, own.eos_id()]


# --- tiktoken ---


def write_ranks(path: Path, count: int) -> dict[bytes, int]:
    """All bytes, then pairs of bytes, then pairs with a third, to `count` in all."""
    words = [bytes([byte]) for byte in range(256)]
    words += [bytes([a, b]) for a in range(32, 128) for b in range(256)]
    words += [word + bytes([byte]) for word in words[256:] for byte in range(97, 103)]
    ranks = {word: rank for rank, word in enumerate(words[:count])}
    assert len(ranks) == count
    path.write_bytes(b"".join(base64.b64encode(word) + b" %d\n" % rank for word, rank in ranks.items()))
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize("is_newer", [False, True])
def test_metas_llama_3_file_gives_tiktokens_ids_and_its_special_tokens(tmp_path: Path, is_newer: bool) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = write_ranks(tmp_path / "tokenizer.model", 128_000)
    (tmp_path / "params.json").write_text(json.dumps({"dim": 8, "use_scaled_rope": is_newer}))
    tokenizer = loaded(tmp_path)
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    own = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    require_equal(tokenizer, own.encode_ordinary, TEXTS + LEADING + real_texts())
    special = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|start_header_id|>": 128006}
    special |= {"<|end_header_id|>": 128007, "<|eot_id|>": 128009}
    special |= {"<|eom_id|>": 128008, "<|reserved_special_token_247|>": 128255} if is_newer else {}
    special |= {} if is_newer else {"<|reserved_special_token_4|>": 128008, "<|reserved_special_token_250|>": 128255}
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in special} == special
    assert tokenizer("a")["input_ids"][0] == 128000 and len(tokenizer) == 128256
    assert tokenizer.eos_token == "<|end_of_text|>"


def test_llama_3_has_256_special_tokens_of_different_names() -> None:
    for is_newer in (False, True):
        assert len(set(llama3_special_tokens(is_newer=is_newer))) == 256


def test_a_tiktoken_file_of_an_unknown_model_is_refused_and_with_its_special_tokens_is_read(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = write_ranks(tmp_path / "tokenizer.model", 300)
    with pytest.raises(ModelError, match=r"a tiktoken file of 300 tokens.* It says neither its special tokens nor"):
        loaded(tmp_path)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>",
        "added_tokens_decoder": {"300": {"content": "<end>", "special": True}},
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = loaded(tmp_path)
    assert tokenizer.eos_token_id == 300 and len(tokenizer) == 301
    pattern = r"\p{L}+|[^\p{L}]+"
    own = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert ids(tokenizer, "abc") == own.encode_ordinary("abc")


# --- Mistral's files ---


def mistral_file(part: str) -> Path:
    """A vocabulary that the package mistral-common carries."""
    package = pytest.importorskip("mistral_common")
    return next(path for path in (Path(package.__file__).parent / "data").iterdir() if part in path.name)


SENTENCEPIECE_VERSIONS = {"model.v1": "mistral_v1", "model.v2": "mistral_v2v3", "240323.model.v3": "mistral_v2v3"}


@pytest.mark.slow
@pytest.mark.parametrize("part", SENTENCEPIECE_VERSIONS)
def test_mistrals_sentencepiece_files_give_mistral_commons_ids(part: str, tmp_path: Path) -> None:
    file = mistral_file(part)
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    own = SentencePieceTokenizer(file)
    tokenizer = loaded(folder_of(file, tmp_path / "t"))
    texts = TEXTS + [text for text in real_texts() if not text.startswith(" ")]
    require_equal(tokenizer, lambda text: own.encode(text, bos=False, eos=False), texts)
    assert tokenizer("a")["input_ids"] == own.encode("a", bos=True, eos=False)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (own.bos_id, own.eos_id, own.n_words)
    if part != "model.v1":
        assert tokenizer.convert_tokens_to_ids("[INST]") == own.get_special_token("[INST]")
    require_it_survives_saving(tokenizer, tmp_path / "saved")


@pytest.fixture(scope="module")
def tekken_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tekken vocabulary of 2,000 tokens, cut from the package's, which takes seconds to load."""
    return write_tekken(tmp_path_factory.mktemp("tekken"), "v3")


def write_tekken(folder: Path, version: str) -> Path:
    file = mistral_file("tekken_240911")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    values = json.loads(file.read_text(encoding="utf-8"))
    values["vocab"] = values["vocab"][:1900]
    values["config"] |= {"version": version, "default_vocab_size": 2000, "default_num_special_tokens": 100}
    values["special_tokens"] = [dict(token) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    if version not in ("v3", "v7"):
        later = ["[/TOOL_CONTENT]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"]
        first = len(values["special_tokens"])
        values["special_tokens"] += [
            {"rank": first + i, "token_str": token, "is_control": True} for i, token in enumerate(later)
        ]
    (folder / "tekken.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def test_a_tekken_file_gives_mistral_commons_ids(tekken_folder: Path, tmp_path: Path) -> None:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    own = Tekkenizer.from_file(tekken_folder / "tekken.json")
    tokenizer = loaded(tekken_folder)
    require_equal(tokenizer, lambda text: own.encode(text, bos=False, eos=False), TEXTS + LEADING + real_texts())
    assert tokenizer("a")["input_ids"] == own.encode("a", bos=True, eos=False)
    roles = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert roles == (own.unk_id, own.bos_id, own.eos_id, own.pad_id) and len(tokenizer) == own.n_words
    assert tokenizer.convert_tokens_to_ids("[INST]") == own.get_special_token("[INST]")
    require_it_survives_saving(tokenizer, tmp_path / "saved")


@pytest.mark.slow
def test_the_packages_whole_tekken_file_gives_mistral_commons_ids(tmp_path: Path) -> None:
    file = mistral_file("tekken_240718")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    own = Tekkenizer.from_file(file)
    tokenizer = loaded(folder_of(file, tmp_path / "t", "tekken.json"))
    require_equal(tokenizer, lambda text: own.encode(text, bos=False, eos=False), TEXTS + LEADING + real_texts())


def test_a_tekken_file_is_encoded_alike_by_the_fast_backend(tekken_folder: Path) -> None:
    tokenizer = loaded(tekken_folder)
    rows = [Rendered(text, ((0, len(text)),), wraps=True) for text in TEXTS + LEADING]
    slow, fast = Encoder(tokenizer), Encoder(tokenizer, fast_after_characters=0)
    for one, other in zip(slow.tokenize(rows), fast.tokenize(rows), strict=True):
        assert one[0].tolist() == other[0].tolist()


def test_a_tekken_file_beside_a_tokenizer_json_does_not_hide_it(
    tekken_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "t")
    shutil.copyfile(tekken_folder / "tekken.json", folder / "tekken.json")
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    assert ids(loaded(folder), "a b") == ids(AutoTokenizer.from_pretrained(tokenizer_folder), "a b")


CHATS = [
    [("user", "Hi there"), ("assistant", "yo.")],
    [("user", " two  spaces\n"), ("assistant", "INST is a word <s"), ("user", "]"), ("assistant", "Ω 🙂")],
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "yo")],
]


def expected_ids(folder: Path, name: str, chat: list[tuple[str, str]]) -> list[int]:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    own = MistralTokenizer.from_file(str(folder / name), mode=ValidationMode.finetuning)
    messages = [{"role": role, "content": content} for role, content in chat]
    return list(own.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens)


def prepared_chats(folder: Path, tmp_path: Path, tokenizer_keys: dict[str, Any], **data_keys: Any) -> Any:
    rows = [{"messages": [{"role": role, "content": content} for role, content in chat]} for chat in CHATS]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    values = {"datasets": [{"path": str(path), "type": "chat_template"}], "sequence_len": 512} | data_keys
    section = DataSection.model_validate(values)
    model = load_model_section(folder)
    tokenizer = build_tokenizer(model, TokenizerSection(**tokenizer_keys), section, World()).tokenizer
    return tokenizer, prepare_documents(section, tokenizer, seed=0).train


def load_model_section(folder: Path) -> Any:
    from finetuner.recipe.sections import ModelSection

    return ModelSection(base_model=str(folder))


FILES = {
    "model.v1": "tokenizer.model.v1", "model.v2": "tokenizer.model.v2", "240323.model.v3": "tokenizer.model.v3",
    "model.v7": "tokenizer.model.v7", "tekken": "tekken.json",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("part", FILES)
def test_with_mistral_common_chats_have_its_ids_and_the_answers_are_learned(
    part: str, tmp_path: Path, tekken_folder: Path
) -> None:
    folder = tekken_folder if part == "tekken" else folder_of(mistral_file(part), tmp_path / "t", FILES[part])
    tokenizer, store = prepared_chats(folder, tmp_path, {"tokenizer_use_mistral_common": True})
    for i, chat in enumerate(CHATS):
        found, labels = store.document(i)
        assert found.tolist() == expected_ids(folder, FILES[part], chat)
        answers = [content for role, content in chat if role == "assistant"]
        learned = [text.removeprefix(" ") for text in trained_texts(tokenizer, found, labels)]
        assert learned == [answer + tokenizer.eos_token for answer in answers]


def test_spaces_behind_an_answer_are_left_out_where_mistral_common_does(tekken_folder: Path) -> None:
    tokenizer = loaded(tekken_folder, tokenizer_use_mistral_common=True)
    chat = [("user", "a "), ("assistant", "b  ")]
    messages = [{"role": role, "content": content} for role, content in chat]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert ids(tokenizer, text) == expected_ids(tekken_folder, "tekken.json", chat)


@pytest.mark.parametrize("version", ["v7", "v11", "v13"])
def test_newer_versions_of_tekken_have_a_template_too(version: str, tmp_path: Path) -> None:
    folder = write_tekken(tmp_path, version)
    _, store = prepared_chats(folder, tmp_path, {"tokenizer_use_mistral_common": True})
    for i, chat in enumerate(CHATS):
        assert store.document(i)[0].tolist() == expected_ids(folder, "tekken.json", chat)


@pytest.mark.slow
@pytest.mark.parametrize("part", SENTENCEPIECE_VERSIONS)
def test_our_named_templates_give_mistral_commons_ids(part: str, tmp_path: Path) -> None:
    folder = folder_of(mistral_file(part), tmp_path / "t", FILES[part])
    _, store = prepared_chats(folder, tmp_path, {}, chat_template=SENTENCEPIECE_VERSIONS[part])
    for i, chat in enumerate(CHATS):
        assert store.document(i)[0].tolist() == expected_ids(folder, FILES[part], chat)


def test_without_a_file_of_mistrals_the_key_is_an_error(tokenizer_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no tekken.json and no .* of Mistral's"):
        loaded(tokenizer_folder, tokenizer_use_mistral_common=True)


def test_the_key_and_a_chat_template_are_a_contradiction(write_recipe: RecipeWriter) -> None:
    with pytest.raises(RecipeError, match="mistral-common writes chats its own way, without chat_template"):
        load(write_recipe(tokenizer_use_mistral_common=True, chat_template="chatml"))
    assert load(write_recipe(tokenizer_use_mistral_common=True)).recipe.tokenizer.tokenizer_use_mistral_common


def test_tools_are_refused_where_mistral_common_has_rules_of_its_own(tekken_folder: Path, tmp_path: Path) -> None:
    tokenizer = loaded(tekken_folder, tokenizer_use_mistral_common=True)
    with pytest.raises(Exception, match="mistral-common has rules of its own for tools"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}])
