"""Run `python -m finetuner.merge RECIPE [key=value ...]`: the same as `finetuner merge`."""

import sys

from finetuner.cli import main

if __name__ == "finetuner.merge":  # its name in the package is the function's
    raise ImportError("this module is run, not imported. To merge from Python: finetuner.merge(recipe)")

if __name__ == "__main__":
    main(["merge", *sys.argv[1:]])
