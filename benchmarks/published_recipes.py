"""How many published recipes of Axolotl's load here: python benchmarks/published_recipes.py FOLDER [--text-sft]

A recipe *loads* if `finetuner check` finds no mistake (notes are allowed). Otherwise it is *refused by name* if every
problem names a capability that is not there, and *wrong* if any problem is of another kind: those are listed with
their first line, since each is either a mistake in the recipe or a gap in ours.

--text-sft counts only recipes for full or adapter fine-tuning on text by the next token: no preference learning, reward
models, images, audio or diffusion.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from finetuner.errors import RecipeError
from finetuner.recipe import load

OTHER_TRAINING = ("rl", "trl", "reward_model", "process_reward_model", "diffusion", "ebft", "kd_trainer")
NOT_TEXT = ("processor_type", "is_multimodal", "image_size", "image_resize_algorithm", "freeze_mm_modules")
PREFERENCE_ROWS = ("stepwise_supervised", "bradley_terry", "chatml.", "llama3.", "orpo.", "rwd.", "chat_template.arg")


def is_text_sft(path: Path) -> bool:
    """Judged from the keys alone, whatever else is wrong with the file. One that cannot be read counts."""
    try:
        values: Any = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError:
        return True
    if any(values.get(key) for key in (*OTHER_TRAINING, *NOT_TEXT)):
        return False
    entries = [entry for entry in values.get("datasets") or () if isinstance(entry, dict)]
    return not any(str(entry.get("type")).startswith(PREFERENCE_ROWS) for entry in entries)


def problems_of(path: Path) -> list[str]:
    try:
        load(path, check_files=False)
    except RecipeError as error:
        places = [line.partition(f"{path}:")[2] for line in str(error).splitlines() if line.startswith(f"{path}:")]
        return [place.partition(": ")[2] for place in places if ": " in place and place[:1].isdigit()] or [str(error)]
    return []


def capability_of(problem: str) -> str:
    return problem.partition("not supported yet: ")[2].partition(". ")[0].rstrip(".") or problem.partition(". ")[0]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text-sft", action="store_true", help="leave out preference learning, images, audio")
    parser.add_argument("--list", action="store_true", help="every recipe with its problems")
    options = parser.parse_args(arguments)
    kinds: Counter[str] = Counter()
    capabilities: Counter[str] = Counter()
    for path in sorted(options.folder.rglob("*.y*ml")):
        if "base_model:" not in path.read_text(encoding="utf-8", errors="replace"):
            continue
        if options.text_sft and not is_text_sft(path):
            kinds["left out"] += 1
            continue
        problems = problems_of(path)
        refused = [problem for problem in problems if "not supported" in problem]
        kind = "loads" if not problems else "refused by name" if len(refused) == len(problems) else "wrong"
        kinds[kind] += 1
        if kind == "refused by name":
            capabilities.update(set(map(capability_of, refused)))
        if kind == "wrong" or (options.list and problems):
            print(f"{kind}: {path.relative_to(options.folder)}")
            shown = problems if options.list else [problem for problem in problems if problem not in refused]
            print("".join(f"    {problem[:150]}\n" for problem in shown), end="")
    left_out = kinds.pop("left out", 0)
    total = sum(kinds.values())
    print(f"{total} recipes, {left_out} left out")
    for kind, count in kinds.most_common():
        print(f"{kind:<16} {count:>4}  {count / total:.1%}")
    print("".join(f"  {count:>4} {capability}\n" for capability, count in capabilities.most_common()), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
