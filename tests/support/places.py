"""Folders of this repository, and what lies beside it."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
