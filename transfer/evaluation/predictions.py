"""Several trainings of one recipe: their mean and spread, and what they are worth together.

What a run's model said of every held-out and every test image: predictions.npz.
"""

import dataclasses
import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import log_softmax, logsumexp

from transfer.errors import UserError
from transfer.files import write_atomically


def average_probabilities(logits: Sequence[np.ndarray]) -> np.ndarray:
    """The ensemble's log-probabilities (N, classes), from each member's logits (N, classes)."""
    members = np.stack([log_softmax(np.asarray(member, dtype=np.float64), axis=-1) for member in logits])
    return logsumexp(members, axis=0) - np.log(len(members))


def average_views(logits: Sequence[np.ndarray]) -> np.ndarray:
    """Logits (N, classes) of one view as they are; of several, the log of their mean probabilities."""
    return logits[0] if len(logits) == 1 else average_probabilities(logits)


def choose_views(tried: Mapping[str, np.ndarray], labels: np.ndarray) -> list[str]:
    """Names of the views to average: the first, and each other that makes those before it more accurate."""
    names = list(tried)
    kept, best = names[:1], (tried[names[0]].argmax(-1) == labels).mean()
    for name in names[1:]:
        together = average_views([tried[k] for k in [*kept, name]])
        accuracy = (together.argmax(-1) == labels).mean()
        if accuracy > best:
            kept, best = [*kept, name], accuracy
    return kept


FILE_NAME = "predictions.npz"


@dataclass(frozen=True)
class Predictions:
    """Logits in fp32 of the kept model; the test arrays have no rows where there is nothing to predict."""

    validation_files: np.ndarray  # (N,) str, relative to the data set's root
    validation_labels: np.ndarray  # (N,) int64
    validation_logits: np.ndarray  # (N, classes) float32
    test_ids: np.ndarray  # (M,) str
    test_logits: np.ndarray  # (M, classes) float32

    def __post_init__(self):
        kinds = {"files": np.str_, "ids": np.str_, "labels": np.int64, "logits": np.float32}
        for field in dataclasses.fields(self):
            kind = kinds[field.name.rpartition("_")[2]]
            object.__setattr__(self, field.name, np.asarray(getattr(self, field.name), dtype=kind))
        n, m, classes = len(self.validation_files), len(self.test_ids), self.validation_logits.shape[-1]
        shapes = [self.validation_labels.shape, self.validation_logits.shape, self.test_logits.shape]
        if shapes != [(n,), (n, classes), (m, classes)]:
            raise ValueError(f"{n} validation and {m} test images do not go with arrays of shapes {shapes}")

    def save(self, folder: Path) -> None:
        """Write predictions.npz into a run's folder, whole or not at all."""
        content = io.BytesIO()
        np.savez_compressed(content, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        write_atomically(folder / FILE_NAME, content.getvalue())

    @classmethod
    def load(cls, folder: Path) -> "Predictions":
        """Read a run's predictions.npz; nothing in it is unpickled. Raises `UserError`."""
        path = folder / FILE_NAME
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{field.name: arrays[field.name] for field in dataclasses.fields(cls)})
        except FileNotFoundError:
            raise UserError(f"{path}: is not there; the run that it belongs to was not finished") from None
        except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as fault:
            raise UserError(f"{path}: is not a run's predictions ({' '.join(str(fault).split())})") from None
