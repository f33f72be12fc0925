r"""How many published recipes load or convert here: python benchmarks/published_recipes.py FOLDER ... [--text-sft]

The figures of RESULTS.md, from the folders of the tools' sdists and of two repositories:

    python benchmarks/published_recipes.py --text-sft --from WORK \
        axolotl/examples llamafactory/examples alignment-handbook/recipes open-r1/recipes

WORK holds LLaMA-Factory's folder `data`, which its recipes name by a relative path.

A recipe of Axolotl's is loaded as `finetuner check` does, one of LLaMA-Factory's or TRL's is converted as `finetuner
convert` does, and what comes out is loaded. It is *accepted* if that finds no mistake (notes are allowed). Otherwise it
is *refused by name* if every problem names a capability that is not there, and *wrong* if any problem is of another
kind: those are listed with their first line, since each is either a mistake in the recipe or a gap in ours.

--text-sft counts recipes for full or adapter fine-tuning of a language model on text by the next token. Left out, and
counted by reason, are those that ask for what has issues of its own: preference and reward models (and distillation,
energy-based and diffusion training), pictures and sound, and options of mixtures of experts: how their weights are
stored, quantized, adapted or spread, and the loss of their router (a mixture trained without such an option counts).
Precision, kernels, several GPUs for one sequence and the like count, and are refused. The reason is judged from the
keys alone, whatever else is wrong with the file; one that cannot be read counts. Files that train nothing (exporting,
generating, datasets for another tool) are left out as well.

--sample N prints N accepted recipes of each folder, the same for the same N, each with all its notes, to be read by
hand for a changed meaning. --from FOLDER reads as if started there, for recipes that name files by relative paths.
"""

import argparse
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetuner.errors import RecipeError
from finetuner.recipe import load
from finetuner.recipe.convert import convert

PREFERENCE = (
    "rl", "trl", "reward_model", "process_reward_model", "diffusion", "ebft", "kd_trainer", "pref_beta", "pref_loss",
    "reward_funcs", "kto_chosen_weight",
)  # fmt: skip
PREFERENCE_STAGES = ("dpo", "kto", "ppo", "rm", "orpo", "simpo")
PREFERENCE_ROWS = ("stepwise_supervised", "bradley_terry", "chatml.", "llama3.", "orpo.", "rwd.", "chat_template.arg")
NOT_TEXT = (
    "processor_type", "is_multimodal", "image_size", "image_resize_algorithm", "freeze_mm_modules",
    "freeze_vision_tower", "image_max_pixels", "video_max_pixels",
)  # fmt: skip
PICTURES = ("mllm", "llava", "rlhf_v")  # parts of LLaMA-Factory's names of datasets
EXPERTS = (
    "lora_target_parameters", "llama4_linearized_experts", "quantize_moe_experts", "use_scattermoe", "use_sonicmoe",
    "experts_implementation", "expert_parallel_size", "moe_kernels", "router_aux_loss_coef", "moe_aux_loss_coef",
    "use_kt", "model_quantization_config",  # MXFP4, in which gpt-oss stores its experts
)  # fmt: skip
TRL_SFT = "sft"  # a part of the path of TRL-style recipes for supervised fine-tuning: no key says it


@dataclass(frozen=True)
class Outcome:
    """One recipe: what was said of it. A recipe without problems is accepted."""

    path: Path
    problems: list[str]
    notes: list[str]

    @property
    def kind(self) -> str:
        refused = [problem for problem in self.problems if "not supported" in problem]
        if not self.problems:
            return "accepted"
        return "refused by name" if len(refused) == len(self.problems) else "wrong"


def read(path: Path) -> dict[str, Any] | None:
    """The keys of a recipe; None for a YAML file that is none, and no keys for one that cannot be read."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if "base_model:" not in text and "model_name_or_path:" not in text:
        return None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) and {"base_model", "model_name_or_path"} & set(values) else None


def left_out(path: Path, values: dict[str, Any]) -> str | None:
    """Why a recipe is not supervised training on text with what this toolkit is about; None if it is."""
    entries = [entry for entry in values.get("datasets") or () if isinstance(entry, dict)]
    stage = str(values.get("stage") or "sft")
    is_trl = "model_name_or_path" in values and not {"finetuning_type", "dataset", "template"} & set(values)
    if values and not {"learning_rate", "stage"} & set(values):
        return "no training"
    if values.get("do_predict") is True and not values.get("do_train"):
        return "no training"
    if any(values.get(key) for key in PREFERENCE) or stage in PREFERENCE_STAGES:
        return "preference and reward"
    if any(str(entry.get("type")).startswith(PREFERENCE_ROWS) for entry in entries):
        return "preference and reward"
    if is_trl and TRL_SFT not in str(path).lower():
        return "preference and reward"
    if any(values.get(key) for key in NOT_TEXT) or any(part in str(values.get("dataset")) for part in PICTURES):
        return "pictures and sound"
    changed = values.get("model_config") or values.get("overrides_of_model_config") or {}
    if any(values.get(key) for key in EXPERTS) or "output_router_logits" in changed:
        return "options of mixtures of experts"
    return None


def judge(path: Path, values: dict[str, Any]) -> Outcome:
    """Load or convert one recipe."""
    try:
        if "base_model" in values or not values:
            return Outcome(path, [], [str(note) for note in load(path, check_files=False).notes])
        converted = convert(path)
        with tempfile.NamedTemporaryFile("w", suffix=".yml", encoding="utf-8") as file:
            file.write(converted.text)
            file.flush()
            load(file.name, check_files=False)
        return Outcome(path, [], [str(note) for note in converted.notes])
    except RecipeError as error:
        return Outcome(path, problems_in(str(error), path), [])


def problems_in(message: str, path: Path) -> list[str]:
    places = [line.partition(f"{path}:")[2] for line in message.splitlines() if line.startswith(f"{path}:")]
    return [place.partition(": ")[2] for place in places if ": " in place and place[:1].isdigit()] or [message]


def capability_of(problem: str) -> str:
    return problem.partition("not supported yet: ")[2].partition(". ")[0].rstrip(".") or problem.partition(". ")[0]


def outcomes(folder: Path, why: Counter[str], *, text_sft: bool) -> Iterator[Outcome]:
    for path in sorted(folder.rglob("*.y*ml")):
        values = read(path)
        if values is None:
            continue
        reason = left_out(path, values) if text_sft else None
        if reason is not None:
            why[reason] += 1
            continue
        yield judge(path, values)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--text-sft", action="store_true", help="leave out preference, pictures, options of experts")
    parser.add_argument("--list", action="store_true", help="every recipe with its problems")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="N accepted recipes with all their notes")
    parser.add_argument("--from", dest="start", type=Path, help="read as if started in this folder")
    options = parser.parse_args(arguments)
    folders = [folder.resolve() for folder in options.folders]
    if options.start is not None:
        os.chdir(options.start)
    for folder in folders:
        measure(folder, options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Print the figures of one folder."""
    why: Counter[str] = Counter()
    found = list(outcomes(folder, why, text_sft=options.text_sft))
    capabilities: Counter[str] = Counter()
    for outcome in found:
        if outcome.kind == "refused by name":
            capabilities.update(set(map(capability_of, outcome.problems)))
        if outcome.kind == "wrong" or (options.list and outcome.problems):
            print(f"{outcome.kind}: {outcome.path.relative_to(folder)}")
            print("".join(f"    {problem[:150]}\n" for problem in outcome.problems), end="")
    accepted = [outcome for outcome in found if outcome.kind == "accepted"]
    for outcome in random.Random(options.sample).sample(accepted, min(options.sample, len(accepted))):
        print(f"\n== {outcome.path.relative_to(folder)}")
        print("".join(f"    {note}\n" for note in outcome.notes), end="")
    print(
        f"{folder}: {len(found)} recipes",
        *(f"; {count} left out: {reason}" for reason, count in why.most_common()),
        sep="",
    )
    for kind, count in Counter(outcome.kind for outcome in found).most_common():
        print(f"{kind:<16} {count:>4}  {count / max(1, len(found)):.1%}")
    print("".join(f"  {count:>4} {capability}\n" for capability, count in capabilities.most_common()), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
