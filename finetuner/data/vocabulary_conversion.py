"""Fast tokenizers made of the vocabulary files of other libraries: SentencePiece's, tekken and tiktoken's.

Each is a `tokenizers.Tokenizer` that gives the ids that the library gives; data/tokenizer_files.py checks that it does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from finetuner.data.new_tokenizers import byte_names

SPACE = "▁"  # SentencePiece's for a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # sentencepiece_model.proto, ModelProto.SentencePiece.Type


def sentencepiece_bpe(model: Any, *, prefix: bool, each_section: bool) -> Tokenizer:
    """Return the tokenizer of a SentencePiece model, a ModelProto, of the kind BPE.

    `prefix`: a space is put before a text. `each_section`: and before each part of it behind a special token.
    """
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    merges = [
        (scores[word], word[:at], word[at:])
        for word in scores
        for at in range(1, len(word))
        if word[:at] in scores and word[at:] in scores
    ]
    # The pair of the highest score is merged first; of the ways to make one piece, the one of earlier pieces.
    merges.sort(key=lambda merge: (-merge[0], vocab[merge[1] + merge[2]], vocab[merge[1]], vocab[merge[2]]))
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for _, left, right in merges],
            unk_token=next((piece.piece for piece in model.pieces if piece.type == UNKNOWN), None),
            fuse_unk=True,
            byte_fallback=any(piece.type == BYTE for piece in model.pieces),
        )
    )
    steps: list[Any] = []
    if model.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap))
    if prefix and not each_section:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    else:
        steps += [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    kinds = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=kinds[piece.type])
            for piece in model.pieces
            if piece.type in kinds
        ]
    )
    return tokenizer


def ranked_bpe(
    ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int], *, first: int = 0, nfc: bool = False
) -> Tokenizer:
    """Return the tokenizer of byte sequences with ranks, as tiktoken has it: of two neighbors those that together have
    the lowest rank are merged first, within the pieces that `pattern` cuts a text into.

    `special`: special token -> id. `first`: the id of rank 0. `nfc`: texts are composed (Unicode's NFC) first.
    """
    names = byte_names()
    named = {word: "".join(names[byte] for byte in word) for word in ranks}
    merges = [
        (rank, ranks[word[:at]], ranks[word[at:]], named[word[:at]], named[word[at:]])
        for word, rank in ranks.items()
        for at in range(1, len(word))
        if word[:at] in ranks and word[at:] in ranks
    ]
    merges.sort()
    vocab = {named[word]: rank + first for word, rank in ranks.items()} | dict(special)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[merge[3:] for merge in merges], ignore_merges=True))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    ordered = sorted(special, key=lambda token: special[token])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ordered])
    return tokenizer


def put_ends(tokenizer: Tokenizer, begin: str | None, end: str | None, *, byte_level: bool) -> None:
    """Let the tokenizer put `begin` before a text and `end` behind it, where they are not None."""
    ends = {token: tokenizer.token_to_id(token) for token in (begin, end) if token is not None}
    steps: Sequence[Any] = [processors.ByteLevel(trim_offsets=False)] if byte_level else []
    if ends:
        single = " ".join(filter(None, (begin, "$A", end)))
        pair = " ".join(filter(None, (begin, "$A", end, begin, "$B", end)))
        steps = [*steps, processors.TemplateProcessing(single, pair, list(ends.items()))]
    if steps:
        tokenizer.post_processor = processors.Sequence(list(steps))
