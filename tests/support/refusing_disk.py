"""`finetuner.train` on ranks of which the second cannot write a file of more than 4 kB.

torchrun --nproc_per_node 2 -m support.refusing_disk RECIPE [key=value ...]
"""

import os
import resource
import signal
import sys

from finetuner.cli import main

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error in place of the signal
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    main(["train", *sys.argv[1:]])
