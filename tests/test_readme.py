"""The README's promises: its files exist, its commands are the project's, its recipes parse."""

import re

import pytest
import yaml
from conftest import ROOT

from transfer.cli import parse_command_line

README = (ROOT / "README.md").read_text()
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def tree_files():
    """Paths in the README's file tree."""
    tree = README.split("## Files")[1].split("```")[1]
    folders = []  # those around the line
    for line in tree.strip().splitlines():
        indent, name = re.match(r"([│ ]*)[├└]── (\S+)", line).groups()
        folders = folders[: len(indent) // 4]
        yield "".join([*folders, name])
        if name.endswith("/"):
            folders.append(name)


def test_every_file_of_the_tree_exists_and_every_module_is_in_it():
    named = set(tree_files())
    assert all((ROOT / name).exists() for name in named)
    modules = {path.relative_to(ROOT) for path in (ROOT / "transfer").rglob("*.py") if path.name != "__init__.py"}
    assert {str(path) for path in modules if path.parent.name != "reporting"} <= named


def test_every_recipe_that_the_readme_names_exists():
    assert all((ROOT / name).is_file() for name in re.findall(r"recipes/[\w/]+\.(?:yaml|sh)", README))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_its_header_gives_its_command(recipe):
    run, args, _ = parse_command_line([str(recipe), "--data_dir", "sample"])
    assert args.output_dir == f"outputs/{recipe.stem}" and run.model_name_or_path
    assert recipe.read_text().startswith(
        f"# accelerate launch --config_file accelerate_config.yaml finetune_vit.py recipes/{recipe.name}"
    )


def test_computed_figures_are_those_of_the_recipes_headers_and_said_to_be_computed():
    rows = re.findall(r"\(recipes/(\w+\.yaml)\) \|[^|]+\| ([\d.]+ GB) \| (\d+ min) \|", README)
    assert rows
    for name, memory, time in rows:
        header = (ROOT / "recipes" / name).read_text()
        assert f"Computed, not measured: {memory} = " in header and f"# {time} for " in header


def test_flags_in_the_readme_are_arguments():
    from transfer.cli import known_names

    known = {"help", *known_names()}
    for script in [*(ROOT / "benchmarks").glob("*.py"), ROOT / "transfer" / "submission.py"]:
        known |= set(re.findall(r"add_argument\(\s*\"--([a-z_]+)\"", script.read_text()))
    known |= {"config_file", "quiet", "num_processes", "machine_rank", "main_process_ip"}  # accelerate's
    known |= {"logdir"}  # tensorboard's
    assert set(re.findall(r"--([a-z_]+)", README)) <= known


def test_the_accelerate_config_has_only_keys_that_accelerate_knows():
    from accelerate.commands.config.config_args import load_config_from_file

    path = ROOT / "accelerate_config.yaml"
    assert load_config_from_file(str(path)).mixed_precision == yaml.safe_load(path.read_text())["mixed_precision"]
