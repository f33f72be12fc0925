"""Recognize by its first bytes a file that holds no rows as they are, and say what turns it into rows."""

import re

from finetuner.errors import RowFileError

HEAD_BYTES = 512

# (first bytes, what the file is, what to do)
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs.github.com",
        "is a pointer of Git LFS and not the file itself",
        "Fetch it: git lfs pull",
    ),
    (b"PAR1", "is a Parquet file", "Write `ds_type: parquet`"),
    (b"ARROW1", "is an Arrow file", "Write `ds_type: arrow`"),
    (b"7z\xbc\xaf\x27\x1c", "is packed with 7-Zip", "Unpack it: 7z x FILE"),
    (b"Rar!\x1a\x07", "is packed with RAR", "Unpack it: unrar x FILE"),
    (b"LZIP", "is packed with lzip", "Unpack it: lzip -d FILE"),
    (b"\x89LZO", "is packed with lzop", "Unpack it: lzop -d FILE"),
    (b"\x1f\x9d", "is packed with compress", "Unpack it: uncompress FILE"),
    (b"\xff\x06\x00\x00sNaPpY", "is packed with Snappy", "Unpack it: snzip -d FILE"),
    (b"SQLite format 3\x00", "is an SQLite database", "Write its rows as JSON: sqlite3 -json FILE 'select ...'"),
    (b"\xd0\xcf\x11\xe0", "is an Excel or Word file", "Save it as CSV (UTF-8)"),
    (b"%PDF", "is a PDF", "Write its text to a .txt file"),
    (b"\x89HDF", "is an HDF5 file", "Write its rows as JSON lines or Parquet"),
    (b"\x93NUMPY", "is a NumPy array", "Write its rows as JSON lines or Parquet"),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05][\x00-\xff]")
_PAGE = re.compile(rb"\s*<(?:!doctype html|html)[\s>]", re.IGNORECASE)
_TAR_MAGIC_AT = 257


def require_rows(head: bytes, *, may_be_page: bool) -> None:
    """Raise RowFileError if a file, unpacked, begins as no file of UTF-8 rows does. `head`: its first bytes.

    `may_be_page`: HTML is text to learn from, not the page that a server sends in the place of a file.
    """
    for start, kind, advice in _KINDS:
        if head.startswith(start):
            raise RowFileError(f"it {kind}.\n{advice}")
    if head[_TAR_MAGIC_AT:].startswith(b"ustar"):
        raise RowFileError("it is a tar archive.\nUnpack it: tar xf FILE")
    if _PICKLE.match(head) and b"\n" not in head[:2]:
        raise RowFileError("it is a pickle, which may run code and is not read.\nWrite its rows as JSON lines")
    if not may_be_page and _PAGE.match(head):
        raise RowFileError("it is an HTML page, as servers send in the place of a file.\nCheck where it came from")
    encoding = wide_encoding(head)
    if encoding is not None:
        raise RowFileError(
            f"it is text in {encoding}, as Windows PowerShell's `>` and some editors write it; rows are UTF-8.\n"
            f"Write it anew: iconv -f {encoding} -t UTF-8 FILE > NEW, or in PowerShell 7: "
            "Get-Content FILE | Set-Content -Encoding utf8NoBOM NEW"
        )


def wide_encoding(head: bytes) -> str | None:
    """Return "UTF-16" or "UTF-32", with the byte order if no mark says it, for a text of 2 or 4 bytes a character."""
    if head.startswith((b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")):
        return "UTF-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # no UTF-8 begins so
        return "UTF-16"
    if len(head) < 8 or b"\x00" not in head[:8]:
        return None
    zeros = [_share_of_zeros(head[i::4]) for i in range(4)]
    for name, expected in (
        ("UTF-32LE", (0, 1, 1, 1)), ("UTF-32BE", (1, 1, 1, 0)), ("UTF-16LE", (0, 1, 0, 1)), ("UTF-16BE", (1, 0, 1, 0)),
    ):  # fmt: skip
        if all((share > 0.5) == bool(zero) for share, zero in zip(zeros, expected, strict=True)):
            return name
    return None


def _share_of_zeros(data: bytes) -> float:
    return data.count(0) / max(1, len(data))
