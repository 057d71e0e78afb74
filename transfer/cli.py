"""A recipe (yaml), or a run to reproduce, and the flags after it, turned into checked arguments."""

import dataclasses
import difflib
import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from transfer.config import (
    EVERYDAY_TRAINING_ARGUMENTS,
    REFUSED,
    TRAINING_ONLY,
    FinetuningArguments,
    RunArguments,
    check_values,
)
from transfer.errors import UserError
from transfer.runs.record import describe_arguments, read_record

# Of a recorded run, what its repetition does not do again.
NOT_REPEATED = (
    "output_dir",
    "resume_from_checkpoint",
    "push_to_hub",
    "reproduce",
    "estimate",
    "search",
    "search_space",
    "disable_tqdm",  # its default is what the verbosity of logs is at the moment
)

USAGE = "accelerate launch --config_file accelerate_config.yaml finetune_vit.py RECIPE.yaml [--key value ...]"


class RecipeParser(HfArgumentParser):
    """HfArgumentParser whose faults are one-line user errors and whose help is short enough to read."""

    def __init__(self):
        super().__init__([RunArguments, FinetuningArguments], allow_abbrev=False, add_help=True, prog=USAGE)
        for action in self._actions:
            if action.nargs == "+":  # a list may be emptied, too, of what a recipe or a default puts into it
                action.nargs = "*"

    def error(self, message):
        raise UserError(f"{message}; --help lists the arguments")

    def format_help(self):
        ours = dataclasses.fields(RunArguments)
        everyday = [f for f in dataclasses.fields(FinetuningArguments) if f.name in EVERYDAY_TRAINING_ARGUMENTS]
        everyday.sort(key=lambda f: EVERYDAY_TRAINING_ARGUMENTS.index(f.name))
        return "\n".join(
            [
                f"usage: {USAGE}",
                "\nFine-tunes a pretrained image classifier and writes a Kaggle submission.",
                "A recipe is a yaml file of the arguments below; flags override it. A flag with nothing after it,",
                "or [] in a recipe, empties a list, as in `--tta`.",
                "\nData and model:",
                *map(_help_line, ours),
                "\nTraining, the everyday part of transformers.TrainingArguments:",
                *map(_help_line, everyday),
                "\nOther fields of transformers.TrainingArguments are accepted too, but for these:",
                f"{', '.join(REFUSED)}.",
                "\nFirst try:  ... finetune_vit.py recipes/sample.yaml",
                "Small part: ... finetune_vit.py recipes/offline.yaml --data_dir DATA.zip --max_train_samples 2000\n",
            ]
        )


def _help_line(f: dataclasses.Field) -> str:
    text = " ".join(str(f.metadata.get("help", "")).split())
    sentence = text.split(". ")[0] if len(text) > 160 else text
    default = f.default if f.default is not dataclasses.MISSING else None
    if default is not None and default != "":
        sentence += f" [{str(default).lower() if isinstance(default, bool) else default}]"
    return textwrap.fill(
        sentence, 100, initial_indent=f"  --{f.name:<30} ", subsequent_indent=" " * 35, break_on_hyphens=False
    )


def known_names() -> list[str]:
    """Every argument that a recipe or a flag may set."""
    fields = [*dataclasses.fields(RunArguments), *dataclasses.fields(FinetuningArguments)]
    return [f.name for f in fields if f.init and f.name not in REFUSED]


def check_name(name: str, where: str) -> None:
    """Refuse an argument that nobody reads, naming the nearest ones."""
    if name in REFUSED:
        raise UserError(f"{where}: '{name}' is not for this program: {REFUSED[name]}")
    if name in known_names():
        return
    near = difflib.get_close_matches(name, known_names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "--help lists the arguments"
    raise UserError(f"{where}: unknown argument '{name}'; {hint}")


def read_recipe(path: Path) -> dict:
    """The arguments in a recipe file; unknown names and anything but a flat mapping are refused."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as fault:
        known = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        hint = f"; there are {', '.join(known)}" if known else ""
        raise UserError(f"{path}: cannot read this recipe ({fault.strerror}){hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise UserError(f"{path}: not valid yaml: {' '.join(str(fault).split())}") from None
    if recipe is None:
        return {}
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: a recipe is a list of `key: value` lines")
    for name in recipe:
        check_name(str(name), str(path))
    return recipe


def to_flags(recipe: dict) -> list[str]:
    """A recipe as command-line words, so that files and flags pass the same checks."""
    words = []
    for name, value in recipe.items():
        if value is None:
            continue
        words.append(f"--{name}")
        if isinstance(value, dict):
            words.append(json.dumps(value))
        elif isinstance(value, list):
            words += map(str, value)
        else:
            words.append(str(value).lower() if isinstance(value, bool) else str(value))
    return words


def chosen_arguments(recorded: Mapping) -> dict:
    """Of a run's arguments those that are not defaults and that its repetition needs."""
    defaults = describe_arguments(RunArguments(), FinetuningArguments(output_dir="outputs"))
    return {
        name: value
        for name, value in recorded.items()
        if name in known_names() and name not in NOT_REPEATED and value != defaults.get(name)
    }


def trains(flags: list[str]) -> bool:
    """Whether the flags leave training to the recipe: they do not say `--do_train false`."""
    return not re.search(r"--do_train[ =](false|no|0|f|n)\b", " ".join(flags).lower())


def without_training(settings: Mapping) -> dict:
    """A recipe's arguments but for those of training alone."""
    return {name: value for name, value in settings.items() if name not in TRAINING_ONLY}


def recorded_words(path: Path) -> list[str]:
    """The arguments in a run.json that are not defaults, as command-line words; its output goes beside the old one."""
    recorded = read_record(path)["arguments"]
    return to_flags(chosen_arguments(recorded) | {"output_dir": f"{recorded['output_dir']}-reproduced"})


def read_words(argv: list[str]) -> tuple[Path, list[str], list[str]]:
    """The recipe, or the run.json to reproduce, then its words, then the flags after it."""
    first, _, value = argv[0].partition("=") if argv else ("", "", "")
    if first == "--reproduce":
        if not value and len(argv) < 2:
            raise UserError("--reproduce: which run? give outputs/<run>/run.json")
        path = Path(value or argv[1])
        words = recorded_words(path)
        return path, words, ["--reproduce", str(path), *argv[1 if value else 2 :]]
    if not argv or argv[0].startswith("-"):
        raise UserError(f"the recipe comes first, or --reproduce RUN_JSON: {USAGE}")
    path = Path(argv[0])
    recipe = read_recipe(path)
    settings = recipe if trains(argv[1:]) else without_training(recipe)
    return path, ["--output_dir", str(Path("outputs") / path.stem), *to_flags(settings)], argv[1:]


def parse_command_line(argv: list[str]) -> tuple[RunArguments, FinetuningArguments, Path]:
    """Read `RECIPE.yaml [--key value ...]` or `--reproduce RUN_JSON [--key value ...]`.

    Returns the run's arguments, the Trainer's arguments and the recipe's path. Raises `UserError` for anything
    unknown or impossible.
    """
    if any(word in ("-h", "--help") for word in argv):
        RecipeParser().print_help()
        raise SystemExit(0)
    recipe_path, words, flags = read_words(argv)
    for word in flags:
        if word.startswith("--"):
            check_name(word[2:].split("=")[0], "command line")
    try:
        run, args, strays = RecipeParser().parse_args_into_dataclasses(
            words + flags, look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, TypeError, ImportError, OSError) as fault:
        raise UserError(" ".join(str(fault).split())) from None
    if strays:
        raise UserError(f"command line: '{strays[0]}' belongs to no argument; --help lists the arguments")
    if run.reproduce and Path(run.reproduce) != recipe_path:
        raise UserError("--reproduce RUN_JSON stands in place of the recipe: it comes first, and flags after it")
    check_values(run, args)
    return run, args, recipe_path
