"""What README and docs promise: files, links, commands, flags, recipes and names exist, and recipes parse."""

import importlib.util
import re
import shlex

import pytest
import yaml
from conftest import ROOT

from transfer.cli import parse_command_line
from transfer.config import known_names

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "EXPERIMENTS.md", ROOT / "outputs" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

OF_ACCELERATE = {"config_file", "quiet", "num_machines", "num_processes", "machine_rank", "main_process_ip"}
OF_TENSORBOARD = {"logdir"}
OF_PIP = {"no-deps", "extra-index-url"}
ELSEWHERE = {"train.py"}  # timm's
PLACEHOLDERS = {"RECIPE.yaml", "best.yaml"}  # one for the reader to fill in, one that a search writes

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())


def tree_files(page):
    """Paths in a page's file tree."""
    tree = page.read_text().split("## Files")[1].split("```")[1]
    folders = []  # those around the line
    for line in tree.strip().splitlines():
        indent, name = re.match(r"([│ ]*)[├└]── (\S+)", line).groups()
        folders = folders[: len(indent) // 4]
        yield "".join([*folders, name])
        if name.endswith("/"):
            folders.append(name)


def anchors_of(page):
    """What a link to a heading of a page may end in, as GitHub names it."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands_of(page):
    """Lines of the page's shell blocks."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines()]


def test_every_file_of_the_trees_exists_and_every_module_is_in_one():
    named = {*tree_files(ROOT / "README.md"), *tree_files(ROOT / "docs" / "design.md")}
    assert all((ROOT / name).exists() for name in named), [name for name in named if not (ROOT / name).exists()]
    modules = {path.relative_to(ROOT) for path in (ROOT / "transfer").rglob("*.py") if path.name != "__init__.py"}
    assert {str(path) for path in modules if path.parent.name != "reporting"} <= named


def test_the_readme_links_every_page_of_the_docs():
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= set(re.findall(r"\]\(([^)#]+)", README))


@pytest.mark.parametrize(
    "start",
    [
        "pip install -r requirements.txt -c constraints.txt && accelerate launch ",
        "pip install -r requirements-dev.txt -c constraints.txt && ",
    ],
)
def test_the_readme_has_the_command_that_programs_look_for(start):
    assert sum(line.startswith(start) for line in README.splitlines()) == 1


@each_page
def test_every_relative_link_leads_to_a_file_and_every_anchor_to_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@each_page
def test_every_flag_is_an_argument(page):
    known = {"help", *known_names()} | OF_ACCELERATE | OF_TENSORBOARD | OF_PIP
    scripts = [ROOT / "data_loading.py", *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "transfer").rglob("*.py")]
    for script in scripts:
        known |= set(re.findall(r"add_argument\(\s*\"--([a-z_]+)\"", script.read_text()))
    assert set(re.findall(r"--([a-z][a-z0-9_-]*)", page.read_text())) <= known


@each_page
def test_every_recipe_exists(page):
    text = page.read_text()
    assert all((ROOT / name).is_file() for name in re.findall(r"recipes/[\w/]+\.(?:yaml|sh)", text))
    files = {path.name for pattern in ("*.yaml", "recipes/**/*.yaml") for path in ROOT.glob(pattern)}
    assert set(re.findall(r"\w+\.yaml", text)) <= files | PLACEHOLDERS


@each_page
def test_every_script_and_module_exists(page):
    text = page.read_text().split("## Files")[0]  # the tree has a test of its own
    for name in set(re.findall(r"[\w/]+\.py\b", text)) - ELSEWHERE:
        assert (ROOT / name).is_file() or (ROOT / "transfer" / name).is_file(), name
    assert all(map(importlib.util.find_spec, re.findall(r"python -m (transfer[.\w]*)", text)))


@each_page
def test_every_name_that_is_said_to_be_in_a_file_is_there(page):
    for name, file in re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", page.read_text()):
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), f"{name} in {file}"


@each_page
def test_every_command_of_a_recipe_parses(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands_of(page):
        _, found, words = command.partition("finetune_vit.py ")
        if found and words.startswith("recipes/"):
            parse_command_line(shlex.split(words))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_its_header_gives_its_command(recipe):
    run, args = parse_command_line([str(recipe), "--data_dir", "sample"])
    named = "" if recipe.stem == "sample" else "-sample"  # the data that the flag names
    assert args.output_dir == f"outputs/{recipe.stem}{named}" and run.model_name_or_path
    assert recipe.read_text().startswith(
        f"# accelerate launch --quiet --config_file accelerate_config.yaml finetune_vit.py recipes/{recipe.name}"
    )


def test_computed_figures_are_those_of_the_recipes_headers_and_said_to_be_computed():
    text = (ROOT / "docs" / "backbones.md").read_text()
    rows = re.findall(r"\(\.\./recipes/(\w+\.yaml)\) \|[^|]+\| ([\d.]+ GB) \| (\d+ min) \|", text)
    for name, memory, time in rows:
        header = (ROOT / "recipes" / name).read_text()
        assert f"Computed, not measured: {memory} = " in header and f"# {time} for " in header
    computed = {recipe.name for recipe in RECIPES if "Computed, not measured" in recipe.read_text()}
    assert {name for name, *_ in rows} == computed != set()


def test_the_accelerate_config_has_only_keys_that_accelerate_knows():
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "accelerate_config.yaml"
    assert load_config_from_file(str(path)).mixed_precision == yaml.safe_load(path.read_text())["mixed_precision"]
