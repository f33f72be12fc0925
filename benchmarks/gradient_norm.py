"""The norm of a gradient of a real vocabulary: how exact, and at what cost beside torch's own.

python benchmarks/gradient_norm.py [--rows 49152] [--width 128] [--repeats 9]
"""

import argparse
import statistics
import time

import torch

from finetuner.parallel.gradient_norm import sum_of_squares


def seconds(work, repeats: int) -> float:
    """Median of `repeats` runs of `work`."""
    taken = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=49152)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    gradient = torch.randn(arguments.rows, arguments.width) / 3
    exact = float(gradient.double().square().sum().sqrt())
    print(f"{gradient.numel():,} elements, norm {exact:.6f} in fp64")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ours = float(sum_of_squares([gradient], gradient.device).sqrt())
        theirs = float(torch.nn.utils.get_total_norm([gradient]))
        pairs = [
            (
                seconds(lambda: sum_of_squares([gradient], gradient.device), arguments.repeats),
                seconds(lambda: torch.nn.utils.get_total_norm([gradient]), arguments.repeats),
            )
            for _ in range(5)
        ]
        mine, other = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(
            f"{threads} thread(s): off by {abs(ours / exact - 1):.1e} here, {abs(theirs / exact - 1):.1e} by torch; "
            f"{mine * 1e3:.2f} ms and {other * 1e3:.2f} ms, ratio {mine / other:.2f}"
        )


if __name__ == "__main__":
    main()
