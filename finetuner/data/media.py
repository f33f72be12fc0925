"""Pictures, videos and sound in rows: they cannot be trained on yet, and their place in a text must not be learned."""

import re

NOT_YET = "pictures, videos and sound cannot be trained on yet"
MEDIA_NAME = re.compile(
    r"(images?|imgs?|pictures?|photos?|videos?|audios?|pixel_values|speech)(_?(file|path|url|bytes|base64|data)s?)?",
    re.IGNORECASE,
)
EDGES = "<> \n\t\r"  # with which a text that has a placeholder begins or ends
# LLaVA's and LLaMA-Factory's place of a picture at either end of a question. Within a text it is the name of a tag.
_AT_BEGIN = re.compile(r"\s*(<\|?(?:image|video|audio)_?\d*\|?>)")
_AT_END = re.compile(r"(<\|?(?:image|video|audio)_?\d*\|?>)\s*\Z")


def is_media(name: str) -> bool:
    """Whether a column or key of this name holds a picture, a video or sound."""
    return MEDIA_NAME.fullmatch(name) is not None


def find_placeholder(text: str) -> str | None:
    """Return the placeholder of a picture, video or sound with which a question begins or ends; None if it has none."""
    if text[:1] not in EDGES and text[-1:] not in EDGES:  # nearly all
        return None
    if not text.lstrip().startswith("<") and not text.rstrip().endswith(">"):
        return None
    found = _AT_BEGIN.match(text) or _AT_END.search(text, max(0, len(text) - 200))
    return None if found is None else found[1]


def placeholder_message(where: str, found: str) -> str:
    """Return the error for a text with a placeholder in it."""
    return (
        f"{where} has {found} in the place of a picture, video or sound, and {NOT_YET}: its name would be learned as "
        f'text. Leave the row out; or, if it is text, write `unused_columns: ["{found}"]` beside `path`'
    )
