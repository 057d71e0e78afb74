"""One run, repeated runs, search, time limits, and the record that reproduces a run."""

from dataclasses import dataclass

import datasets

from transfer.config import RunArguments
from transfer.data.layouts import DatasetFiles
from transfer.transforms.evaluation import TTA_TRANSFORMS


@dataclass(frozen=True)
class RunContext:
    """What the steps of a run share: what was asked for, the data and their split."""

    run: RunArguments
    arguments: dict  # as they were given, for run.json
    precision: str  # in words
    data: DatasetFiles
    dataset: datasets.DatasetDict
    ends_by: float | None = None  # --max_minutes, in seconds since the epoch
    parent_split: datasets.DatasetDict | None = None  # of a repeated run's training: the split that all start from

    @property
    def test_images(self) -> int:
        """How many images are to be predicted."""
        return len(self.dataset["test"]) if "test" in self.dataset else 0

    @property
    def views(self) -> int:
        """At most how often the final prediction passes each image through the model."""
        return 1 + sum(len(TTA_TRANSFORMS[name]) for name in self.run.tta)
