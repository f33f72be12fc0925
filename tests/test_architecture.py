"""The rules of the code base, executed."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from support.places import ROOT

import finetuner
from finetuner.recipe import KEYS, SECTIONS, load_recipe
from finetuner.recipe.sections import Section
from finetuner.recipe.sections.model import SpecialTokens

PACKAGE = ROOT / "finetuner"
MODULES = sorted(PACKAGE.rglob("*.py"))

# The rooms from the bottom up: each imports from itself and from rows above it in this list, and from nothing else.
ROOMS = (
    ("errors", "redaction"),
    ("world",),
    ("storage", "console"),
    ("recipe",),
    ("plan",),
    ("data",),
    ("models",),
    ("objectives",),
    ("parallel",),
    ("estimate",),
    ("training",),
    ("checkpoint",),
    ("export",),
    ("evaluation", "report"),
    ("run",),
    ("commands",),
    ("cli", "library"),
    ("__init__",),
    ("train", "merge"),
)
ROW = {room: row for row, rooms in enumerate(ROOMS) for room in rooms}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(tree: ast.AST) -> list[str]:
    found = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return found + [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_imports_point_downwards(path):
    room = part_of(path)
    for module in imports_of(parsed(path)):
        if module.startswith("finetuner."):
            other = module.split(".")[1]
            assert other == room or ROW[other] < ROW[room], f"{room} imports {module}"


def test_the_top_level_holds_rooms_and_no_loose_modules():
    loose = {path.stem for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__", "cli", "console", "errors", "library", "merge", "redaction", "train", "world"}


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_nothing_of_a_library_is_patched_and_no_code_is_made_at_run_time(path):
    tree = parsed(path)
    ours = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    modules = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                root = target
                while isinstance(root, ast.Attribute | ast.Subscript):
                    root = root.value
                patches = isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in ours | modules
                assert not patches, f"line {node.lineno} assigns {ast.unparse(target)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("exec", "eval", "setattr", "delattr"), (
                f"line {node.lineno} calls {node.func.id}"
            )


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_the_environment_is_read_in_world_alone(path):
    if part_of(path) == "world":
        return
    names = {ast.unparse(node) for node in ast.walk(parsed(path)) if isinstance(node, ast.Attribute)}
    assert not names & {"os.environ", "os.getenv", "torch.cuda.device_count", "torch.cuda.is_available"}


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_files_and_functions_stay_readable(path):
    assert len(path.read_text().splitlines()) <= 450
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is too long"


def functions_of(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef)]


def complexity(function: ast.FunctionDef) -> int:
    """Branches of a function, and 1: McCabe's number, with `and` and `or` counted."""
    kinds = ast.If | ast.For | ast.While | ast.IfExp | ast.ExceptHandler | ast.comprehension | ast.With
    nodes = list(ast.walk(function))
    operands = sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
    return 1 + operands + sum(isinstance(node, kinds) for node in nodes)


ON_THE_WAY = [
    PACKAGE / "commands" / "train.py",
    *sorted((PACKAGE / "run").glob("*.py")),
    *sorted((PACKAGE / "plan").glob("*.py")),
    PACKAGE / "training" / "loop.py",
    *sorted((PACKAGE / "parallel").glob("*.py")),
]


@pytest.mark.parametrize("path", ON_THE_WAY, ids=named)
def test_from_the_command_to_the_step_no_function_has_many_branches(path):
    assert {f.name: complexity(f) for f in functions_of(path) if complexity(f) > 12} == {}


def test_the_composition_root_builds_from_few_modules():
    root = parsed(PACKAGE / "run" / "train.py")
    assert len({module for module in imports_of(root) if module.startswith("finetuner")}) < 20


def lines_of_code() -> int:
    return sum(1 for path in MODULES for line in path.read_text().splitlines() if line.strip())


def test_attributes_are_rarely_looked_up_by_name():
    """Less than 3 in 1,000 lines: an object is what its type says."""
    calls = [node for path in MODULES for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    names = ("getattr", "hasattr", "setattr")
    found = sum(isinstance(call.func, ast.Name) and call.func.id in names for call in calls)
    assert found < 3e-3 * lines_of_code()


def test_our_own_modules_are_rarely_imported_inside_functions():
    """Less than 1.5 in 1,000 lines: such an import hides a dependency. Those that stay keep torch out of a command."""
    inside = [
        module
        for path in MODULES
        for function in functions_of(path)
        for module in imports_of(function)
        if module.startswith("finetuner")
    ]
    assert len(inside) < 1.5e-3 * lines_of_code()


RIDDLE = re.compile(r"\W*(What|Of|As|How|Which|Where|That|Whose|Who)\b")


def test_docstrings_say_the_contract_and_not_a_riddle():
    """Less than 1 % begin as a subordinate clause does."""
    kinds = ast.FunctionDef | ast.ClassDef | ast.Module
    docstrings = {
        f"{named(path)}: {text.splitlines()[0]}"
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, kinds) and (text := ast.get_docstring(node))
    }
    riddles = [text for text in docstrings if RIDDLE.match(text.partition(": ")[2])]
    assert len(riddles) < 0.01 * len(docstrings), "\n".join(riddles)


SHAPE = re.compile(r"\([a-zA-Z_0-9*./ +-]+,[^)]*\)|\bshapes?\b|\bshaped\b|\bscalar\b|\([a-zA-Z_]+,\)")


def test_public_functions_on_tensors_say_the_shapes():
    """More than 68 % (torchtune's share); the rest are methods whose protocol says them."""
    said = {}
    for path in MODULES:
        for function in functions_of(path):
            arguments = [*function.args.args, *function.args.kwonlyargs]
            types = [a.annotation for a in arguments] + [function.returns]
            on_tensors = any(re.search(r"\bTensors?\b", ast.unparse(t)) for t in types if t is not None)
            if on_tensors and not function.name.startswith("_"):
                text = ast.get_docstring(function) or ""
                said[f"{named(path)}:{function.name}"] = bool(SHAPE.search(text))
    missing = [name for name, is_said in said.items() if not is_said]
    assert sum(said.values()) > 0.68 * len(said), "\n".join(missing)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.y*ml")), ids=named)
def test_every_example_loads(path):
    assert load_recipe(path, check_files=False)


def test_every_key_of_the_schema_is_read_somewhere():
    """A key that nothing reads would be accepted and without effect."""
    readers = [path for path in MODULES if part_of(path) != "recipe" or path.parent.name == "sections"]
    assert sorted(set(KEYS) - attributes_read(*readers)) == []


def test_every_key_of_a_block_is_read_somewhere():
    def blocks(section: type) -> set[type]:
        found = {section} if issubclass(section, Section) else set()
        for info in section.model_fields.values():
            for kind in kinds(info.annotation):
                found |= blocks(kind) if kind not in found else set()
        return found

    def kinds(annotation: object) -> list[type]:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return [annotation]
        return [kind for argument in get_args(annotation) for kind in kinds(argument)]

    inner = {block for section in SECTIONS.values() for block in blocks(section)} - set(SECTIONS.values())
    assert {"DatasetEntry", "FsdpConfig", "FourBitSection"} <= {block.__name__ for block in inner}
    read = attributes_read(*MODULES) | set(SpecialTokens.model_fields)  # those are handed on as a whole
    unread = [
        f"{block.__name__}.{key}"
        for block in inner
        for key, info in block.model_fields.items()
        if key not in read and not (get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1)
    ]
    assert sorted(unread) == []  # a key of one value says what holds anyway


def attributes_read(*paths: Path) -> set[str]:
    return {
        node.attr
        for path in paths
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def test_every_key_says_what_it_means():
    assert sorted(key for key, (_, info) in KEYS.items() if not info.description) == []


def test_public_names():
    assert sorted(finetuner.__all__) == [
        "CheckpointError", "DataError", "FinetunerError", "LostConnectionError", "MergeResult", "ModelError",
        "PlanError", "PreemptedError", "Recipe", "RecipeError", "TrainResult", "TrainingError",
        "load_recipe", "merge", "train",
    ]  # fmt: skip
    assert all(hasattr(finetuner, name) for name in finetuner.__all__)
    assert (PACKAGE / "py.typed").exists()


def test_the_library_functions_are_not_the_modules_of_the_same_name():
    code = "import finetuner, finetuner.cli; assert callable(finetuner.train) and callable(finetuner.merge)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    for name in ("train", "merge"):
        with pytest.raises(ImportError, match=f"finetuner.{name}"):
            importlib.import_module(f"finetuner.{name}")
    assert callable(finetuner.train) and callable(finetuner.merge)


def test_the_recipe_imports_no_torch():
    code = "import sys, finetuner.recipe; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_every_module_imports_and_says_what_it_is(path):
    if path.parent == PACKAGE and path.stem in ("train", "merge"):
        return  # they are run, not imported
    parts = path.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    has_code = any(not isinstance(node, ast.Expr) for node in parsed(path).body)
    assert module.__doc__ or not has_code


def test_paths_of_this_machine_and_unfinished_work_are_not_in_the_project():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in tracked:
        path = ROOT / name
        if path.suffix in (".py", ".yml", ".md", ".toml", ".txt", ".json") and path.name != Path(__file__).name:
            text = path.read_text()
            for word in ("/work/", "/root/", "TODO", "FIXME", "NotImplementedError"):
                assert word not in text, f"{name} contains {word}"


@pytest.mark.parametrize("path", sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")]), ids=named)
def test_what_scripts_import_of_the_package_exists(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finetuner"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                is_module = (
                    importlib.util.find_spec(f"{node.module}.{alias.name}") if hasattr(module, "__path__") else None
                )
                assert hasattr(module, alias.name) or is_module, f"{node.module} has no {alias.name}"
