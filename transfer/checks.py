"""Arguments that cannot work, refused before anything is read or downloaded."""

import math

from transfer import UserError
from transfer.arguments import FinetuningArguments, RunArguments
from transfer.augmentation import TEST_TIME_VIEWS
from transfer.training import processes
from transfer.training.tracking import check_trackers

# Shares of something, and whether it may be none and all of it.
SHARES = {
    "validation_fraction": (False, False),
    "min_crop_area": (False, True),
    "layer_decay": (False, True),
    "erasing_probability": (True, True),
    "strong_until": (True, True),
    "ema_decay": (True, False),
    "drop_path_rate": (True, False),
}


# The lowest that a number may be.
LEAST = {
    "image_size": 8,
    "train_image_size": 8,
    "max_train_samples": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "freeze_levels": 0,
    "lora_r": 0,
    "kfold": 2,
    "search": 1,
    "seed": 0,
    "seeds": 0,
    "split_seed": 0,
}


def check_share(name: str, value: float) -> None:
    """Refuse a share outside 0..1, or at an end that makes no sense."""
    none, whole = SHARES[name]
    if not 0 <= value <= 1 or (value == 0 and not none) or (value == 1 and not whole):
        low, high = "at least 0" if none else "above 0", "at most 1" if whole else "below 1"
        raise UserError(f"--{name} {value}: must be {low} and {high}")


def check_seeds(run: RunArguments, args: FinetuningArguments) -> None:
    """Refuse repeated trainings that would be no repeats."""
    if not run.seeds:
        return
    if len(set(run.seeds)) < max(2, len(run.seeds)):
        raise UserError(f"--seeds {' '.join(map(str, run.seeds))}: give two or more different seeds; --seed takes one")
    if not args.do_train:
        raise UserError("--seeds repeats the training; it does not go with --do_train false")


def check_folds(run: RunArguments, args: FinetuningArguments) -> None:
    """Refuse cross-validation beside what it replaces."""
    if run.fold is not None and not 1 <= run.fold <= (run.kfold or 0):
        raise UserError(f"--fold {run.fold}: must be 1 to --kfold, which is {run.kfold or 'missing'}")
    if run.kfold is None:
        return
    if run.seeds:
        raise UserError("--kfold and --seeds do not go together: the folds are the repeats; leave one of them out")
    if not args.do_train:
        raise UserError("--kfold repeats the training; it does not go with --do_train false")


def check_data_arguments(run: RunArguments) -> None:
    """Refuse a run without data, and arguments of a folder beside those of a Hub data set."""
    if run.data_dir is None and run.dataset_name is None:
        raise UserError("--data_dir is missing: give the data set's folder or zip, or `sample`")
    if run.dataset_name and (run.data_dir or run.classes_file):
        other = "data_dir" if run.data_dir else "classes_file"
        raise UserError(f"--dataset_name and --{other} do not go together; leave one of them out")
    for name in ("dataset_config_name", "label_column_name"):
        if getattr(run, name) and not run.dataset_name:
            raise UserError(f"--{name} says which part of --dataset_name is meant, which is missing")


def check_numbers(run: RunArguments, args: FinetuningArguments) -> None:
    """Refuse numbers outside their range."""
    for name in SHARES:
        if getattr(run, name) is not None:
            check_share(name, getattr(run, name))
    for name in ("mixup_alpha", "cutmix_alpha"):
        if not 0 <= getattr(run, name) < math.inf:
            raise UserError(f"--{name} {getattr(run, name)}: must be 0 or above")
    for name, bound in LEAST.items():
        value = getattr(run if hasattr(run, name) else args, name)
        lowest = min(value, default=bound) if isinstance(value, list) else value
        if lowest is not None and lowest < bound:
            raise UserError(f"--{name} {lowest}: must be at least {bound}")
    if not (math.isfinite(args.learning_rate) and args.learning_rate > 0):
        raise UserError(f"--learning_rate {args.learning_rate}: must be above 0")
    if run.max_minutes is not None and not run.max_minutes > 0:
        raise UserError(f"--max_minutes {run.max_minutes}: must be above 0")


def check_training(run: RunArguments, args: FinetuningArguments) -> None:
    """Refuse trainings that cannot be."""
    if args.metric_for_best_model not in ("accuracy", "loss"):
        raise UserError(f"--metric_for_best_model {args.metric_for_best_model}: must be accuracy or loss")
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process, which would change the batch size; name one in "
            "CUDA_VISIBLE_DEVICES or as gpu_ids in the accelerate config"
        )
    for view in run.test_time_views:
        if view not in TEST_TIME_VIEWS:
            raise UserError(f"--test_time_views {view}: must be of {', '.join(TEST_TIME_VIEWS)}")
    if run.lora_r and run.freeze_levels:
        raise UserError("--freeze_levels does not go with --lora_r, which leaves the whole backbone as it is")
    if args.do_train and args.num_train_epochs <= 0 and args.max_steps <= 0:
        raise UserError("--num_train_epochs: must be above 0; --do_train false skips training")
    if not args.do_train and args.resume_from_checkpoint:
        raise UserError("--resume_from_checkpoint goes on training; it does not go with --do_train false")
    if not args.do_train and run.max_minutes is not None:
        raise UserError("--max_minutes shortens training; it does not go with --do_train false")


def check_search(run: RunArguments, args: FinetuningArguments) -> None:
    """Refuse a search beside what is not one training."""
    if run.search is None:
        return
    for name in ("seeds", "kfold", "probe_only", "estimate", "max_minutes", "reproduce"):
        if getattr(run, name):
            raise UserError(f"--search and --{name} do not go together; search first, then run best.yaml")
    if not args.do_train or args.world_size > 1:
        raise UserError("--search trains, in one process: leave out --do_train false, and launch one process")


def check_sharding(run: RunArguments, args: FinetuningArguments) -> None:
    """Refuse what FSDP cannot do, or does not need."""
    if not processes.shards_model():
        return
    if not processes.can_shard():
        raise UserError("FSDP shards a model over GPUs, and there is none; use recipes/accelerate/cpu_2.yaml")
    for flag, chosen in (("ema_decay", run.ema_decay), ("lora_r", run.lora_r)):
        if chosen:
            raise UserError(f"--{flag} does not go with FSDP; leave it out, or use recipes/accelerate/multi_gpu.yaml")
    if args.do_train and not args.load_best_model_at_end:
        raise UserError("--load_best_model_at_end false does not go with FSDP: the model is put together from disk")


def check_sharing(run: RunArguments, args: FinetuningArguments) -> None:
    """Refuse to report or push to nowhere."""
    check_trackers(args.report_to)
    if run.hub_space_id and not args.push_to_hub:
        raise UserError("--hub_space_id shows a pushed model; it needs --push_to_hub true")
    if args.push_to_hub and not args.hub_model_id:
        raise UserError("--push_to_hub needs --hub_model_id, for example me/tiny-imagenet-100")


def check_values(run: RunArguments, args: FinetuningArguments) -> None:
    """Refuse values that cannot work. Raises `UserError` for the first."""
    check_data_arguments(run)
    check_numbers(run, args)
    check_training(run, args)
    check_seeds(run, args)
    check_folds(run, args)
    check_search(run, args)
    check_sharing(run, args)
    check_sharding(run, args)
