"""Small pictures of a data set's images, to stand inside the page."""

import base64
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from PIL import Image

from transfer import UserError
from transfer.data.archive import extract_zip
from transfer.data.layouts import IMAGE_SUFFIXES
from transfer.data.pixels import read_image
from transfer.offline import sample_data

SIDE = 96  # pixels of the longer side
JPEG_QUALITY = 80


def find_data_root(data_dir: str, known_file: str) -> Path:
    """Where a data set's files lie: the folder, the zip unpacked, or `sample`, that holds `known_file`.

    Raises `UserError` where it does not.
    """
    path = Path(data_dir).expanduser()
    if data_dir == "sample":
        path = sample_data()
    elif path.is_file():
        path = extract_zip(path)
    if not path.is_dir():
        raise UserError(f"{data_dir}: no such folder or zip; --data_dir names the data set of this run")
    inside = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    for root in (path, *inside):
        if (root / known_file).is_file():
            return root
    raise UserError(f"{data_dir}: is not this run's data set: {known_file} is not there")


def find_test_files(root: Path, ids: Iterable[str], labelled_files: Iterable[str]) -> dict[str, str]:
    """Files of test images by id, which is a file's name with or without its ending; absent where there is none."""
    wanted, found = set(ids), {}
    # A labelled image may bear the same name as a test image.
    labelled = {PurePosixPath(file).parts[0] for file in labelled_files}
    for folder, folders, files in os.walk(root):
        if Path(folder) == root:
            folders[:] = [name for name in folders if name not in labelled]
        for name in files:
            stem, suffix = os.path.splitext(name)  # noqa: PTH122 - of every test image
            if suffix.lower() in IMAGE_SUFFIXES:
                place = (Path(folder) / name).relative_to(root).as_posix() if {stem, name} & wanted else ""
                found |= {image_id: place for image_id in (stem, name) if image_id in wanted}
    return found


class Album:
    """Pictures of files below a root; of nothing where the root is None."""

    def __init__(self, root: Path | None, test_files: Mapping[str, str] | None = None):
        self.root, self.test_files = root, test_files or {}

    def show(self, file: str) -> str | None:
        """The image as a data URI of a few kilobytes; None where it cannot be shown."""
        if self.root is None or ".." in PurePosixPath(file).parts or PurePosixPath(file).is_absolute():
            return None
        _, image = read_image(self.root, file)
        if image is None:
            return None
        image = image.convert("RGB")
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        content = io.BytesIO()
        image.save(content, "JPEG", quality=JPEG_QUALITY)
        return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"

    def show_test(self, image_id: str) -> str | None:
        """The test image of that id, as `show` gives it."""
        return self.show(self.test_files[image_id]) if image_id in self.test_files else None
