"""Turns a recipe (YAML), or the run.json of a run to reproduce, and the flags after it into checked arguments."""

import argparse
import dataclasses
import difflib
import json
import math
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, Trainer, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.optimization import GreedyLR

from transfer import runtime
from transfer.config import (
    REFUSED,
    TOPICS,
    FinetuningArguments,
    RunArguments,
    check_bounds,
    chosen_arguments,
    known_names,
    listed_fields,
    option_of,
    training_only_names,
)
from transfer.errors import UserError
from transfer.files import name_of
from transfer.runs.record import read_record  # it knows what makes a json file the record of a run

USAGE = "accelerate launch --quiet --config_file accelerate_config.yaml finetune_vit.py RECIPE.yaml [--key value ...]"

HELP = """usage: {usage}

Fine-tunes a pretrained image classifier and writes a Kaggle submission.
A recipe is a YAML file of the arguments below; flags override it. Defaults are
in brackets. To empty a list, give its flag without a value, such as `--tta`, or
set it to [] in the recipe.

{arguments}

Other fields of transformers.TrainingArguments are accepted too, except
{refused}.

First try:  ... finetune_vit.py recipes/sample.yaml
Small part: ... finetune_vit.py recipes/offline_fast.yaml --data_dir DATA.zip --max_train_samples 2000
"""

TRIED_STEPS = 20  # of a schedule
METRIC_SCHEDULES = (ReduceLROnPlateau, GreedyLR)
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

# What other programs call an argument, to suggest ours.
ALIASES = {
    "data_dir": "data dataset data_path train_dir",
    "dataset_name": "dataset hub_dataset",
    "drop_path_rate": "drop_path stochastic_depth",
    "dataloader_num_workers": "workers num_workers",
    "ema_decay": "ema model_ema",
    "erasing_probability": "random_erasing reprob",
    "gradient_accumulation_steps": "grad_accum accumulate_grad_batches",
    "image_size": "size img_size input_size resolution",
    "kfold": "folds n_folds",
    "label_smoothing_factor": "smoothing label_smoothing",
    "layer_decay": "llrd layer_wise_decay",
    "learning_rate": "lr max_lr base_lr",
    "lora_r": "lora lora_rank",
    "lr_scheduler_type": "scheduler sched lr_scheduler",
    "max_grad_norm": "clip_grad grad_clip",
    "max_train_samples": "max_samples limit",
    "model_name_or_path": "model model_name checkpoint backbone",
    "num_train_epochs": "epochs num_epochs max_epochs",
    "output_dir": "out out_dir output save_dir",
    "per_device_eval_batch_size": "eval_batch_size val_batch_size",
    "per_device_train_batch_size": "bs batch_size train_batch_size",
    "validation_fraction": "val_split val_size",
    "warmup_steps": "warmup warmup_ratio warmup_epochs",
    "weight_decay": "wd",
}


class RecipeParser(HfArgumentParser):
    """HfArgumentParser whose defaults a recipe can set, with one-line errors and a help by topic."""

    def __init__(self):
        self.by_name: dict[str, argparse.Action] = {}
        groups: Any = [RunArguments, FinetuningArguments]  # for which transformers declares a type of its own
        super().__init__(groups, allow_abbrev=False, add_help=True, prog=USAGE)

    def add_argument(self, *names, option=None, **settings):
        """Add an argument; HfArgumentParser also passes a field's metadata, where `option` is ours."""
        action = super().add_argument(*names, **settings)
        if action.nargs == "+":
            action.nargs = "*"  # so that a flag can empty a list which a recipe or a default fills
        self.by_name.setdefault(action.dest, action)  # the first: --no_NAME has the same destination
        return action

    def error(self, message):
        raise UserError(f"{message}; --help lists the arguments")

    def format_help(self):
        width = min(100, max(72, shutil.get_terminal_size().columns - 1))
        fields = listed_fields()
        groups = [(topic, [f for f in fields if option_of(f).topic == topic]) for topic in TOPICS]
        listed = [(topic, [_help_line(field, width) for field in group]) for topic, group in groups]
        arguments = "\n\n".join("\n".join([f"{topic}:", *lines]) for topic, lines in listed)
        return HELP.format(usage=USAGE, arguments=arguments, refused=textwrap.fill(", ".join(REFUSED), width))

    def set_recipe(self, settings: Mapping, source: str) -> None:
        """Make a recipe's values the defaults, of the types that flags have; null leaves a default as it is."""
        given = {name: value for name, value in settings.items() if value is not None}
        self.set_defaults(**{name: self._convert(name, value, source) for name, value in given.items()})

    def _convert(self, name: str, value, source: str):
        action = self.by_name[name]
        if action.nargs == "*":
            return [_read_word(action, item, source) for item in (value if isinstance(value, list) else [value])]
        if isinstance(value, list):
            raise UserError(f"{source}: {name} takes one value, not a list")
        return _read_word(action, value, source)


def _read_word(action: argparse.Action, value, source: str):
    """A yaml value as argparse would read it from a flag. Raises `UserError`."""
    if isinstance(value, Mapping):
        word = json.dumps(value)
    else:
        word = str(value).lower() if isinstance(value, bool) else str(value)
    read: Any = action.type or str
    try:
        result = read(word)
    except argparse.ArgumentTypeError as fault:
        raise UserError(f"{source}: {action.dest}: {fault}") from None
    except (TypeError, ValueError):
        raise UserError(f"{source}: {action.dest}: invalid {read.__name__} value: {word!r}") from None
    if action.choices is not None and result not in action.choices:
        raise UserError(f"{source}: {action.dest}: {word!r} is not one of {', '.join(map(str, action.choices))}")
    return result


def _help_line(field: dataclasses.Field, width: int) -> str:
    text, default = field.metadata["help"], field.default
    if default is not None and default is not dataclasses.MISSING:
        text += f" [{str(default).lower() if isinstance(default, bool) else default}]"
    return textwrap.fill(
        text, width, initial_indent=f"  --{field.name:<30} ", subsequent_indent=" " * 35, break_on_hyphens=False
    )


def check_name(name: str, where: str) -> None:
    """Check that an argument exists. Raises `UserError` that names the nearest ones."""
    if name in REFUSED:
        raise UserError(f"{where}: '{name}' cannot be set: {REFUSED[name]}")
    known = known_names()
    if name in known:
        return
    if name in {field.name for field in dataclasses.fields(FinetuningArguments) if field.init}:
        raise UserError(f"{where}: '{name}' cannot be set: this project has not been tried with it")
    near = [argument for argument, others in ALIASES.items() if name in others.split()]
    near = near or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "--help lists the arguments"
    raise UserError(f"{where}: unknown argument '{name}'; {hint}")


def read_recipe(path: Path, trains: bool = True) -> dict:
    """The arguments that a recipe file sets, without those that only training uses if the run does not train.

    Raises `UserError` for unknown arguments and for anything but a flat mapping.
    """
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as fault:
        known = sorted(str(p) for p in Path("recipes").glob("*.yaml"))
        written = str(path if path.parent.name else Path("recipes") / path)
        near = difflib.get_close_matches(written, known, n=1, cutoff=0.8)
        hint = f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(known)}" if known else ""
        raise UserError(f"{path}: cannot read this recipe ({fault.strerror}){hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise UserError(f"{path}: not valid yaml: {' '.join(str(fault).split())}") from None
    recipe = {} if recipe is None else recipe
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: a recipe is a list of `key: value` lines")
    for name in recipe:
        check_name(str(name), str(path))
    ignored = set() if trains else training_only_names()
    return {name: value for name, value in recipe.items() if name not in ignored}


def read_run(path: Path) -> dict:
    """The arguments that reproduce the run of a run.json; the output goes beside the recorded one."""
    record = read_record(path)
    if "members" in record:
        raise UserError(f"{path}: is the record of an ensemble; its own command makes it again: {record['command']}")
    recorded = record["arguments"]
    return chosen_arguments(recorded) | {"output_dir": f"{Path(recorded['output_dir'])}-reproduced"}


def split_command_line(argv: list[str]) -> tuple[str | None, list[str]]:
    """The recipe, None where `--reproduce RUN_JSON` stands in its place, and the flags, whose names are checked."""
    if argv == ["--reproduce"]:
        raise UserError("--reproduce: which run? give outputs/<run>/run.json")
    reproduce = bool(argv) and argv[0].partition("=")[0] == "--reproduce"
    if not reproduce and (not argv or argv[0].startswith("-")):
        raise UserError(f"the recipe comes first, or --reproduce RUN_JSON; usage: {USAGE}")
    recipe, flags = (None, argv) if reproduce else (argv[0], argv[1:])
    for word in flags:
        if word.startswith("--"):
            check_name(word[2:].partition("=")[0].replace("-", "_"), "command line")
    return recipe, flags


def name_run(source: Path, settings: Mapping, flagged: argparse.Namespace) -> str:
    """The name of the default output folder: the recipe's, and the dataset's where a flag names another one."""
    dataset = flagged.dataset_name or flagged.data_dir
    if dataset is None or dataset in (settings.get("dataset_name"), settings.get("data_dir")):
        return source.stem
    return f"{source.stem}-" + re.sub(r"[^\w.-]+", "_", name_of(dataset).removesuffix(".zip"))


def parse_command_line(argv: list[str]) -> tuple[RunArguments, FinetuningArguments]:
    """Read `RECIPE.yaml [--key value ...]` or `--reproduce RUN_JSON [--key value ...]`.

    Returns the run's and the Trainer's arguments. Raises `UserError` for anything unknown or impossible.
    """
    parser = RecipeParser()
    if any(word in ("-h", "--help") for word in argv):
        parser.print_help()
        raise SystemExit(0)
    recipe, flags = split_command_line(argv)
    flagged, strays = parser.parse_known_args(flags)
    if strays:
        raise UserError(f"command line: '{strays[0]}' does not belong to an argument; --help lists the arguments")
    source = Path(recipe or flagged.reproduce).expanduser()
    settings = read_recipe(source, flagged.do_train) if recipe else read_run(source)
    parser.set_defaults(output_dir=str(Path("outputs") / name_run(source, settings, flagged)))
    parser.set_recipe(settings, str(source))
    try:
        run, args = parser.parse_args_into_dataclasses(flags, look_for_args_file=False)
    except json.JSONDecodeError as fault:
        raise UserError(f"command line: {fault.doc}: is not valid json ({fault})") from None
    except (ValueError, TypeError, ImportError, OSError) as fault:
        raise UserError(" ".join(str(fault).split())) from None
    if recipe and run.reproduce:
        raise UserError("--reproduce RUN_JSON takes the place of the recipe: put it first, and flags after it")
    expand_paths(run, args)
    check_values(run, args)
    return run, args


def expand_paths(run: RunArguments, args: FinetuningArguments) -> None:
    """Replace a leading ~, which no shell expands in a recipe; paths of data are expanded where they are read."""
    for group, names in ((run, ("reproduce", "hand_in")), (args, ("output_dir", "resume_from_checkpoint"))):
        for name in names:
            if value := getattr(group, name):
                setattr(group, name, str(Path(value).expanduser()) if value.startswith("~") else value)
    args.output_dir = str(Path(args.output_dir))  # without a slash at the end
    if (args.resume_from_checkpoint or "").lower() == "false":
        args.resume_from_checkpoint = None


def check_data_arguments(run: RunArguments) -> None:
    """Check that the dataset is named in exactly one way."""
    if run.data_dir is None and run.dataset_name is None:
        raise UserError("--data_dir is missing: give the dataset's folder or zip, or `sample`")
    columns = ("labels_csv", "image_column", "label_column", "group_column")
    for other in ("data_dir", "classes_file", *columns, "label_pattern"):
        if run.dataset_name and getattr(run, other):
            raise UserError(f"--dataset_name and --{other} cannot be combined; leave one of them out")
    for other in columns:
        if run.label_pattern and getattr(run, other):
            raise UserError(f"--label_pattern and --{other} cannot be combined; leave one of them out")
    for name in ("dataset_config_name", "label_column_name"):
        if getattr(run, name) and not run.dataset_name:
            raise UserError(f"--{name} needs --dataset_name, which is missing")


def check_training(run: RunArguments, args: FinetuningArguments) -> None:
    """Check what concerns a single training."""
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process, which would change the batch size; choose one with "
            "CUDA_VISIBLE_DEVICES or with gpu_ids in the accelerate config"
        )
    if run.lora_r and run.freeze_layers:
        raise UserError("--freeze_layers cannot be combined with --lora_r, which freezes the whole backbone")
    for name in ("linear_probe", "linear_probe_only"):
        if run.lora_r and getattr(run, name):
            raise UserError(f"--{name} fits the head alone, and --lora_r adapts the backbone; leave one of them out")
        if getattr(run, name) and not args.do_train:
            raise UserError(f"--{name} trains a head; it cannot be combined with --do_train false")
    if args.do_train and run.ema_decay and not args.load_best_model_at_end:
        raise UserError("--ema_decay keeps the better weights at the end; it needs --load_best_model_at_end true")
    if run.estimate and (run.linear_probe_only or not args.do_train):
        raise UserError("--estimate measures fine-tuning; leave out --linear_probe_only and --do_train false")
    if args.do_train and args.num_train_epochs <= 0 and args.max_steps <= 0:
        raise UserError("--num_train_epochs: must be above 0; --do_train false skips training")
    if not args.do_train and args.resume_from_checkpoint:
        raise UserError("--resume_from_checkpoint resumes training; it cannot be combined with --do_train false")
    if not args.do_train and run.max_minutes is not None:
        raise UserError("--max_minutes shortens training; it cannot be combined with --do_train false")


def check_repeats(run: RunArguments, args: FinetuningArguments) -> None:
    """Check repeated trainings: several seeds or several folds, not both."""
    if run.seeds and len(set(run.seeds)) < max(2, len(run.seeds)):
        raise UserError(f"--seeds {' '.join(map(str, run.seeds))}: give two or more different seeds; --seed takes one")
    if run.fold is not None and not 1 <= run.fold <= (run.kfold or 0):
        raise UserError(f"--fold {run.fold}: must be 1 to --kfold, which is {run.kfold or 'missing'}")
    if run.kfold and run.seeds:
        raise UserError("--kfold and --seeds cannot be combined: the folds are the repeats; leave one of them out")
    if (run.seeds or run.kfold) and not args.do_train:
        flag = "seeds" if run.seeds else "kfold"
        raise UserError(f"--{flag} repeats the training; it cannot be combined with --do_train false")
    if run.max_eval_samples and (run.seeds or (run.kfold and run.fold is None)):
        raise UserError("--max_eval_samples: --seeds and --kfold validate on all images; leave it out")


def check_search(run: RunArguments, args: FinetuningArguments) -> None:
    """Check that a search has single trainings to try, in one process."""
    if run.search is None:
        return
    for name in ("seeds", "kfold", "linear_probe_only", "max_eval_samples", "estimate", "max_minutes", "reproduce"):
        if getattr(run, name):
            raise UserError(f"--search and --{name} cannot be combined; search first, then run best.yaml")
    for name, value in {"hand_in": run.hand_in, "export": run.export, "push_to_hub": args.push_to_hub}.items():
        if value:
            raise UserError(f"--{name} is for the results of one run; search first, then run best.yaml")
    if args.metric_for_best_model != "accuracy":
        raise UserError("--search compares accuracy; set --metric_for_best_model when you run best.yaml")
    if not args.do_train or args.world_size > 1:
        raise UserError("--search trains in one process: leave out --do_train false, and launch one process")


def check_sharding(run: RunArguments, args: FinetuningArguments) -> None:
    """Check what FSDP cannot do, if the launcher asks for it."""
    if not runtime.shards_model():
        return
    if not runtime.can_shard():
        raise UserError("FSDP shards a model over GPUs, and there is none; use recipes/accelerate/cpu_2.yaml")
    for name in ("ema_decay", "lora_r"):
        if getattr(run, name):
            raise UserError(
                f"--{name} cannot be combined with FSDP; leave it out, or use recipes/accelerate/multi_gpu.yaml"
            )
    if args.do_train and not args.load_best_model_at_end:
        raise UserError(
            "--load_best_model_at_end false cannot be combined with FSDP: the model is read back from a checkpoint"
        )


def check_trackers(names: list[str]) -> None:
    """Check that every tracker exists and is installed. Raises `UserError`."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(f"--report_to {name}: is not a tracker; choose from {known}")
        try:
            INTEGRATION_TO_CALLBACK[name]()  # opens nothing before training begins
        except (RuntimeError, ImportError) as fault:
            raise UserError(f"--report_to {name}: cannot be used: {' '.join(str(fault).split())}") from None


def check_sharing(run: RunArguments, args: FinetuningArguments) -> None:
    """Check that what is reported or pushed has a place to go to."""
    check_trackers(args.report_to)
    if run.hub_space_id and not args.push_to_hub:
        raise UserError("--hub_space_id shows a pushed model; it needs --push_to_hub true")
    if run.hub_space_id and run.trust_remote_code:
        raise UserError("--hub_space_id: a Space does not run a model's own code; leave out --trust_remote_code true")
    if args.push_to_hub and not args.hub_model_id:
        raise UserError("--push_to_hub needs --hub_model_id, for example me/tiny-imagenet-100")


def _shown(args: FinetuningArguments, *names: str) -> str:
    """The flags of those arguments that are set."""
    values = {name: getattr(args, name, None) for name in names}
    words = (f"--{name} {getattr(value, 'value', value)}" for name, value in values.items() if value is not None)
    return " ".join(words)


def _refuse_if_unusable(flags: str, attempt: Callable[[], object]) -> Any:
    """What an attempt returns. Raises `UserError`, which names the flags, for whatever goes wrong in it."""
    try:
        return attempt()
    except Exception as fault:
        reason = " ".join(str(fault).split()) or type(fault).__name__
        raise UserError(f"{flags}: cannot be used: {reason}") from None


def try_arguments(args: FinetuningArguments) -> None:
    """Try the optimizer, the schedule and other settings on a tiny linear layer, before any data are read.

    Optimizers and kernels may lack their package, and schedules and loaders are only checked when they are made.
    Raises `UserError`.
    """
    random_state, model = torch.random.get_rng_state(), torch.nn.Linear(2, 2).to(args.device)

    def make_optimizer() -> torch.optim.Optimizer:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, cast(Any, model))
        optimizer = kind([{"params": list(model.parameters()), "lr": args.learning_rate}], **options)
        model(torch.zeros(1, 2, device=args.device)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    def make_schedule() -> None:
        name, options = args.lr_scheduler_type, args.lr_scheduler_kwargs
        warmup = args.get_warmup_steps(TRIED_STEPS)
        schedule: Any = get_scheduler(
            name, optimizer, warmup, warmup + TRIED_STEPS, scheduler_specific_kwargs=cast(Any, options)
        )
        for _ in range(TRIED_STEPS):
            optimizer.step()
            schedule.step(*([0.0] if isinstance(schedule, METRIC_SCHEDULES) else []))
            if not all(math.isfinite(group["lr"]) for group in optimizer.param_groups):
                raise ValueError("the learning rate becomes infinite")

    def make_loader() -> None:
        workers: dict[str, Any] = {
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "multiprocessing_context": args.dataloader_multiprocessing_context,
        }
        DataLoader(cast(Any, range(8)), num_workers=args.dataloader_num_workers, **workers)

    options = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")  # the latter since 5.23

    def checkpoint_gradients() -> None:
        for name in options:
            if values := getattr(args, name, None):
                checkpoint(
                    model, torch.zeros(1, 2, device=args.device), **{"use_reentrant": False} | cast(dict, values)
                )

    def compile_model() -> None:
        backend, backends = args.torch_compile_backend, torch.compiler.list_backends(exclude_tags=())
        if args.torch_compile and backend and backend not in backends:
            raise ValueError(f"{backend} is not one of {', '.join(backends)}")
        if args.torch_compile and args.torch_compile_mode not in (None, *COMPILE_MODES):
            raise ValueError(f"{args.torch_compile_mode} is not one of {', '.join(COMPILE_MODES)}")

    optimizer = _refuse_if_unusable(_shown(args, "optim", "optim_args"), make_optimizer)
    _refuse_if_unusable(_shown(args, "lr_scheduler_type", "lr_scheduler_kwargs"), make_schedule)
    workers = ("dataloader_num_workers", "dataloader_persistent_workers", "dataloader_multiprocessing_context")
    _refuse_if_unusable(_shown(args, *workers), make_loader)
    _refuse_if_unusable(_shown(args, *options), checkpoint_gradients)
    _refuse_if_unusable(_shown(args, "torch_compile_backend", "torch_compile_mode"), compile_model)
    torch.random.set_rng_state(random_state)


def check_values(run: RunArguments, args: FinetuningArguments) -> None:
    """Check every value and combination of values. Raises `UserError` for the first that cannot work."""
    check_data_arguments(run)
    check_bounds(run, args)
    check_training(run, args)
    check_repeats(run, args)
    check_search(run, args)
    check_sharing(run, args)
    check_sharding(run, args)
    try_arguments(args)
