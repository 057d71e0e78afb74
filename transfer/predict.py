"""Predict the classes of pictures with a finished run, a model folder or a Hub model.

    python -m transfer.predict outputs/sample photos/ 'more/*.png' --output predictions.csv --html predictions.html

Pictures may have any size and any format that Pillow reads. Each is prepared as the model's own processor does it, so
the first label is that of transformers' pipeline.
"""

import argparse
import csv
import glob
import io
import os
import shutil
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from transfer.data.images import ImageGeometry, read_image, to_rgb
from transfer.data.listing import JUNK_FOLDERS, is_image, is_link_above, natural_key
from transfer.errors import UserError, exits_cleanly
from transfer.files import read_json, write_atomically
from transfer.models.cpu_kernels import apply_cpu_speedups, prepare_for_inference
from transfer.models.load import load_checkpoint, read_geometry
from transfer.reporting.findings import encode_thumbnail
from transfer.reporting.page import HERE, open_templates
from transfer.runtime import count_cores, tune_malloc
from transfer.transforms.evaluation import EvaluationTransform, check_transform

HEIC_SUFFIXES = (".heic", ".heif")  # of iPhones; Pillow does not read them
THUMBNAIL_SIZE = 160  # pixels of the longer side
PICTURES_ON_PAGE, CLASSES_ON_PAGE = 400, 12  # so that the page stays below 5 MB
ROWS_SHOWN = 20  # rows of the table in the terminal
NARROWEST, WIDEST = 40, 120  # columns of the table


# The files


def _list_folder(folder: Path) -> tuple[list[Path], list[str]]:
    """The pictures in a folder and below it, in natural order, and a line for each folder that cannot be listed.

    Hidden files and folders are left out, and folders that systems and programs leave.
    """
    found: list[Path] = []
    faults: list[OSError] = []
    for place, folders, names in os.walk(folder, onerror=faults.append, followlinks=True):
        visible = [name for name in folders if not name.startswith(".") and name not in JUNK_FOLDERS]
        folders[:] = [name for name in visible if not is_link_above(Path(place, name))]
        wanted = [name for name in names if is_image(name) or name.lower().endswith(HEIC_SUFFIXES)]
        found += [Path(place, name) for name in wanted if not name.startswith(".")]
    lines = [f"{fault.filename}: cannot be listed ({fault.strerror})" for fault in faults]
    return sorted(found, key=lambda path: natural_key(path.as_posix())), lines


def show_path(path: Path) -> str:
    """The path with forward slashes, as valid Unicode: on Linux, a file name may hold any bytes."""
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


def list_pictures(places: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the files that paths, folders and globs name, each once, and a line for each place without any."""
    found: dict[str, Path] = {}  # by absolute path
    faults: list[str] = []
    for place in places:
        # The methods of Path raise for a user that does not exist, for names that are too long, and so on.
        path = os.path.expanduser(place)  # noqa: PTH111
        unlisted: list[str] = []
        if os.path.isdir(path):  # noqa: PTH112
            (files, unlisted), fault = _list_folder(Path(path)), "holds no pictures"
        elif os.path.exists(path) or not glob.has_magic(place):  # noqa: PTH110
            files, fault = [Path(path)] if os.path.exists(path) else [], "no such file or folder"  # noqa: PTH110
        else:
            # Not Path.glob, which wants a root.
            matches = sorted(glob.glob(path, recursive=True), key=natural_key)  # noqa: PTH207
            files, fault = [Path(match) for match in matches if not Path(match).is_dir()], "matches no file"
        for file in files:
            found.setdefault(os.path.abspath(file), file)  # noqa: PTH100
        faults += unlisted or ([] if files else [f"{place}: {fault}"])
    return list(found.values()), faults


# Decoding


@dataclass(frozen=True)
class Decoded:
    """One file: its pixels (S, S, 3) uint8 as the model wants them; with a fault they are empty."""

    file: Path
    pixels: np.ndarray
    fault: str | None = None
    thumbnail: str = ""  # a data URI, where one was asked for


@dataclass(frozen=True)
class Prediction:
    """The most likely labels of a picture with their probabilities, the first one first."""

    file: Path
    labels: list[int]
    confidences: list[float]
    thumbnail: str = ""


def _decode(file: Path, geometry: ImageGeometry, with_thumbnail: bool) -> Decoded:
    record, image = read_image(Path(), str(file), with_digest=False)
    if image is None:
        advice = "; convert it to JPEG" if file.suffix.lower() in HEIC_SUFFIXES else ""
        return Decoded(file, np.empty(0), f"{record.fault}{advice}")
    image = image if image.mode == "RGB" else image.convert("RGB")
    thumbnail = encode_thumbnail(image, THUMBNAIL_SIZE) if with_thumbnail else ""
    return Decoded(file, to_rgb(geometry.apply(image)), thumbnail=thumbnail)


def decode_batches(
    files: Sequence[Path], geometry: ImageGeometry, batch_size: int, thumbnails: int = 0
) -> Iterator[list[Decoded]]:
    """Decode files in threads and yield them in order, in batches; the first `thumbnails` of them with one.

    With an accelerator, the next batch is decoded while it computes. A CPU needs all its cores for either.
    """
    Image.init()  # threads must not do it at the same time
    ahead: deque[list[Future[Decoded]]] = deque()
    with warnings.catch_warnings(), ThreadPoolExecutor(count_cores()) as pool:
        # Filters belong to the process, so the one that `decode` sets in a thread could end in another one's picture.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for start in range(0, len(files), batch_size):
            places = range(start, min(start + batch_size, len(files)))
            ahead.append([pool.submit(_decode, files[place], geometry, place < thumbnails) for place in places])
            if len(ahead) > torch.accelerator.is_available():
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]


# The model


@dataclass(frozen=True)
class PictureClassifier:
    """A trained model, ready to predict, with how it wants its images and the temperature that calibrates it."""

    model: PreTrainedModel
    geometry: ImageGeometry
    names: list[str]  # of the classes, in label order
    temperature: float | None  # None if no run knows it

    @torch.inference_mode()
    def score(self, pixels: np.ndarray) -> torch.Tensor:
        """The probabilities (B, classes) of images (B, S, S, 3) uint8, resized and cropped by the geometry."""
        # Seen as (B, 3, S, S), the pixels are channels-last, as convolutions like it.
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.model.device)
        transform = EvaluationTransform(self.geometry, cropped=True).to(self.model.device)
        logits = self.model(pixel_values=transform(images)).logits.double()
        if not logits.isfinite().all():
            raise UserError("the model gives numbers that are not finite (NaN or infinity): its weights are damaged")
        return (logits / (self.temperature or 1.0)).softmax(-1).cpu()

    def predict(self, pictures: Sequence[Decoded], top_k: int) -> list[Prediction]:
        """The most likely labels of each picture, at most `top_k`."""
        if not pictures:
            return []
        top = self.score(np.stack([picture.pixels for picture in pictures])).topk(min(top_k, len(self.names)))
        rows = zip(pictures, top.indices.tolist(), top.values.tolist(), strict=True)
        return [Prediction(picture.file, labels, shares, picture.thumbnail) for picture, labels, shares in rows]


def find_model(name: str) -> tuple[str, Path | None]:
    """Return the model folder or Hub id, and the folder of the run that it belongs to, if there is one."""
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        if not (path / "model" / "config.json").is_file():
            raise UserError(f"{name}: holds no model; give a finished run, such as outputs/sample, or a model folder")
        path = path / "model"
    elif not path.exists() and path.parent != Path() and path.parent.is_dir():  # so it is not meant as a Hub id
        raise UserError(
            f"{name}: no such folder; give a finished run, such as outputs/sample, a model folder or a Hub id"
        )
    run = path.resolve().parent
    # A model folder that was copied elsewhere may lie beside the metrics of something else.
    belongs = path.resolve().name == "model" and (run / "metrics.json").is_file() and (run / "run.json").is_file()
    return (str(path) if path.is_dir() else name), run if belongs else None


def read_temperature(run: Path) -> float | None:
    """Return the temperature that a run fitted on its validation images, or None. Raises `UserError`."""
    calibration = read_json(run / "metrics.json").get("calibration") or {}
    return calibration.get("temperature")


def open_classifier(name: str) -> PictureClassifier:
    """Load a run's model, a model folder or a Hub model, in fp32 on the best device.

    Raises `UserError` if it cannot be loaded, has no trained head, or prepares images in an unsupported way.
    """
    source, run = find_model(name)
    try:
        model, processor = load_checkpoint(source, needs_head=True)
    except UserError as fault:
        raise UserError(str(fault).removeprefix("--model_name_or_path ")) from None
    geometry = read_geometry(processor)
    check_transform(processor, EvaluationTransform(geometry))
    prepare_for_inference(model, geometry.crop)  # before it moves to a GPU; nothing here needs the original again
    apply_cpu_speedups(model)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model.eval().to(device, memory_format=torch.channels_last)
    names = [str(name) for _, name in sorted((model.config.id2label or {}).items())]
    return PictureClassifier(model, geometry, names, read_temperature(run) if run else None)


# Prediction


def predict_pictures(
    classifier: PictureClassifier,
    files: Sequence[Path],
    top_k: int,
    batch_size: int,
    thumbnails: int = 0,
    show_progress: bool = False,
) -> tuple[list[Prediction], list[Decoded]]:
    """Return the predictions of the files in order, and the files that cannot be read.

    The first `thumbnails` files get one.
    """
    predictions, unreadable = [], []
    with tqdm(total=len(files), desc="predicting", unit=" images", disable=not show_progress, leave=False) as bar:
        for batch in decode_batches(files, classifier.geometry, batch_size, thumbnails):
            unreadable += [picture for picture in batch if picture.fault]
            predictions += classifier.predict([picture for picture in batch if not picture.fault], top_k)
            bar.update(len(batch))
    return predictions, unreadable


# The results


def render_csv(predictions: Sequence[Prediction], names: Sequence[str]) -> str:
    """The predictions as csv: file, label, name, confidence, then label_2, name_2, confidence_2 and so on."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ("label", "name", "confidence")
    further = [f"{column}_{place}" for place in range(2, len(predictions[0].labels) + 1) for column in columns]
    writer.writerow(["file", *columns, *further])
    for prediction in predictions:
        row = [show_path(prediction.file)]
        for label, confidence in zip(prediction.labels, prediction.confidences, strict=True):
            row += [str(label), names[label], f"{confidence:.4f}"]
        writer.writerow(row)
    return text.getvalue()


def _shorten(text: str, most: int, keep_end: bool = False) -> str:
    if len(text) <= most:
        return text
    return "…" + text[1 - most :] if keep_end else text[: most - 1] + "…"


def render_table(predictions: Sequence[Prediction], names: Sequence[str], columns: int) -> list[str]:
    """The predictions as aligned lines of about `columns` characters: file, name, confidence, and the next names."""
    shown = [show_path(prediction.file) for prediction in predictions]
    tops = [names[prediction.labels[0]] for prediction in predictions]
    widths = [min(max(map(len, cells)), columns // 3) for cells in (shown, tops)]
    lines = []
    for file, name, prediction in zip(shown, tops, predictions, strict=True):
        line = f"{_shorten(file, widths[0], True):<{widths[0]}}  {_shorten(name, widths[1]):<{widths[1]}}"
        line += f"  {prediction.confidences[0]:6.1%} "
        others = zip(prediction.labels[1:], prediction.confidences[1:], strict=True)
        for further in [f" {names[label]} {confidence:.1%}" for label, confidence in others]:
            if len(line) + len(further) >= columns:
                break
            line += further + ","
        lines.append(line.rstrip(" ,"))
    return lines


def render_predictions(
    classifier: PictureClassifier, predictions: Sequence[Prediction], unreadable: Sequence[str], model: str
) -> str:
    """The predictions as one self-contained page: how often each class was predicted, and the pictures."""
    names = classifier.names
    counts = Counter(names[prediction.labels[0]] for prediction in predictions)
    shown = [
        {
            "file": "/".join(Path(show_path(prediction.file)).parts[-2:]),
            "thumbnail": prediction.thumbnail,
            "guesses": zip([names[label] for label in prediction.labels], prediction.confidences, strict=True),
        }
        for prediction in predictions
        if prediction.thumbnail
    ]
    style = (HERE / "page.css").read_text(encoding="utf-8")
    return (
        open_templates()
        .get_template("predictions.html")
        .render(
            style=style,
            model=model,
            count=len(predictions),
            temperature=classifier.temperature,
            counts=counts.most_common(CLASSES_ON_PAGE),
            more_classes=max(0, len(counts) - CLASSES_ON_PAGE),
            shown=shown,
            unreadable=unreadable,
        )
    )


def describe_results(
    classifier: PictureClassifier, predictions: Sequence[Prediction], seconds: float, output: Path
) -> str:
    """One line on how many pictures were predicted, how fast, where they are, and what the confidence means."""
    count, temperature = len(predictions), classifier.temperature
    meaning = f"calibrated with temperature {temperature:.2f}" if temperature else "not calibrated"
    speed = f"{count:,} picture{'s' if count > 1 else ''} in {seconds:.1f} s ({count / seconds:,.0f} images/s)"
    return f"{output}  {speed}, confidence {meaning}"


def _check_output(path: Path, files: Sequence[Path]) -> None:
    """Check before the work that a result can be written, and that it replaces no picture. Raises `UserError`."""
    is_picture = path.resolve() in {file.resolve() for file in files}
    if is_picture or (path.exists() and not path.is_file()):
        kind = "one of the pictures" if is_picture else "a folder" if path.is_dir() else "not a regular file"
        raise UserError(f"{path}: is {kind}; name another file")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: the folder {path.parent} is not writable; name a file elsewhere")


def _list_faults(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"unreadable: {line}", file=sys.stderr)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Predict the pictures that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m transfer.predict",
        description="Predict the classes of pictures. Files that cannot be read are listed and left out.",
        epilog="example: python -m transfer.predict outputs/sample photos/ --top_k 5",
    )
    parser.add_argument("model", metavar="MODEL", help="a finished run, a model folder or a Hub id")
    parser.add_argument("places", nargs="+", metavar="PATH", help="picture, folder with pictures, or glob")
    parser.add_argument("--output", type=Path, default="predictions.csv", help="csv to write [predictions.csv]")
    parser.add_argument("--html", type=Path, help="page to write, with small pictures, names and bars")
    parser.add_argument("--top_k", type=int, default=3, help="number of classes for each picture [3]")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures computed at once [64]")
    args = parser.parse_args(argv)
    for flag in ("top_k", "batch_size"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if args.html and args.html.resolve() == args.output.resolve():
        raise UserError(f"--html {args.html}: is the --output, too; name another file")
    if "" in args.places:
        raise UserError("one of the paths is empty; name a picture, a folder or a glob")
    files, faults = list_pictures(args.places)
    for path in filter(None, (args.output, args.html)):
        _check_output(path, files)
    _list_faults(faults)
    if not files:
        raise UserError("there are no pictures to predict")
    transformers.utils.logging.disable_progress_bar()  # of the weights
    tune_malloc()
    classifier = open_classifier(args.model)
    start = time.perf_counter()
    thumbnails = PICTURES_ON_PAGE if args.html else 0
    predictions, unreadable = predict_pictures(
        classifier, files, args.top_k, args.batch_size, thumbnails, show_progress=sys.stderr.isatty()
    )
    seconds = time.perf_counter() - start
    unread = [f"{show_path(picture.file)}: {picture.fault}" for picture in unreadable]
    _list_faults(unread)
    if not predictions:
        raise UserError("none of the pictures can be read")
    write_atomically(args.output, render_csv(predictions, classifier.names))
    if args.html:
        model = Path(args.model).name if Path(args.model).is_absolute() else args.model
        write_atomically(args.html, render_predictions(classifier, predictions, faults + unread, model))
    columns = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    print(*render_table(predictions[:ROWS_SHOWN], classifier.names, columns), sep="\n")
    if len(predictions) > ROWS_SHOWN:
        print(f"... and {len(predictions) - ROWS_SHOWN:,} more")
    print("", describe_results(classifier, predictions, seconds, args.output), sep="\n")
    if args.html:
        print(args.html)


if __name__ == "__main__":
    main()
