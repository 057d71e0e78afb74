"""What all trainings of a run share."""

from dataclasses import dataclass

import datasets

from transfer.arguments import RunArguments
from transfer.augmentation import TEST_TIME_VIEWS
from transfer.data.layouts import ImageFolder


@dataclass(frozen=True)
class Task:
    """The data, their split, and what was asked for."""

    run: RunArguments
    arguments: dict  # as they were given, for run.json
    precision: str
    folder: ImageFolder
    dataset: datasets.DatasetDict
    ends_by: float | None = None  # `--max_minutes`, in seconds since the epoch
    whole: datasets.DatasetDict | None = None  # of one of several trainings: the split that all of them start from

    @property
    def test_images(self) -> int:
        """How many images are to be predicted."""
        return len(self.dataset["test"]) if "test" in self.dataset else 0

    @property
    def views(self) -> int:
        """How often the final prediction shows each image to the model, at most."""
        return 1 + sum(len(TEST_TIME_VIEWS[name]) for name in self.run.test_time_views)
