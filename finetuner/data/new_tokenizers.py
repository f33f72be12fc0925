"""Build new tokenizers: of bytes, of characters, or a byte-level BPE trained on text.

Each is saved as a fast tokenizer of transformers. All have an end-of-text token, which also pads (padding is never
trained on), and none puts anything before a text.
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"


def byte_names() -> list[str]:
    """Return, for each byte, the character that stands for it in a byte-level vocabulary.

    A printable byte stands for itself, the others for characters from 256 on, in the order of the bytes: GPT-2's
    choice, and that of `tokenizers`' ByteLevel.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte if byte in visible else 256 + hidden.index(byte)) for byte in range(256)]


def write_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer of 257 tokens: token i is byte i, and 256 is end-of-text."""
    tokenizer = Tokenizer(models.BPE(vocab={name: byte for byte, name in enumerate(byte_names())}, merges=[]))
    _make_byte_level(tokenizer)
    _write(tokenizer, folder)


def write_char_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Write a tokenizer of the characters of `texts`, in Unicode order, then end-of-text, then unknown."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    vocabulary = {character: i for i, character in enumerate(sorted(characters))}
    vocabulary |= {END_OF_TEXT: len(vocabulary), UNKNOWN: len(vocabulary) + 1}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    _write(tokenizer, folder, unknown=UNKNOWN)


def train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Write a byte-level BPE (arXiv:1508.07909, on bytes as GPT-2's) of `vocab_size` tokens, trained on `texts`.

    Its tokens are end-of-text, the 256 bytes, and the most frequent pairs.
    """
    tokenizer = Tokenizer(models.BPE())
    _make_byte_level(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _write(tokenizer, folder)


def _make_byte_level(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()


def _write(tokenizer: Tokenizer, folder: Path, unknown: str | None = None) -> None:
    from transformers import PreTrainedTokenizerFast

    roles = {"unk_token": unknown} if unknown else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        **roles,
    ).save_pretrained(folder)
