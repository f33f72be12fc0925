"""The pages say what is true: links lead somewhere, files that are named exist, examples run, the site builds."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from support.places import ROOT

import finetuner

DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")])


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def pages_of_site() -> list[str]:
    config = YAML(typ="safe", pure=True).load((ROOT / "mkdocs.yml").read_text())
    return [page for entry in config["nav"] for page in entry.values()]


def test_every_page_of_the_site_exists_and_every_page_is_on_the_site():
    assert sorted(pages_of_site()) == sorted(page.name for page in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        assert place.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors_of(place), f"{page.name} links to {target}"
        if page.parent == DOCS:
            assert place.parent == DOCS, f"{page.name} links to {target}, which is not on the site"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_file_of_the_code_that_a_page_names_exists(page):
    for name in re.findall(r"`((?:finetuner|tests|examples)/[^`\s]*)`", page.read_text()):
        if "<" in name:  # a pattern such as data/formats/<type>.py: its folder
            name = name[: name.index("<")]
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_every_file_that_the_code_and_the_record_of_measurements_name_exists():
    """Inside the package and its tests, files are named from finetuner/ on."""
    pages = [*(ROOT / "finetuner").rglob("*.py"), *(ROOT / "tests").rglob("*.py"), ROOT / "benchmarks/RESULTS.md"]
    for page in pages:
        for name in re.findall(r"(?<![\w/.*{}-])((?:[a-z_]+/)+[a-z_]+\.py)\b", page.read_text(encoding="utf-8")):
            if name.startswith("finetuner/commands/a_b"):  # of a test's own package
                continue
            assert (ROOT / name).exists() or (ROOT / "finetuner" / name).exists(), f"{named(page)} names {name}"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_an_example_in_python_runs_as_it_stands(page, write_recipe, tmp_path):
    write_recipe("my.yml", adapter="lora", lora_r=4, max_steps=2, val_set_size=2)
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL))
    assert "finetuner.load_recipe" in code
    env = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "merged" / "model.safetensors").exists()


def test_the_version_has_one_source_and_its_own_heading_in_the_changelog():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "finetuner.__version__"}
    assert version("finetuner") == finetuner.__version__, "run `make install` again"
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased" and headings[1] == finetuner.__version__


def test_the_workflow_and_the_hooks_run_what_a_developer_runs():
    workflow = YAML(typ="safe", pure=True).load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    steps = workflow["jobs"]["tests"]["steps"]
    assert any(step.get("run") == "bash .ci/run" for step in steps)
    hooks = YAML(typ="safe", pure=True).load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"].split()[:2] for hook in hooks] == [["ruff", "check"], ["ruff", "format"]]
    form = YAML(typ="safe", pure=True).load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    asked = [field["attributes"]["label"] for field in form["body"] if "label" in field.get("attributes", {})]
    assert "Output of `finetuner env RECIPE`" in asked and "The recipe" in asked


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    missing = [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (the extra `docs`)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loads = r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)"
    for page in tmp_path.rglob("*.html"):
        assert re.findall(loads, page.read_text()) == [], page.name
    for sheet in tmp_path.rglob("*.css"):
        assert not re.findall(r"@import|url\([\"']?(?:https?:)?//", sheet.read_text()), sheet.name
    api = (tmp_path / "api.html").read_text()
    assert [name for name in finetuner.__all__ if not re.search(rf'id="finetuner\.(library\.)?{name}"', api)] == []
