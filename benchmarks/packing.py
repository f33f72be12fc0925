"""Lengths -> packs: the share of the packs' room that is filled, and the time it takes, beside TRL's packer.

    python benchmarks/packing.py [--trl-python PYTHON] [--counts 100000 1000000]

The lengths are lognormal (median 300 tokens) and bimodal (short answers and longer documents), cut to packs of 4096.
TRL packs rows that hold tokens, so its time is with a column of token ids of those lengths; ours needs the lengths
alone.
"""

import argparse
import subprocess
import sys
import time

import numpy as np

CAPACITY = 4096


def lengths_of(mix: str, count: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    if mix == "lognormal":
        drawn = generator.lognormal(np.log(300), 1.0, count)
    else:
        short, long = generator.normal(150, 50, count), generator.normal(1500, 400, count)
        drawn = np.where(generator.random(count) < 0.7, short, long)
    return np.clip(drawn, 8, CAPACITY).astype(np.int64)


def ours(lengths: np.ndarray) -> tuple[float, int]:
    from finetuner.data.packing import best_fit_decreasing

    start = time.perf_counter()
    _, starts = best_fit_decreasing(lengths, CAPACITY)
    return time.perf_counter() - start, len(starts) - 1


def trl(lengths: np.ndarray) -> tuple[float, int]:
    import datasets
    import pyarrow
    from trl.data_utils import pack_dataset

    borders = pyarrow.array(np.concatenate([[0], np.cumsum(lengths)]), pyarrow.int64())
    ids = pyarrow.LargeListArray.from_arrays(borders, pyarrow.array(np.zeros(int(lengths.sum()), dtype=np.int32)))
    rows = datasets.Dataset(pyarrow.table({"input_ids": ids}))
    start = time.perf_counter()
    packs = pack_dataset(rows, CAPACITY, "bfd", {"batch_size": len(rows)})
    return time.perf_counter() - start, len(packs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python")
    parser.add_argument("--counts", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        tool, mix, count = given.worker.split(":")
        lengths = lengths_of(mix, int(count))
        seconds, num_packs = {"ours": ours, "trl": trl}[tool](lengths)
        fill = lengths.sum() / (num_packs * CAPACITY)
        print(f"{mix:9} {int(count):>9,} lengths  {tool:4}  {num_packs:>7,} packs  {fill:7.2%} full  {seconds:6.2f} s")
        return
    tools = {"ours": sys.executable} | ({"trl": given.trl_python} if given.trl_python else {})
    for mix in ("lognormal", "bimodal"):
        for count in given.counts:
            for tool, python in tools.items():
                done = subprocess.run(
                    [python, __file__, "--worker", f"{tool}:{mix}:{count}"], capture_output=True, text=True
                )
                print(done.stdout.strip() if done.returncode == 0 else f"{mix} {count} {tool}: {done.stderr[-300:]}")


if __name__ == "__main__":
    main()
