"""The command line: parse, call run, and turn a FinetunerError into a message and an exit code."""

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from finetuner.errors import FinetunerError, RecipeError

app = typer.Typer(
    name="finetuner",
    help="Fine-tune language models from one YAML recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Recipe keys to set, such as learning_rate=1e-4.", show_default=False
    ),
]


@app.command()
def train(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Train as the recipe says (several devices: accelerate launch -m finetuner.train RECIPE)."""
    from finetuner.recipe import load

    loaded = load(recipe, overrides or [])
    from finetuner.run import train as run  # imports torch: only once the recipe is known to be right

    run.train(loaded, recipe)


@app.command()
def merge(
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|ADAPTER", help="A recipe, or the folder of an adapter.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Recipe keys, and: output=FOLDER dtype=float32 shard_size=5GB base=original verify=false.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Merge a trained adapter into its base model, to OUTPUT_DIR/merged."""
    from finetuner.export.merge_options import read_wishes
    from finetuner.recipe import load

    if not Path(target).is_dir():  # what is wrong with a recipe is said before torch is imported
        load(target, read_wishes(overrides or []).others)
    from finetuner.commands.merge import merge as run_merge

    run_merge(target, overrides or [])


@app.command()
def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also what is accepted without effect.")] = False,
) -> None:
    """Check a recipe and name every mistake in it, without loading anything. Other tools' recipes are taken too."""
    from finetuner.recipe.convert import check as check_recipe

    for line in check_recipe(recipe, overrides or [], verbose=verbose):
        typer.echo(line)


@app.command()
def env(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", show_default=False)] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="The facts as JSON.")] = False,
) -> None:
    """Say what a bug report needs: versions, devices, launcher variables, and what `check` says of RECIPE."""
    from finetuner.commands.env import env as describe

    typer.echo(describe(recipe, overrides or [], as_json=as_json))


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    devices: Annotated[str, typer.Option(help="How many, of which kind: 8, or 8xH100.")] = "1",
    flops: Annotated[
        float | None, typer.Option(help="FLOPs a second of one device, such as 312e12.", show_default=False)
    ] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="The share of it that training reaches.")] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="The figures as JSON.")] = False,
) -> None:
    """Say what a run will compute: parameters by part, tokens, FLOPs, hours, memory; no weights are loaded."""
    from finetuner.commands.plan import devices_of
    from finetuner.commands.plan import plan as show
    from finetuner.recipe import load

    loaded = load(recipe, overrides or [], check_files=False)
    there = devices_of(devices, flops or loaded.recipe.output.device_peak_flops)
    show(loaded, recipe, there, mfu, as_json=as_json)


@app.command()
def explain(
    key: Annotated[str, typer.Argument(help="A recipe key, such as lora_r or datasets.type.", show_default=False)],
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", show_default=False)] = None,
    overrides: Overrides = None,
) -> None:
    """Say what a recipe key means, its type and default, and what it came to in RECIPE."""
    from finetuner.recipe import load
    from finetuner.recipe.explain import explain as explained

    typer.echo(explained(key, load(recipe, overrides or [], check_files=False) if recipe else None))


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="The reference as a page instead.")] = False,
) -> None:
    """Print the JSON Schema of a recipe, for editors (yaml-language-server)."""
    from finetuner.recipe.explain import json_schema, reference

    typer.echo(reference().rstrip() if markdown else json.dumps(json_schema(), indent=1))


@app.command()
def convert(
    foreign: Annotated[str, typer.Argument(help="A recipe of Axolotl, LLaMA-Factory or TRL.", show_default=False)],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write; default: the screen.")] = None,
) -> None:
    """Write another tool's recipe as one of ours, with a comment where something changed."""
    from finetuner.recipe.convert import convert as converted
    from finetuner.recipe.convert import write_new

    result = converted(foreign)
    if out is None:
        typer.echo(result.text.rstrip())
    else:
        write_new(out, result.text)
        typer.echo(f"{foreign}, a recipe of {result.tool}, is now {out}. Next: finetuner check {out}")


@app.command()
def data(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Prepare the dataset, so that training finds it ready."""
    from finetuner.recipe import load

    loaded = load(recipe, overrides or [])
    from finetuner.commands.data import prepare_data

    prepare_data(loaded, recipe)


@app.command()
def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", "--count", min=0, help="Documents to show of each source.")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="Rows to read of each source.")] = 2000,
    source: Annotated[
        int | None, typer.Option("--source", "-k", help="Only this one of `datasets`, counted from 0.")
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Each token with its id.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page too: lengths, packs, dropped rows.")] = None,
) -> None:
    """Show what is trained on, token by token, without loading a model."""
    from finetuner.recipe import load

    loaded = load(recipe, overrides or [])
    from finetuner.commands.preview import preview as show

    show(loaded, recipe, count=count, rows=rows, source=source, ids=ids, html=html)


@app.command()
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help="A recipe, the folder of its run, or a model's or adapter's folder or hub id.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    questions: Annotated[int, typer.Option(min=0, help="Held-out questions to answer; 0: none.")] = 100,
    data: Annotated[list[str] | None, typer.Option(help="A file of rows to measure by; several are sources.")] = None,
    type: Annotated[str | None, typer.Option(help="How the rows of --data read, as datasets.type.")] = None,
    recipe: Annotated[str | None, typer.Option(help="For a MODEL: the recipe whose held-out rows to take.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Benchmark tasks of lm-eval, such as hellaswag,arc_easy.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder with YAML tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task to take.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the results; default: MODEL's.")] = None,
) -> None:
    """Score base, adapter and merged model side by side: loss on held-out rows, answers, benchmark tasks."""
    if not Path(target).is_dir() and Path(target).suffix in (".yml", ".yaml"):
        from finetuner.recipe import load

        load(target, overrides or [])  # what is wrong with a recipe is said before torch is imported
    from finetuner.evaluation.benchmark_tasks import Tasks
    from finetuner.evaluation.evaluate import Wishes
    from finetuner.evaluation.evaluate import evaluate as score

    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    if not names and (include_path is not None or limit is not None):
        raise RecipeError("--include-path and --limit are about benchmark tasks. Name some: --tasks hellaswag")
    chosen = Tasks(names, include_path, limit) if names else None
    score(target, overrides or [], Wishes(questions, tuple(data or ()), type, recipe, chosen, out))


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="The folder of a whole or merged model.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="gguf, ollama or vllm", show_default=False)],
    form: Annotated[str, typer.Option(help="How GGUF keeps weights: f16 or q8_0.")] = "f16",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the files; default: MODEL's own.")] = None,
) -> None:
    """Write a model for the tools that serve it, and check it by reading it back."""
    from finetuner.commands.export import export as write

    write(model, to, form, out)


ModelOrRecipe = Annotated[
    str, typer.Argument(metavar="MODEL_OR_RECIPE", help="A model's folder or hub id, or a recipe.", show_default=False)
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw among the likeliest that have this share.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed writes the same text.")]


@app.command()
def push(
    target: Annotated[
        str,
        typer.Argument(metavar="FOLDER|RECIPE", help="An adapter, a merged model, or a recipe.", show_default=False),
    ],
    to: Annotated[str | None, typer.Option("--to", help="The repository; default: the recipe's hub_model_id.")] = None,
    public: Annotated[bool, typer.Option("--public", help="For everyone, if the repository is new.")] = False,
) -> None:
    """Upload a result to the hub, with the token of `hf auth login` or HF_TOKEN; what is there is not sent again."""
    from finetuner.commands.push import push as upload

    upload(target, to, public=public)


@app.command()
def generate(
    source: ModelOrRecipe,
    overrides: Overrides = None,
    prompt: Annotated[str, typer.Option(help="How the text begins.")] = "",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.8,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Write text with a model, or with what a recipe trained (an adapter on its base)."""
    from finetuner.commands.generate import Manner
    from finetuner.commands.generate import generate as write_text

    write_text(source, overrides or [], prompt, Manner(max_new_tokens, temperature, top_p, seed), _write_at_once)


@app.command()
def chat(
    source: ModelOrRecipe,
    overrides: Overrides = None,
    system: Annotated[str, typer.Option(help="An instruction at the head of the conversation.")] = "",
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = 0,
) -> None:
    """Talk with a model, or with what a recipe trained: a line of input is a turn; /quit or the end of input ends."""
    from finetuner.commands.chat import chat as talk
    from finetuner.commands.generate import Manner

    manner = Manner(max_new_tokens, temperature, top_p, seed)
    talk(
        source,
        overrides or [],
        system,
        manner,
        _lines_of_input,
        _write_at_once,
        lambda text: typer.echo(text, err=True),
    )


def _write_at_once(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _lines_of_input() -> Iterator[str]:
    """From a person, who is asked with a mark and may edit the line; or from a file or pipe."""
    from finetuner.world import stream_is_terminal

    if not stream_is_terminal(sys.stdin):
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # lends its editing to input()
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            sys.stdout.write("\n")
            return
        yield line


@app.command()
def tokenizer(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Make the recipe's tokenizer, and say how much text its tokens stand for."""
    from finetuner.recipe import load

    loaded = load(recipe, overrides or [])
    from finetuner.commands.tokenizer import make_tokenizer

    make_tokenizer(loaded)


@app.command("import-gguf")
def import_gguf(
    source: Annotated[Path, typer.Argument(help="A .gguf file, or a folder that holds one.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="The model folder to write.", show_default=False)],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
) -> None:
    """Turn a GGUF file into an ordinary safetensors model folder."""
    from finetuner.models.gguf_import import import_gguf as convert

    convert(source, output, dtype, typer.echo)


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 2 the input is wrong, 1 the run failed."""
    try:
        app(arguments)
    except FinetunerError as error:
        if error.said:
            sys.exit(error.exit_code)
        rank = _rank()
        if rank:  # if rank 0 found the same, its launcher ends this process meanwhile, and it is said once
            time.sleep(15)  # a busy node takes its time
        from finetuner.redaction import without_secrets

        message = without_secrets(str(error))
        sys.stderr.write(f"\nrank {rank}: {message}\n" if rank else f"\n{message}\n")
        sys.exit(error.exit_code)


def _rank() -> int:
    from finetuner.world import launched_rank

    return launched_rank()


if __name__ == "__main__":
    main()
