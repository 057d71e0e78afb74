"""What a run's model said of every held-out and every test image: predictions.npz."""

import dataclasses
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transfer import UserError
from transfer.record import write_whole

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
        write_whole(folder / FILE_NAME, content.getvalue())

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
