"""A folder's manifest: size and sha256 sum of every file, to find later what a disk or a copy has damaged."""

import hashlib
import json
from pathlib import Path

MANIFEST = "manifest.json"
FORMAT = 1


def seal_folder(folder: Path) -> None:
    """Write the manifest of all files in `folder`. To be called when nothing is added any more."""
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sums[str(path.relative_to(folder))] = {"sha256": _sha256(path), "bytes": path.stat().st_size}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": sums}, indent=1) + "\n")


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a sealed folder, in a few words, or None if every byte is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"it has format {manifest['format']}, this version reads {FORMAT}"
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} of {expected['bytes']} bytes"
            if _sha256(path) != expected["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
