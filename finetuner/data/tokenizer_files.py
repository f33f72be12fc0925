"""Find the vocabulary file of a folder that has no tokenizer.json, and load it as its own library reads it.

    tokenizer.model   SentencePiece's (Llama 2, Mistral's first ones), or tiktoken's (Llama 3 as Meta publishes it)
    tekken.json       Mistral's newer ones
    qwen.tiktoken     Qwen's first ones

What comes out is compared with the library on a few texts: tokens that differ would train a model on another language
than it knows, and no loss shows it.
"""

import base64
import importlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from unicodedata import normalize

from finetuner.data.vocabulary_conversion import (
    CONTROL,
    USER_DEFINED,
    put_ends,
    ranked_bpe,
    sentencepiece_bpe,
)
from finetuner.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Kind = Literal["sentencepiece", "tekken", "tiktoken"]
Encode = Callable[[str], list[int]]

# In the order in which they are looked for: a folder of Mistral's may have the older kind too.
NAMES = ("tekken.json", "tokenizer.model", "tokenizer.model.v3", "qwen.tiktoken", "tiktoken.model")
MISTRAL_NAMES = ("tekken.json", "tokenizer.model.v3", "tokenizer.model")  # its name says the version
PATTERNS = ("tekken*.json", "*.tiktoken", "*.model.v[0-9]*")  # of files in a folder on this disk
SIDE_FILES = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
# Keys of tokenizer_config.json that say how another class reads the file.
READING = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "auto_map", "backend", "from_slow", "legacy",
    "sp_model_kwargs", "tokenizer_class", "tokenizer_file", "use_fast", "vocab_file",
)  # fmt: skip
PLAIN_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "TokenizersBackend", "PreTrainedTokenizer")

PROBES = (
    "Hello, world! I'm 12 and you'RE 1234567.",
    "a  b   c\n\n  two\tthree \n",
    "naïve café — “quotes” … 中文 日本語 한국어 🙂🏽 привет مرحبا",
    "if (a<=b) {\n\treturn x[0] += 1; // #!\n}\r\n",
    " begins with a space",
    "ends with two  ",
)

# github.com/meta-llama/llama3 (its Tokenizer class), and llama-models for 3.1
LLAMA3_RANKS, LLAMA4_RANKS = 128_000, 200_000
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# github.com/QwenLM/Qwen (its QWenTokenizer class): digits one by one
QWEN_RANKS = 151_643
QWEN_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


class VocabularyFile(NamedTuple):
    """A file that holds a vocabulary, its kind, and the other files of its tokenizer that are there, by name."""

    path: Path
    kind: Kind
    beside: Mapping[str, Path]

    @property
    def config(self) -> dict[str, Any]:
        """tokenizer_config.json, or nothing."""
        return _json(self.beside.get("tokenizer_config.json"))


def find_vocabulary(name: str) -> VocabularyFile | None:
    """Return the vocabulary file of a folder or hub id without a tokenizer.json; None if it has none of these kinds.

    Raises ModelError for a file of another kind under such a name.
    """
    if _file_of(name, "tokenizer.json") is not None:
        return None
    return _vocabulary_of(name, NAMES, PATTERNS)


def require_mistral_file(name: str) -> VocabularyFile:
    """Return the vocabulary file that mistral-common reads, whether or not there is a tokenizer.json.

    Raises ModelError if there is none.
    """
    found = _vocabulary_of(name, MISTRAL_NAMES, PATTERNS)
    if found is None or found.kind == "tiktoken":
        raise ModelError(
            f"'{name}' has no tekken.json and no tokenizer.model of Mistral's, which tokenizer_use_mistral_common "
            "reads. Remove that key: the model's own tokenizer is used."
        )
    return found


def _vocabulary_of(name: str, names: Iterable[str], patterns: Iterable[str]) -> VocabularyFile | None:
    found = next(filter(None, (_file_of(name, file) for file in names)), None)
    if found is None and Path(name).is_dir():
        matches = sorted({path for pattern in patterns for path in Path(name).glob(pattern)})
        if len(matches) > 1:
            listed = ", ".join(path.name for path in matches)
            raise ModelError(f"'{name}' holds several vocabularies: {listed}. Keep the one that the model knows.")
        found = matches[0] if matches else None
    if found is None:
        return None
    wanted = ("tokenizer_config.json", "config.json", "params.json", *SIDE_FILES)
    beside = {file: path for file in wanted if (path := _file_of(name, file)) is not None}
    return VocabularyFile(found, _kind(found), beside)


def load_vocabulary(file: VocabularyFile, *, spaced_template: bool = False) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a vocabulary file, checked against its library.

    `spaced_template`: chats are written by a template that puts spaces behind special tokens itself.
    Raises ModelError if the library is missing, the file does not say enough, or the tokens come out otherwise.
    """
    try:
        if file.kind == "sentencepiece":
            return _load_sentencepiece(file, spaced_template)
        return _load_tekken(file) if file.kind == "tekken" else _load_tiktoken(file)
    except ImportError as error:
        package, extra = {
            "sentencepiece": ("sentencepiece protobuf", ""),
            "tekken": ("mistral-common", "mistral"),
            "tiktoken": ("tiktoken", "tiktoken"),
        }[file.kind]
        install = f"pip install {package}" + (f", or: pip install 'finetuner[{extra}]'" if extra else "")
        what = {
            "sentencepiece": "a SentencePiece model",
            "tekken": "a tekken vocabulary",
            "tiktoken": "a tiktoken file",
        }
        raise ModelError(
            f"'{file.path}' is {what[file.kind]}, which takes a package that is not installed ({error}):\n  {install}"
        ) from error


def _load_sentencepiece(file: VocabularyFile, spaced_template: bool) -> "PreTrainedTokenizerBase":
    import sentencepiece

    messages = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # made at run time: it has no types
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file.path))
    encode: Encode = processor.encode
    config = file.config
    named = str(config.get("tokenizer_class") or "PreTrainedTokenizer").removesuffix("Fast")
    model = messages.ModelProto()
    model.ParseFromString(file.path.read_bytes())
    is_bpe = model.trainer_spec.model_type == 2
    if named not in PLAIN_CLASSES or not is_bpe:
        from transformers import AutoTokenizer

        theirs: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(file.path.parent))
        require_same_tokens(theirs, encode, file.path, "sentencepiece")
        return theirs
    ids = (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id())
    roles = {
        f"{role}_token": processor.id_to_piece(i)
        for role, i in zip(("unk", "bos", "eos", "pad"), ids, strict=True)
        if i >= 0
    }
    own_prefix, legacy = config.get("add_prefix_space"), config.get("legacy")
    prefix = model.normalizer_spec.add_dummy_prefix if own_prefix is None else bool(own_prefix)
    # Control tokens for turns have come with templates that write the spaces themselves (Mistral's v2 and later).
    has_turns = any(piece.type == CONTROL and i not in ids for i, piece in enumerate(model.pieces))
    each_section = not (has_turns or spaced_template) if legacy is None or spaced_template else bool(legacy)
    tokenizer = sentencepiece_bpe(model, prefix=prefix, each_section=each_section)
    begin = roles.get("bos_token") if config.get("add_bos_token", True) else None
    end = roles.get("eos_token") if config.get("add_eos_token", False) else None
    put_ends(tokenizer, begin, end, byte_level=False)
    made = _wrapped(tokenizer, file, roles)
    symbols = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    if own_prefix is None:
        # Where only the first section has a prefix, a space that a text begins with takes its place.
        probes = [text for text in PROBES if each_section or not text.startswith(" ")]
        probes += [f"a{symbol}b" for symbol in symbols[:20]]
        require_same_tokens(made, encode, file.path, "sentencepiece", probes)
    return made


def _load_tekken(file: VocabularyFile) -> "PreTrainedTokenizerBase":
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tekken = Tekkenizer.from_file(file.path)
    read = json.loads(file.path.read_text(encoding="utf-8"))
    first = tekken.num_special_tokens
    size = read["config"]["default_vocab_size"] - first
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in read["vocab"] if token["rank"] < size}
    special = {tekken.id_to_piece(i): i for i in range(first)}
    tokenizer = ranked_bpe(ranks, read["config"]["pattern"], special, first=first)
    roles = {
        "unk_token": tekken.unk_id,
        "bos_token": tekken.bos_id,
        "eos_token": tekken.eos_id,
        "pad_token": tekken.pad_id,
    }
    named = {role: tekken.id_to_piece(i) for role, i in roles.items()}
    put_ends(tokenizer, named["bos_token"], None, byte_level=True)
    made = _wrapped(tokenizer, file, named)

    def encode(text: str) -> list[int]:
        return list(tekken.encode(text, bos=False, eos=False))

    require_same_tokens(made, encode, file.path, "mistral-common")
    return made


def _load_tiktoken(file: VocabularyFile) -> "PreTrainedTokenizerBase":
    import tiktoken

    ranks = _read_ranks(file.path)
    special, pattern = _special_of(file, len(ranks))
    is_qwen = len(ranks) == QWEN_RANKS
    tokenizer = ranked_bpe(ranks, pattern, special, nfc=is_qwen)
    roles = {} if is_qwen else {"bos_token": "<|begin_of_text|>"}
    roles["eos_token"] = "<|endoftext|>" if is_qwen else "<|end_of_text|>"
    roles = {role: token for role, token in roles.items() if token in special} | {
        role: _content(file.config[role]) for role in ("bos_token", "eos_token") if file.config.get(role)
    }
    begin = roles.get("bos_token") if file.config.get("add_bos_token", not is_qwen) else None
    put_ends(tokenizer, begin, None, byte_level=True)
    made = _wrapped(tokenizer, file, roles)
    library = tiktoken.Encoding(file.path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(text: str) -> list[int]:
        return library.encode_ordinary(normalize("NFC", text) if is_qwen else text)

    require_same_tokens(made, encode, file.path, "tiktoken")
    return made


def _special_of(file: VocabularyFile, count: int) -> tuple[dict[str, int], str]:
    """The special tokens of a tiktoken file, which it does not say itself, with their ids; and the pattern by which a
    text is cut. Raises ModelError if they are not known."""
    named = file.config.get("added_tokens_decoder")
    added = {_content(token): int(i) for i, token in named.items()} if isinstance(named, dict) else {}
    if count == QWEN_RANKS:
        return {token: count + i for i, token in enumerate(QWEN_SPECIAL)}, QWEN_PATTERN
    if count == LLAMA3_RANKS:
        names = llama3_special_tokens(is_newer=_is_llama31(file))
        return {token: count + i for i, token in enumerate(names)} | added, LLAMA3_PATTERN
    if added and count != LLAMA4_RANKS:
        return added, LLAMA3_PATTERN  # which is transformers' for such a file
    raise ModelError(
        f"'{file.path}' is a tiktoken file of {count:,} tokens. It says neither its special tokens nor how a text is "
        f"cut into words; both are known here for Llama 3 ({LLAMA3_RANKS:,}) and the first Qwen ({QWEN_RANKS:,}).\n"
        "Put the model's tokenizer.json beside it, or name the model's hub id: `tokenizer: ...`."
    )


def llama3_special_tokens(*, is_newer: bool) -> list[str]:
    """The 256 special tokens of Llama 3, in the order of their ids. `is_newer`: of 3.1 and later."""
    placed = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 7: "<|end_header_id|>"}
    placed |= {9: "<|eot_id|>"}
    if is_newer:
        placed |= {4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>", 10: "<|python_tag|>"}
    names, reserved = [], 0
    for i in range(256):
        names.append(placed.get(i, f"<|reserved_special_token_{reserved}|>"))
        reserved += i not in placed
    return names


def _is_llama31(file: VocabularyFile) -> bool:
    scaling = _json(file.beside.get("config.json")).get("rope_scaling")
    is_scaled = isinstance(scaling, dict) and "llama3" in (scaling.get("rope_type"), scaling.get("type"))
    return is_scaled or bool(_json(file.beside.get("params.json")).get("use_scaled_rope"))


def require_same_tokens(
    tokenizer: "PreTrainedTokenizerBase", encode: Encode, path: Path, library: str, texts: Iterable[str] = PROBES
) -> None:
    """Raise ModelError if the tokenizer cuts one of the texts otherwise than `encode`, which is its library's."""
    for text in texts:
        ours, theirs = tokenizer(text, add_special_tokens=False)["input_ids"], encode(text)
        if list(ours) != list(theirs):
            raise ModelError(
                f"'{path}' cannot be read as {library} reads it: {text[:40]!r} becomes {list(ours)[:12]}, "
                f"and {list(theirs)[:12]} there.\nName a folder or hub id with a tokenizer.json: `tokenizer: ...`."
            )


def _wrapped(tokenizer: "Tokenizer", file: VocabularyFile, roles: Mapping[str, str]) -> "PreTrainedTokenizerBase":
    """A tokenizer of transformers', with `roles` of special tokens where the files beside the vocabulary name none."""
    from transformers import PreTrainedTokenizerFast

    config = {key: value for key, value in file.config.items() if key not in READING}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps({**roles, **config}), encoding="utf-8")
        for name in SIDE_FILES:
            if name in file.beside:
                shutil.copyfile(file.beside[name], Path(folder) / name)
        made: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder)
    return made


def _kind(path: Path) -> Kind:
    """The kind of a vocabulary file, by what is in it. Raises ModelError for another."""
    if path.suffix == ".json":
        return "tekken"
    with path.open("rb") as file:
        begin = file.read(200)
    if begin.startswith(b"version https://git-lfs"):
        raise ModelError(f"'{path}' is Git LFS's stand-in for a file that was not downloaded. Type: git lfs pull")
    words = begin.split(b"\n")[0].split()
    try:
        is_ranks = len(words) == 2 and words[1].isdigit() and bool(base64.b64decode(words[0], validate=True))
    except ValueError:
        is_ranks = False
    if is_ranks:
        return "tiktoken"
    if begin[:1] == b"\n":  # the tag of the first piece, in protobuf's words
        return "sentencepiece"
    raise ModelError(
        f"'{path}' is neither a SentencePiece model nor a tiktoken file; it begins with {begin[:20]!r}.\n"
        "Download it again, or name a folder or hub id with a tokenizer.json: `tokenizer: ...`."
    )


def _read_ranks(path: Path) -> dict[bytes, int]:
    """The ranks of a tiktoken file: a line has bytes in base64, and their rank. Raises ModelError if it is cut off."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            word, rank = line.split()
            ranks[base64.b64decode(word, validate=True)] = int(rank)
        except ValueError:
            raise ModelError(f"'{path}': line {number} is no token and its rank. Download the file again.") from None
    return ranks


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _json(path: Path | None) -> dict[str, Any]:
    read = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    return read if isinstance(read, dict) else {}


def _file_of(name: str, file: str) -> Path | None:
    """A file of a folder or hub id, fetched if need be; None if it has none of that name, or cannot be reached."""
    folder = Path(name)
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except (OSError, ValueError):  # AutoTokenizer says why a name cannot be reached
        return None
