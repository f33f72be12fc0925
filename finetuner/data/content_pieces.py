"""The text of a content in pieces, as OpenAI, Anthropic, Bedrock and Gemini write it; thoughts and calls among them."""

from typing import Any

from finetuner.data.media import NOT_YET, is_media
from finetuner.data.tool_calls import calls_in_text
from finetuner.errors import DataError

# Types of pieces, and what each is.
_KINDS = {
    "text": "text", "input_text": "text", "output_text": "text",
    "reasoning": "thought", "thinking": "thought", "tool_call": "tool_call",
}  # fmt: skip
_TEXT_KEYS = ("text", "value", "content", "thinking", "reasoning")
PIECE_KEYS = ("type", *_TEXT_KEYS, "thought", "cache_control", "signature")  # those that are read, or are nobody's text
_ANTHROPIC = {
    "tool_use": "write its name and input as the message's `tool_calls: [{name, arguments}]`",
    "tool_result": "write its content as a message of the role `tool`, before what else the turn says",
    "redacted_thinking": "it is a thought that nobody can read: remove it",
    "functionCall": "write its name and args as the message's `tool_calls: [{name, arguments}]`",
    "functionResponse": "write its response as a message of the role `tool`",
    "toolUse": "write its name and input as the message's `tool_calls: [{name, arguments}]`",
    "toolResult": "write its content as a message of the role `tool`, before what else the turn says",
}


def _kind_of_piece(piece: dict[str, Any]) -> str | None:
    """Return "text", "thought" or "tool_call"; None for other pieces. Bedrock's and Gemini's texts have no type."""
    if piece.get("type") is None:
        said = {key for key, value in piece.items() if value not in (None, False)}
        if said == {"text", "thought"} and piece["thought"] is True:
            return "thought"
        return "text" if said == {"text"} else None
    kind = piece["type"]
    return _KINDS.get(kind) if isinstance(kind, str) else None


def is_text_piece(piece: dict[str, Any]) -> bool:
    """Whether a piece of a content is a text, a thought or the text of a call."""
    return _kind_of_piece(piece) is not None


def joined_pieces(pieces: list[Any], message: dict[str, Any], turn: int) -> str:
    """Return the text of a content in pieces; thoughts and tool calls among them become keys of the message.

    Raises DataError for a piece that is no text, such as a picture.
    """
    texts, thoughts, calls = [], [], []
    for piece in pieces:
        kind, value = _kind_and_text(piece, turn)
        if kind == "text":
            texts.append(value)
        elif kind == "tool_call":
            calls += calls_in_text(value, turn)
        else:
            thoughts.append(value)
    for key, values in (("reasoning_content", thoughts), ("tool_calls", calls)):
        if values and message.get(key):
            raise DataError(f"message {turn} has '{key}' both as a key and among the pieces of its content. Remove one")
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return "".join(texts)


def system_text(cell: Any) -> Any:
    """Return the text of a system cell in pieces, [{"text": ...}] or Gemini's {"parts": [...]}; others unchanged."""
    pieces = cell.get("parts") if isinstance(cell, dict) and cell.keys() <= {"role", "parts"} else cell
    if not isinstance(pieces, list):
        return cell
    texts = [piece["text"] for piece in pieces if isinstance(piece, dict) and _kind_of_piece(piece) == "text"]
    is_all = len(texts) == len(pieces) and all(isinstance(text, str) for text in texts)
    return "".join(texts) if is_all else cell


def _kind_and_text(piece: Any, turn: int) -> tuple[str, str]:
    """Return kind and text of a piece of a content. Raises DataError if it is no text, such as an image."""
    if isinstance(piece, str):
        return "text", piece
    given: dict[str, Any] = piece if isinstance(piece, dict) else {}
    kind, name = _kind_of_piece(given), given.get("type")
    if kind is not None:
        named = [given[key] for key in _TEXT_KEYS if given.get(key)]
        if len(named) <= 1 and all(isinstance(value, str) for value in named):
            return kind, "".join(named)
    if isinstance(name, str) and is_media(name.removeprefix("input_")):
        raise DataError(f"message {turn}: a part of its content is of the type '{name}', and {NOT_YET}: {piece!r:.100}")
    advice = next((text for word, text in _ANTHROPIC.items() if word == name or (name is None and word in given)), "")
    raise DataError(
        f"message {turn}: this part of its content is not text: {piece!r:.150}{' - ' * bool(advice)}{advice}"
    )
