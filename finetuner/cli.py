"""The command line: a table of commands, and a FinetunerError turned into a message and an exit code.

A command's module is imported only when that command is asked for, so that `finetuner --help` and `finetuner check`
start without torch.
"""

import importlib
import sys
import time
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from finetuner.console import quiet_imports
from finetuner.errors import FinetunerError
from finetuner.redaction import without_secrets
from finetuner.world import launched_rank

# Name -> help. The command `a-b` is the function `a_b` in finetuner/commands/a_b.py.
COMMANDS = {
    "train": "Train as the recipe says (several devices: accelerate launch -m finetuner.train RECIPE).",
    "merge": "Merge a trained adapter into its base model, to OUTPUT_DIR/merged.",
    "check": "Check a recipe and name every mistake in it, without loading anything. Other tools' recipes are taken "
    "too.",
    "env": "Say what a bug report needs: versions, devices, launcher variables, and what `check` says of RECIPE.",
    "plan": "Say what a run will compute: parameters by part, tokens, FLOPs, hours, memory; no weights are loaded.",
    "explain": "Say what a recipe key means, its type and default, and what it came to in RECIPE.",
    "schema": "Print the JSON Schema of a recipe, for editors (yaml-language-server).",
    "convert": "Write another tool's recipe as one of ours, with a comment where something changed.",
    "data": "Prepare the dataset, so that training finds it ready.",
    "preview": "Show what is trained on, token by token, without loading a model.",
    "evaluate": "Score base, adapter and merged model side by side: loss on held-out rows, answers, benchmark tasks.",
    "export": "Write a model for the tools that serve it, and check it by reading it back.",
    "push": "Upload a result to the hub, with the token of `hf auth login` or HF_TOKEN; what is there is not sent "
    "again.",
    "generate": "Write text with a model, or with what a recipe trained (an adapter on its base).",
    "chat": "Talk with a model, or with what a recipe trained: a line of input is a turn; /quit or the end of input "
    "ends.",
    "tokenizer": "Make the recipe's tokenizer, and say how much text its tokens stand for.",
    "import-gguf": "Turn a GGUF file into an ordinary safetensors model folder.",
}
HELP = {"help_option_names": ["-h", "--help"]}
SECONDS_FOR_RANK_0 = 15  # in which its launcher ends the other ranks; a busy node takes its time


class LazyCommands(TyperGroup):
    """Group whose help comes from the table, and whose commands are imported when one is chosen."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, placeholder, rest = super().resolve_command(ctx, args)
        if name is None:
            return name, placeholder, rest
        command = load_command(name)
        from finetuner.commands.option_overrides import read_options_as_overrides  # help imports no command

        return name, command, read_options_as_overrides(command, rest)


def load_command(name: str) -> Any:
    """Import the module of a command of the table, and return the command with its arguments."""
    function_name = name.replace("-", "_")
    function = vars(importlib.import_module(f"finetuner.commands.{function_name}"))[function_name]
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    single.command(name, help=COMMANDS[name], context_settings=HELP)(function)
    return typer.main.get_command(single)


app = LazyCommands(
    name="finetuner",
    help="Fine-tune language models from one YAML recipe.",
    commands={name: TyperCommand(name, help=text, callback=None) for name, text in COMMANDS.items()},
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=HELP,
)


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 the run failed, 2 the input is wrong, 75 stopped: start it again."""
    quiet_imports()
    try:
        app(arguments)
    except FinetunerError as error:
        if error.said:
            sys.exit(error.exit_code)
        rank = launched_rank()
        if rank:  # if rank 0 found the same, its launcher ends this process meanwhile, and it is said once
            time.sleep(SECONDS_FOR_RANK_0)
        message = without_secrets(str(error))
        sys.stderr.write(f"\nrank {rank}: {message}\n" if rank else f"\n{message}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
