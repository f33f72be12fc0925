"""A GGUF file converted to an ordinary model folder, which `from_pretrained(folder)` loads.

transformers reads the tensors; this module finds the file, refuses what would come out silently wrong, and writes the
folder so that it is either complete or absent.

SmolLM2-135M (98 MB, Q4_1) takes 14 to 18 s on one core, of which unpacking the weights is 1.3 s. gguf's reader builds
numpy views of each of 100,000 vocabulary strings, 3 s a time, once each for config, tokenizer and weights; transformers
rebuilds gguf's table of tensor names for every submodule (397 times, 4 to 5 s).
"""

import importlib.util
import io
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from logging import LogRecord, getLogger
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from finetuner.errors import ModelError
from finetuner.models.generation import generate_tokens, prompt_tokens, stream_text
from finetuner.models.gguf_header import GGUFHeader, read_gguf_header
from finetuner.models.stop_tokens import stop_token_ids
from finetuner.models.transformers_internals import forget_origin

SAVED_DTYPES = ("bfloat16", "float16", "float32")
PLAIN = "The sun rises in the east and sets in the west. Water is a liquid, and when it is very cold it turns to ice."
BEGINNING, NUM_TRIED = "The capital of France is", 8

# llama.cpp splits off every single digit before GPT-2's pattern for these values of `tokenizer.ggml.pre`. transformers
# 5.23 does not know them and keeps GPT-2's pattern alone: two spaces before a digit then become other tokens than the
# ones the model was trained on.
SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva"})


def import_gguf(
    source: Path,
    output: Path,
    dtype: str = "bfloat16",
    report: Callable[[str], None] = print,
    *,
    try_it: bool = True,
) -> Path:
    """Write the model, tokenizer and generation settings in `source` to the folder `output`; return its full path.

    `source` is a .gguf file, or a folder with exactly one. `output` must be absent or empty, and appears only when
    complete. Weights are unpacked and rounded to `dtype`, so nothing is gained over the quantized file but the format.
    `report` receives a line for each stage: reading, checking (with a text by the model, unless `try_it` is False),
    writing, done. Raises ModelError, also for a model that computes what is no number.
    """
    file, output = find_gguf(source).resolve(), output.resolve()
    if dtype not in SAVED_DTYPES:
        raise ModelError(
            f"dtype {dtype!r} is not one that weights are stored in; write one of {', '.join(SAVED_DTYPES)}"
        )
    _require_free(output)
    header = read_gguf_header(file)
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading {file} needs the package gguf, which is missing: pip install 'finetuner[gguf]'")

    report(f"reading {file} ({header.architecture}, {_megabytes([file])})")
    with _quiet_transformers():
        tokenizer, model = _load(file, header, dtype)

    if try_it:
        for line in try_out(model, tokenizer):
            report(line)
    report(f"writing {output} ({dtype})")
    with _complete_or_absent(output) as folder, _quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _require_same_tokenizer(file, folder, tokenizer)
    report(f"done: {output} ({_megabytes(output.iterdir())})")
    return output


@torch.no_grad()
def try_out(model: Any, tokenizer: Any) -> list[str]:
    """Return lines for the user: how the model goes on with a plain beginning, token by likeliest token; and a warning
    where it predicts plain English hardly better than a blind guess, ln(vocabulary) nats a token, as a model that was
    read wrongly does.

    Raises ModelError for logits that are not finite."""
    ids = torch.tensor([tokenizer(PLAIN).input_ids])
    logits = model(input_ids=ids).logits[0, :-1].float()
    if not bool(torch.isfinite(logits).all()):
        raise ModelError("the model computes values that are not finite: its weights are damaged. Get the file again")
    loss, blind = float(functional.cross_entropy(logits, ids[0, 1:])), math.log(logits.shape[-1])
    start = prompt_tokens(tokenizer, BEGINNING)
    stops = stop_token_ids(tokenizer, model.generation_config)
    tokens = generate_tokens(model, start, count=NUM_TRIED, choice=lambda row: int(row.argmax()), stops=stops)
    lines = [
        f"checking: {BEGINNING}{''.join(stream_text(tokenizer, start, tokens))!r}, {loss:.2f} nats a token of English"
    ]
    if loss > 0.8 * blind:
        lines.append(
            f"note: a blind guess has {blind:.2f}. This model never learned English, or transformers reads it wrongly "
            "from GGUF"
        )
    return lines


def find_gguf(source: Path) -> Path:
    """Return `source` if it is a file, or the only .gguf file in it. Raises ModelError for none and for several."""
    if not source.is_dir():
        if not source.is_file():
            raise ModelError(f"{source} does not exist; give a .gguf file, or a folder that holds one")
        return source
    files = sorted(path for path in source.iterdir() if path.suffix.lower() == ".gguf" and path.is_file())
    if not files:
        raise ModelError(f"the folder {source} holds no .gguf file; give the file, or the folder that holds it")
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise ModelError(f"the folder {source} holds {len(files)} .gguf files ({names}); name one, such as {files[0]}")
    return files[0]


def _load(file: Path, header: GGUFHeader, dtype: str) -> tuple[Any, Any]:
    """Return the tokenizer and the dense model in `file`. Raises ModelError for whatever transformers cannot read
    completely."""
    import transformers

    model_class: Any = transformers.AutoModelForCausalLM  # its declared result is not the pair it returns here
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        config = transformers.AutoConfig.from_pretrained(**where)
        _require_same_rope(file, header, config)
        if header.architecture == "gpt2":
            _fix_gpt2_config(config, header)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        model, loaded = model_class.from_pretrained(
            **where, config=config, dtype=dtype, output_loading_info=True, **_dense()
        )
    except ModelError:
        raise
    except Exception as error:  # the readers have no error of their own: ValueError, KeyError, IndexError, ...
        raise ModelError(
            f"{file}: transformers {transformers.__version__} cannot read this GGUF file of architecture "
            f"{header.architecture!r} ({type(error).__name__}: {error}). If its download was cut short, get it again; "
            "otherwise start from the model's safetensors folder, or try: pip install -U transformers"
        ) from error
    if missing := sorted({*loaded["missing_keys"], *loaded["mismatched_keys"]}):
        # transformers warns and fills such weights with random numbers.
        raise ModelError(f"{file} lacks {len(missing)} of the model's weights, such as {missing[0]}; get a whole file")

    if header.values.get("tokenizer.ggml.pre") in SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = _single_digits()
    forget_origin(model.config)  # the file's title
    assert "quantization_config" not in model.config.to_dict(), "the weights are still packed and cannot be saved"
    return tokenizer, model


def _require_same_rope(file: Path, header: GGUFHeader, config: Any) -> None:
    """Refuse a file whose scaled positions did not reach the config: the model would be wrong, at length above all."""
    if header.scales_rope and not _scales_rope(config.to_dict().get("rope_parameters") or {}):
        raise ModelError(
            f"{file} scales its rotary positions, but transformers reads {header.architecture!r} from GGUF without "
            "that scaling, so the model would differ. Start from the model's safetensors folder instead"
        )


def _fix_gpt2_config(config: Any, header: GGUFHeader) -> None:
    """Correct the config in place: transformers reads the length of the table of positions into a name that its GPT-2
    does not have, passes over the width of the inner layer, and ties a head that the file has."""
    config.n_positions = header.values.get("gpt2.context_length", config.n_positions)
    config.n_inner = header.values.get("gpt2.feed_forward_length", config.n_inner)
    config.tie_word_embeddings = "output.weight" not in header.tensors


def _scales_rope(parameters: dict[str, Any]) -> bool:
    """Return whether any rope in `parameters`, which may have one set for each type of layer, is not the default."""
    nested = (value for value in parameters.values() if isinstance(value, dict))
    return parameters.get("rope_type", "default") != "default" or any(map(_scales_rope, nested))


def _require_same_tokenizer(file: Path, folder: Path, tokenizer: Any) -> None:
    """Refuse a folder whose tokenizer does not load as the one in the file: transformers 5.3 picks another class."""
    import transformers

    probe = " ".join([*tokenizer.all_special_tokens, "Naïve  text,\n\twith 2  numbers: 10"])
    expected = tokenizer(probe)["input_ids"]
    saved = transformers.AutoTokenizer.from_pretrained(folder)(probe)["input_ids"]
    if saved != expected:
        raise ModelError(
            f"{file}: transformers {transformers.__version__} saves its tokenizer so that text becomes other tokens "
            f"({saved[:8]}... instead of {expected[:8]}...); try: pip install -U transformers"
        )


def _dense() -> dict[str, Any]:
    """Return the argument that unpacks the weights. transformers before GgufConfig always unpacks them."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _single_digits() -> Any:
    """The pre-tokenizer that splits off every digit, and then is GPT-2's."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def _require_free(output: Path) -> None:
    """Raise ModelError unless `output` is absent or an empty folder."""
    if output.exists() and not output.is_dir():
        raise ModelError(f"{output} is a file; give a folder that does not exist yet")
    if output.is_dir() and any(output.iterdir()):
        raise ModelError(f"the folder {output} exists and is not empty; give another one, or delete it: rm -r {output}")


@contextmanager
def _complete_or_absent(output: Path) -> Iterator[Path]:
    """Yield a staging folder that is renamed to `output` at the end, and removed if the body raises.

    A killed process leaves the hidden folder behind; the next import to `output` removes it. Raises ModelError if the
    disk refuses.
    """
    from safetensors import SafetensorError

    staging = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        for file in staging.iterdir():  # safetensors writes 0600 whatever the umask: others could not load the weights
            shutil.copymode(staging / "config.json", file)
        if output.exists():
            output.rmdir()
        staging.rename(output)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot write the folder {output}: {error}. Give another folder, or make room") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_no_device_note(record: LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' warnings and progress bars; the user's settings are back afterwards, also on an error."""
    from transformers.utils import logging

    with ExitStack() as undo:
        undo.callback(logging.set_verbosity, logging.get_verbosity())
        deepspeed = getLogger("DeepSpeed")  # imported with transformers where it is installed; it warns of a CPU
        deepspeed.addFilter(_is_no_device_note)
        undo.callback(deepspeed.removeFilter, _is_no_device_note)
        logging.set_verbosity_error()
        if logging.is_progress_bar_enabled():
            undo.callback(logging.enable_progress_bar)
            logging.disable_progress_bar()
        # One bar, over the GGUF tensors, is tqdm's own and does not heed the switch above.
        undo.enter_context(redirect_stderr(io.StringIO()))
        yield


def _megabytes(files: Iterable[Path]) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"
