"""`finetuner import-gguf`: a GGUF file as a safetensors model folder."""

from pathlib import Path
from typing import Annotated

import typer

from finetuner.models.gguf_import import import_gguf as convert_gguf


def import_gguf(
    source: Annotated[Path, typer.Argument(help="A .gguf file, or a folder that holds one.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="The model folder to write.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
) -> None:
    """Write the model folder `output`. Raises ModelError."""
    convert_gguf(source, output, dtype, typer.echo)
