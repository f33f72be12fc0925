"""`finetuner export`: write a model for llama.cpp or Ollama, or check it for vLLM."""

from pathlib import Path
from typing import Annotated

import typer

from finetuner.console import Screen, quiet_libraries
from finetuner.errors import ModelError
from finetuner.export.gguf_export import export_gguf
from finetuner.export.gguf_source import read_source
from finetuner.export.ollama_modelfile import modelfile
from finetuner.export.vllm_check import check_for_vllm


def export(
    model: Annotated[Path, typer.Argument(help="The folder of a full or merged model.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="gguf, ollama or vllm", show_default=False)],
    form: Annotated[str, typer.Option(help="How GGUF stores weights: f16 or q8_0.")] = "f16",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the files; default: MODEL's own.")] = None,
) -> None:
    """Write `model` for llama.cpp or Ollama, or check it for vLLM. Raises FinetunerError."""
    screen = Screen(enabled=True)
    if to not in ("gguf", "ollama", "vllm"):
        raise ModelError(f"--to {to} is not a tool that can be written for. Write gguf, ollama or vllm.")
    quiet_libraries(screen)
    if to == "vllm":
        checked = check_for_vllm(model)
        for line in checked.facts:
            screen.line(line)
        screen.line(f"serve it: {checked.command}")
        return
    folder = model if out is None else out
    file = folder / f"{model.resolve().name}-{form}.gguf"
    page = modelfile(file.name, read_source(model).tokenizer) if to == "ollama" else None
    with screen.work("writing", "MB") as work:
        agreement = export_gguf(model, file, form, work.at_bytes)
    screen.line(f"verified, read back, against {model}: {agreement}")
    if page is not None:
        (folder / "Modelfile").write_text(page, encoding="utf-8")
        screen.line(f"create it: ollama create {model.resolve().name} -f {folder / 'Modelfile'}")
    screen.line(f"done: {file}")
