"""Bytes of text of each token, by which losses of different tokenizers become comparable (bits per byte)."""

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ONE_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...] | None:
    """Return, for each id, the UTF-8 bytes that it stands for; 0 for special tokens, which are no text.

    None if the tokens of the tokenizer do not determine them: it puts spaces between words, or changes letters. Three
    kinds of tokens do: byte-level ones, where a character is a byte; those with U+2581 for a space and <0x0A> for a
    single byte; and those that are joined as they are.
    """
    backend: Any = tokenizer.backend_tokenizer
    if backend.decoder is None or (backend.normalizer is not None and "Lowercase" in repr(backend.normalizer)):
        return None
    state = json.loads(backend.decoder.__getstate__())
    kinds = {part["type"] for part in state.get("decoders", [state])}
    if not kinds <= {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return None
    added = tokenizer.added_tokens_decoder

    def size(number: int, token: str) -> int:
        if number in added:
            return 0 if added[number].special else len(token.encode())
        if "ByteLevel" in kinds:
            return len(token)
        return 1 if _ONE_BYTE.fullmatch(token) else len(token.replace("▁", " ").encode())

    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return tuple(size(number, token or "") for number, token in enumerate(names))
