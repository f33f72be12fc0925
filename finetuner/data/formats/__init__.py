"""Rows become text: one file for each `type` of a dataset, called as the type is; instruction.py is for the block.

To add a type: write its file here, with a function `renderer` (base.BuildRenderer), and its row in
recipe/sections/datasets.py, which says its columns and keys.
"""

from importlib import import_module

from finetuner.data.formats.base import BuildRenderer


def load_format(name: str) -> BuildRenderer:
    """Return `renderer` of the format's file, for a name of recipe/sections/datasets.py's ROW_TYPES."""
    # by name and not from a table: the chat's modules import base.py from here, and a table would import them
    build: BuildRenderer = import_module(f"{__name__}.{name}").renderer
    return build
