"""One run, repeated runs, search, time limits, and the record that reproduces a run."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import datasets

from transfer.config import FinetuningArguments, RunArguments
from transfer.data.images.store import PixelDataset
from transfer.data.layouts import DatasetFiles
from transfer.data.splits import take_evenly
from transfer.transforms.evaluation import TTA_TRANSFORMS

if TYPE_CHECKING:
    from transfer.training.trainer import FinetuningTrainer

MEASURED_IMAGES = 1000  # at most, for the accuracy before training and the one on training images
FEW_STEPS = 50  # a rule of thumb
FEW_VALIDATION_IMAGES = 100  # with fewer, the 95% interval of an accuracy of 0.8 is wider than 0.15
FOLDS = 5  # of the cross-validation that is recommended


def count_steps(args: FinetuningArguments, images: int) -> int:
    """The optimizer steps of a training on that many images, as the Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(images / (args.train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def list_parts(run: RunArguments) -> dict[str, dict]:
    """The trainings of a repeated run: the folder of each seed or fold, and the arguments that are its own."""
    if run.seeds:
        return {f"seed-{seed}": {"seed": seed, "seeds": []} for seed in run.seeds}
    folds = range(1, (run.kfold or 0) + 1) if not run.fold else ()
    return {f"fold-{fold}": {"fold": fold} for fold in folds}


def select_evenly(split: datasets.Dataset, count: int) -> datasets.Dataset:
    """At most `count` images of a labeled split, evenly over its classes."""
    return split.select(take_evenly(range(len(split)), split["file"][:], split["label"][:], count))


@dataclass(frozen=True)
class RunContext:
    """What the steps of a run share: what was asked for, the data and their split."""

    run: RunArguments
    arguments: dict  # as they were given, for run.json
    precision: str  # in words
    data: DatasetFiles
    dataset: datasets.DatasetDict
    ends_by: float | None = None  # --max_minutes, in seconds since the epoch
    words: Sequence[str] = ()  # of the command line, or of the call of `main`
    parent_split: datasets.DatasetDict | None = None  # of a repeated run's training: the split that all start from
    started: float = field(default_factory=time.time)  # in seconds since the epoch

    @property
    def test_images(self) -> int:
        """How many images are to be predicted."""
        return len(self.dataset["test"]) if "test" in self.dataset else 0

    def validate_on(self, trainer: "FinetuningTrainer", count: int) -> "RunContext":
        """The context with `count` of the validation images, evenly over the classes; the trainer gets the same."""
        dataset = datasets.DatasetDict(self.dataset | {"validation": select_evenly(self.dataset["validation"], count)})
        trainer.eval_dataset = PixelDataset(trainer.eval_dataset.store, dataset["validation"])
        return replace(self, dataset=dataset)

    def describe_shortage(self, args: FinetuningArguments) -> list[str]:
        """Warnings about few optimizer steps and few validation images, with remedies; none if there are enough."""
        train, held_out = len(self.dataset["train"]), len(self.dataset["validation"])
        steps, parts = count_steps(args, train), []
        is_trial = self.run.max_train_samples is not None
        if args.do_train and steps < FEW_STEPS and not self.run.linear_probe_only and not is_trial:
            parts.append(
                f"{steps} optimizer steps are few: use recipes/small_folder.yaml, more --num_train_epochs or a "
                "smaller --per_device_train_batch_size"
            )
        if held_out < FEW_VALIDATION_IMAGES and not self.run.kfold:
            smallest = min(Counter(self.data.train_labels).values())
            can_fold = not self.data.validation_files and smallest >= FOLDS
            remedy = f"--kfold {FOLDS} validates on every image" if can_fold else "add images"
            parts.append(f"{held_out} validation images are few: their accuracy is a rough estimate; {remedy}")
        return [f"warning     {part}" for part in parts]

    @property
    def views(self) -> int:
        """At most how often the final prediction passes each image through the model."""
        return 1 + sum(len(TTA_TRANSFORMS[name]) for name in self.run.tta)
