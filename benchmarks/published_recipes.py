"""How many published recipes of Axolotl's load here: python benchmarks/published_recipes.py FOLDER

A recipe *loads* if `finetuner check` finds no mistake (notes are allowed). Otherwise it is *refused by name* if every
problem names a capability that is not there yet, and *wrong* if any problem is of another kind: those are listed with
their first line, since each is either a mistake in the recipe or a gap in ours.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from finetuner.errors import RecipeError
from finetuner.recipe import load


def problems_of(path: Path) -> list[str]:
    try:
        load(path, check_files=False)
    except RecipeError as error:
        places = [line.partition(f"{path}:")[2] for line in str(error).splitlines() if line.startswith(f"{path}:")]
        return [place.partition(": ")[2] for place in places if ": " in place and place[:1].isdigit()] or [str(error)]
    return []


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--list", action="store_true", help="every recipe with its problems")
    options = parser.parse_args(arguments)
    kinds: Counter[str] = Counter()
    capabilities: Counter[str] = Counter()
    for path in sorted(options.folder.rglob("*.y*ml")):
        if "base_model:" not in path.read_text(encoding="utf-8", errors="replace"):
            continue
        problems = problems_of(path)
        refused = [problem for problem in problems if "not supported yet" in problem]
        kind = "loads" if not problems else "refused by name" if len(refused) == len(problems) else "wrong"
        kinds[kind] += 1
        if kind == "refused by name":
            capabilities.update({problem.partition("not supported yet: ")[2].partition(". ")[0] for problem in refused})
        if kind == "wrong" or (options.list and problems):
            print(f"{kind}: {path.name}")
            print(
                "".join(f"    {problem[:150]}\n" for problem in problems if options.list or problem not in refused),
                end="",
            )
    total = sum(kinds.values())
    for kind, count in kinds.most_common():
        print(f"{kind:<16} {count:>4}  {count / total:.1%}")
    print("".join(f"  {count:>4} {capability}\n" for capability, count in capabilities.most_common()), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
