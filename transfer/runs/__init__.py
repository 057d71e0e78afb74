"""One run, repeated runs, search, time limits, and the record that reproduces a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import datasets

from transfer.config import FinetuningArguments, RunArguments
from transfer.data.layouts import DatasetFiles
from transfer.transforms.evaluation import TTA_TRANSFORMS

FEW_STEPS = 100  # a rule of thumb
FEW_VALIDATION_IMAGES = 50  # with fewer, the 95% interval of an accuracy of 0.8 is wider than 0.2


def count_steps(args: FinetuningArguments, images: int) -> int:
    """The optimizer steps of a training on that many images, as the Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(images / (args.train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


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

    @property
    def test_images(self) -> int:
        """How many images are to be predicted."""
        return len(self.dataset["test"]) if "test" in self.dataset else 0

    def describe_shortage(self, args: FinetuningArguments) -> list[str]:
        """A warning if there are few optimizer steps or validation images, with remedies; nothing if there are not."""
        train, held_out = len(self.dataset["train"]), len(self.dataset["validation"])
        steps, parts = count_steps(args, train), []
        if args.do_train and steps < FEW_STEPS and not self.run.linear_probe_only:
            parts.append(
                f"{steps} optimizer steps are few: try --linear_probe_only true, more --num_train_epochs or a smaller "
                "--per_device_train_batch_size"
            )
        if held_out < FEW_VALIDATION_IMAGES and not self.run.kfold:
            parts.append(
                f"{held_out} validation images are few: their accuracy says little, --kfold 5 validates on every image"
            )
        return [f"warning     {'; '.join(parts)}"] if parts else []

    @property
    def views(self) -> int:
        """At most how often the final prediction passes each image through the model."""
        return 1 + sum(len(TTA_TRANSFORMS[name]) for name in self.run.tta)
