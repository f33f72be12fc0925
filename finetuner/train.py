"""Run `accelerate launch -m finetuner.train RECIPE [key=value ...]`: the same as `finetuner train`."""

import sys

from finetuner.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
