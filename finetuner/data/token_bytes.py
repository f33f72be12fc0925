"""How many bytes of text a token stands for: what makes losses of different tokenizers comparable."""

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ONE_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def token_bytes(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...] | None:
    """Id -> bytes in UTF-8; 0 for special tokens, which are no text. None for a tokenizer whose tokens do not say what
    they stand for (it puts spaces between words, or changes letters).

    Three kinds say it: byte-level ones, where a character of the token is a byte; those that write a space as the sign
    U+2581 and a lone byte as <0x0A>; and those whose tokens are joined as they are.
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
