"""Run `accelerate launch -m finetuner.train RECIPE [key=value ...]`: the same as `finetuner train`."""

import sys

from finetuner.cli import main

if __name__ == "finetuner.train":  # its name in the package is the function's
    raise ImportError("this module is run, not imported. To train from Python: finetuner.train(recipe)")

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
