"""Run `python -m finetuner.merge RECIPE [key=value ...]`: the same as `finetuner merge`."""

import sys

from finetuner.cli import main

if __name__ == "__main__":
    main(["merge", *sys.argv[1:]])
