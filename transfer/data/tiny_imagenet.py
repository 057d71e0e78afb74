"""tiny-imagenet-100 without the competition's files: generated sample data, and a rebuild from Tiny ImageNet-200.

A class of the sample data is one shape in one pattern, for example `striped star`. Color, place, size, rotation,
background, clutter, occlusion, light and sharpness vary within a class, so that none of them gives the class away.
"""

import hashlib
import math
import shutil
import string
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from transfer.data.labels import make_template, render_submission
from transfer.data.layouts import DatasetFiles
from transfer.data.listing import TEMPLATE_NAME, WNIDS_NAME, file_name, image_id_of
from transfer.errors import UserError
from transfer.files import build_folder_once, cache_folder, write_folder_atomically
from transfer.terminal import track

# One picture of the sample data

IMAGE_SIZE = 64
CANVAS_SIZE = 2 * IMAGE_SIZE  # drawn at twice the size and averaged down, for smooth edges
GREYSCALE_SHARE = 0.02
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, the weights of PIL's mode L


def _curve(radius, n: int = 96) -> np.ndarray:
    """(n, 2) vertices of a closed curve around the origin with `radius(angle)`."""
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([np.sin(angle), -np.cos(angle)], axis=1) * np.broadcast_to(radius(angle), n)[:, None]


def _heart(n: int = 96) -> np.ndarray:
    """(n, 2) vertices of a heart."""
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y - 2], axis=1) / 15


def _crescent() -> np.ndarray:
    """(128, 2) vertices of a disc less a smaller disc at its side: along the outer arc, back along the inner one."""
    outer, inner = np.linspace(0.7, 2 * np.pi - 0.7, 64), np.linspace(2 * np.pi - 1.08, 1.08, 64)
    radius = np.sin(0.7) / np.sin(1.08)  # both arcs end in the same two tips
    shift = np.cos(0.7) - radius * np.cos(1.08)
    rim = np.stack([np.cos(outer), np.sin(outer)], axis=1)
    bite = np.stack([shift + radius * np.cos(inner), radius * np.sin(inner)], axis=1)
    return np.concatenate([rim, bite]) + np.array([0.2, 0])


def _cross(arm: float = 0.36) -> np.ndarray:
    """(12, 2) vertices of a cross: three corners, repeated at each quarter turn."""
    corners, quarter_turn = np.array([[-arm, -1], [arm, -1], [arm, -arm]]), np.array([[0, 1], [-1, 0]])
    return np.concatenate([corners @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)])


CIRCLE = _curve(lambda angle: 0.92)
# Outline, then its holes; vertices (n, 2) in a frame where the shape fills about [-1, 1], y down.
SHAPES = {
    "circle": [CIRCLE],
    "square": [0.84 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])],
    "triangle": [1.15 * _curve(lambda angle: 1.0, 3)],
    "star": [1.1 * _curve(lambda angle: np.tile([1.0, 0.42], 5), 10)],
    "ring": [1.05 * CIRCLE, 0.52 * CIRCLE],
    "cross": [_cross()],
    "heart": [_heart()],
    "crescent": [1.1 * _crescent()],
    "arrow": [1.05 * np.array([[0, -1], [0.9, 0], [0.38, 0], [0.38, 1], [-0.38, 1], [-0.38, 0], [-0.9, 0]])],
    "flower": [_curve(lambda angle: 0.75 + 0.3 * np.cos(5 * angle))],
}


def _blotches(u, v, f, rng) -> np.ndarray:
    """(S, S) mask of irregular patches: a threshold on a sum of plane waves in random directions."""
    direction, phase = rng.uniform(0, 2 * np.pi, (2, 6)).tolist()
    waves = (np.sin(0.8 * f * (u * math.cos(d) + v * math.sin(d)) + p) for d, p in zip(direction, phase, strict=True))
    return sum(waves) > 0.6


# Mask of the second color: u and v are (S, S) coordinates in the shape's frame, f is in radians per unit.
PATTERNS = {
    "plain": lambda u, v, f, rng: np.zeros(u.shape, bool),
    "striped": lambda u, v, f, rng: np.sin(f * u) > 0,
    "dotted": lambda u, v, f, rng: np.cos(f * u) + np.cos(f * v) > 0.75,
    "checkered": lambda u, v, f, rng: np.sin(0.8 * f * u) * np.sin(0.8 * f * v) > 0,
    "wavy": lambda u, v, f, rng: np.sin(f * u + 1.8 * np.sin(0.9 * f * v)) > 0,
    "ringed": lambda u, v, f, rng: np.sin(1.1 * f * np.hypot(u, v)) > 0,
    "rayed": lambda u, v, f, rng: np.sin(7 * np.arctan2(v, u)) > 0,
    "netted": lambda u, v, f, rng: np.maximum(np.cos(f * u), np.cos(f * v)) > 0.8,
    "blotched": _blotches,
    "halved": lambda u, v, f, rng: u > 0,
}


def _color(rng, luminance: float) -> np.ndarray:
    """A random RGB color, (3,) in 0..255, of a luminance in 0..1, which grayscale keeps."""
    chroma = rng.uniform(-1, 1, 3)
    chroma -= chroma @ LUMA
    return np.clip(255 * (luminance + 0.33 * chroma), 0, 255)


def _place(rng) -> np.ndarray:
    """(2, 3) affine map from the shape's frame to canvas pixels: random place, size, rotation and a little shear."""
    angle = rng.uniform(-0.6, 0.6)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    squeeze = np.array([[rng.uniform(0.85, 1.1), rng.uniform(-0.12, 0.12)], [0, rng.uniform(0.85, 1.1)]])
    radius = CANVAS_SIZE * rng.uniform(0.27, 0.44)
    center = CANVAS_SIZE * (0.5 + rng.uniform(-0.13, 0.13, 2))
    return np.column_stack([radius * rotation @ squeeze, center])


def _mask(shape: str, place: np.ndarray) -> Image.Image:
    """Mask of the shape at its place: mode L, 0 or 255."""
    mask = Image.new("L", (CANVAS_SIZE, CANVAS_SIZE))
    draw = ImageDraw.Draw(mask)
    for fill, outline in zip((255, 0), SHAPES[shape], strict=False):
        draw.polygon((outline @ place[:, :2].T + place[:, 2]).ravel().tolist(), fill=fill)
    return mask


def _texture(pattern: str, place: np.ndarray, colors, rng) -> Image.Image:
    """The pattern in two colors over the whole canvas, randomly turned and shifted in the shape's frame."""
    angle = rng.uniform(-0.5, 0.5) + rng.integers(4) * np.pi / 2
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    (a, b), (c, d) = (turn @ np.linalg.inv(place[:, :2])).tolist()
    pixels = np.arange(CANVAS_SIZE, dtype=np.float32)
    columns, rows = pixels[None, :] - float(place[0, 2]), pixels[:, None] - float(place[1, 2])
    shift_u, shift_v = rng.uniform(-0.15, 0.15, 2).tolist()
    u = a * columns + b * rows + shift_u  # (S, S)
    v = c * columns + d * rows + shift_v
    second = PATTERNS[pattern](u, v, rng.uniform(9, 13), rng)
    return Image.fromarray(np.array(colors, np.uint8)[second.astype(np.intp)])  # (S, S, 3)


def _clutter(draw: ImageDraw.ImageDraw, luminance: float, n: int, rng) -> None:
    """Draw n random ellipses, bars and lines in colors near the background's."""
    for kind, (x, y), (w, h) in zip(
        rng.integers(3, size=n), rng.uniform(0, CANVAS_SIZE, (n, 2)), rng.uniform(6, 30, (n, 2)), strict=True
    ):
        fill = tuple(_color(rng, luminance + rng.uniform(-0.1, 0.1)).astype(int))
        if kind == 0:
            draw.ellipse((x - w, y - h, x + w, y + h), fill=fill)
        elif kind == 1:
            draw.rectangle((x - w, y - h / 2, x + w, y + h / 2), fill=fill)
        else:
            draw.line((x - 2 * w, y - 2 * h, x + 2 * w, y + 2 * h), fill=fill, width=int(2 + w / 5))


def _background(luminance: float, rng) -> Image.Image:
    """A blend of four random corner colors, with clutter on it."""
    corners = [[_color(rng, luminance + rng.uniform(-0.07, 0.07)) for _ in range(2)] for _ in range(2)]
    canvas = Image.fromarray(np.array(corners, np.uint8))  # (2, 2, 3)
    canvas = canvas.resize((CANVAS_SIZE, CANVAS_SIZE), Image.Resampling.BILINEAR)
    _clutter(ImageDraw.Draw(canvas), luminance, rng.integers(3, 9), rng)
    return canvas


def _occlude(canvas: Image.Image, place: np.ndarray, luminance: float, rng) -> None:
    """Draw a bar over the shape's edge, away from its center, so that most of the shape stays visible."""
    angle = rng.uniform(0, 2 * np.pi)
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    middle = place[:, 2] + across * CANVAS_SIZE * rng.uniform(0.15, 0.32)
    ends = np.concatenate([middle - 2 * CANVAS_SIZE * along, middle + 2 * CANVAS_SIZE * along])
    fill = tuple(_color(rng, luminance).astype(int))
    ImageDraw.Draw(canvas).line(ends.tolist(), fill=fill, width=int(rng.integers(6, 15)))


def _photograph(canvas: Image.Image, rng) -> Image.Image:
    """The canvas as a 64 x 64 picture with blur, exposure, shading from one side and noise."""
    image = canvas.reduce(CANVAS_SIZE // IMAGE_SIZE)
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0)))
    side = np.linspace(-1, 1, IMAGE_SIZE, dtype=np.float32)
    slope_x, slope_y = rng.uniform(-0.2, 0.2, 2).tolist()
    light = rng.uniform(0.8, 1.2) + slope_x * side[None, :] + slope_y * side[:, None]  # (S, S)
    noise = rng.standard_normal((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32) * rng.uniform(2, 12)
    return Image.fromarray(np.clip(np.asarray(image) * light[..., None] + noise, 0, 255).astype(np.uint8))


def draw_image(shape: str, pattern: str, rng: np.random.Generator) -> tuple[Image.Image, tuple[int, ...]]:
    """Draw one picture of a class: a 64 x 64 image of mode RGB or (2%) L, and its box (x_min, y_min, x_max, y_max)."""
    # A dark, a middle and a light color in random roles, so that shape and pattern stay visible in grayscale.
    levels = rng.permutation([0.2, 0.52, 0.84]) + rng.uniform(-0.07, 0.07, 3)
    place = _place(rng)
    mask = _mask(shape, place)
    canvas = _background(levels[2], rng)
    canvas.paste(_texture(pattern, place, [_color(rng, level) for level in levels[:2]], rng), mask=mask)
    if rng.random() < 0.3:
        _occlude(canvas, place, levels[2], rng)
    image = _photograph(canvas, rng)
    bounds = mask.getbbox()
    assert bounds is not None  # every shape covers some pixels
    left, top, right, bottom = bounds
    box = (left // 2, top // 2, (right - 1) // 2, (bottom - 1) // 2)
    return image.convert("L") if rng.random() < GREYSCALE_SHARE else image, box


# The sample dataset

TRAIN, TEST, LAYOUT = range(3)  # the random streams of one seed

Classes = dict[str, tuple[str, str]]  # wnid -> (shape, pattern)


def sample_classes() -> Classes:
    """The 100 invented wnids in label order, each with its (shape, pattern). They do not depend on a seed."""
    rng = np.random.default_rng(100)
    drawn = [(shape, pattern) for shape in SHAPES for pattern in PATTERNS]
    numbers = 90_000_000 + rng.choice(10_000_000, len(drawn), replace=False)  # no noun of WordNet: those end below n16
    return {f"n{number}": drawn[i] for number, i in zip(numbers, rng.permutation(len(drawn)), strict=True)}


def _write_words(path: Path, classes: Classes) -> None:
    """Write `wnid<TAB>name, synonym` lines sorted by wnid, some for no class, without a newline at the end."""
    words = {wnid: f"{pattern} {shape}, {shape} in {pattern}" for wnid, (shape, pattern) in classes.items()}
    words |= {f"n8000{i:04}": shape for i, shape in enumerate(SHAPES)}
    words |= {f"n8001{i:04}": f"{pattern} pattern" for i, pattern in enumerate(PATTERNS)}
    path.write_text("\n".join(f"{wnid}\t{words[wnid]}" for wnid in sorted(words)))


def _save(image: Image.Image, path: Path) -> None:
    image.save(path, format="JPEG", quality=85)


def _write_train(folder: Path, classes: Classes, seed: int, per_class: int) -> None:
    """Write `train/<wnid>/images/<wnid>_<k>.JPEG`, and the boxes to `train/<wnid>/<wnid>_boxes.txt`."""
    for label, (wnid, drawn) in enumerate(classes.items()):
        (folder / wnid / "images").mkdir(parents=True)
        boxes = []
        for k in range(per_class):
            image, box = draw_image(*drawn, np.random.default_rng([seed, TRAIN, label, k]))
            name = f"{wnid}_{k}.JPEG"
            _save(image, folder / wnid / "images" / name)
            boxes.append("\t".join(map(str, (name, *box))) + "\n")
        (folder / wnid / f"{wnid}_boxes.txt").write_text("".join(boxes))


def _random_ids(n: int, rng: np.random.Generator) -> list[str]:
    """n random strings of 16 characters in 0-9a-z."""
    alphabet = np.array(list(string.digits + string.ascii_lowercase))
    return ["".join(row) for row in rng.choice(alphabet, (n, 16))]  # 36**16 are possible: no two are equal


def _write_test(folder: Path, classes: Classes, seed: int, ids: list[str], labels: np.ndarray) -> None:
    """Write `test/images/<id>.JPEG`; their labels are not written anywhere."""
    (folder / "images").mkdir(parents=True)
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    drawn = list(classes.values())
    for i, label in enumerate(labels):
        # The competition's test set repeats three training images.
        stream = [seed, TRAIN, label, 0] if i % 150 == 149 else [seed, TEST, i]
        shape, pattern = drawn[label]
        image, _ = draw_image(shape, pattern, np.random.default_rng(stream))
        _save(image, folder / "images" / f"{ids[i]}.JPEG")


def generate_sample_data(root: Path, seed: int = 0, train_per_class: int = 36, test_images: int = 500) -> Path:
    """Write generated pictures to `root/tiny-imagenet-100` in the competition's layout and return that folder.

    100 classes, the same for every seed, have `train_per_class` 64 x 64 JPEGs each; `test_images` are spread evenly
    over them. The same seed gives the same bytes. An image takes about 1.2 ms on one core. The quirks of the
    competition's data are kept: wnids.txt is not sorted, words.txt names more than the classes, all images lie in
    folders called `images`, test files have random ids, the template lists them in another order with label 0, some
    images are grayscale, some test images repeat training images, and there is a .DS_Store. Raises `FileExistsError`
    if the folder exists.
    """
    folder = root / "tiny-imagenet-100"
    folder.mkdir(parents=True)
    classes = sample_classes()
    rng = np.random.default_rng([seed, LAYOUT])
    ids = _random_ids(test_images, rng)
    labels = rng.permutation(np.arange(test_images) % len(classes))
    (folder / WNIDS_NAME).write_text("".join(f"{wnid}\n" for wnid in classes))
    _write_words(folder / "words.txt", classes)
    _write_train(folder / "train", classes, seed, train_per_class)
    _write_test(folder / "test", classes, seed, ids, labels)
    rows = [f"{ids[i]},0\n" for i in rng.permutation(test_images)]
    (folder / TEMPLATE_NAME).write_text("image_id,label\n" + "".join(rows))
    return folder


def sample_data(
    cache_dir: Path | None = None, seed: int = 0, train_per_class: int = 36, test_images: int = 500
) -> Path:
    """The folder `tiny-imagenet-100` of `generate_sample_data`, generated once and kept in the cache."""
    name = f"sample-data-seed{seed}-{train_per_class}-per-class-{test_images}-test"
    parent = build_folder_once(
        (cache_dir or cache_folder()) / name,
        lambda root: generate_sample_data(root, seed, train_per_class, test_images),
    )
    return parent / "tiny-imagenet-100"


# tiny-imagenet-100 from Tiny ImageNet-200

CLASSES = 100
ANSWERS_NAME = "answers.csv"


def _check_source(source: DatasetFiles, destination: Path) -> None:
    if source.label_order != WNIDS_NAME or len(source.class_ids) <= CLASSES or not source.validation_files:
        raise UserError(
            f"{source.root}: is not Tiny ImageNet-200 as published; expected wnids.txt with 200 lines, "
            "train/<wnid>/images/*.JPEG and val/images/*.JPEG with val/val_annotations.txt"
        )
    if destination.exists():
        raise UserError(f"{destination}: already exists; choose a new folder")


def _pair_files(source: DatasetFiles) -> Iterator[tuple[str, str]]:
    """(old, new) relative path of every image of the first 100 classes."""
    for file, label in zip(source.train_files, source.train_labels, strict=True):
        if label < CLASSES:
            yield file, file
    for file, label in zip(source.validation_files, source.validation_labels, strict=True):
        if label < CLASSES:
            yield file, f"test/images/{file_name(file)}"


def _copy_images(source: DatasetFiles, folder: Path) -> None:
    pairs = list(_pair_files(source))
    for place in {(folder / new).parent for _, new in pairs}:
        place.mkdir(parents=True, exist_ok=True)
    for old, new in track(pairs, len(pairs), "copying"):
        shutil.copyfile(f"{source.root}/{old}", f"{folder}/{new}")


def _write_tables(source: DatasetFiles, folder: Path) -> None:
    """Write wnids.txt, words.txt, the template, and answers.csv with the true labels of the template's ids."""
    (folder / WNIDS_NAME).write_text("".join(f"{wnid}\n" for wnid in source.class_ids[:CLASSES]))
    if (source.root / "words.txt").is_file():
        shutil.copyfile(source.root / "words.txt", folder / "words.txt")
    labeled = zip(source.validation_files, source.validation_labels, strict=True)
    answers = {image_id_of(file): label for file, label in labeled if label < CLASSES}
    # In an order that is unrelated to the labels, as in the competition's template.
    template = make_template(sorted(answers, key=lambda image_id: hashlib.sha256(image_id.encode()).digest()))
    (folder / TEMPLATE_NAME).write_bytes(render_submission(template, dict.fromkeys(answers, 0)))
    (folder / ANSWERS_NAME).write_bytes(render_submission(template, answers))


def make_100(source: DatasetFiles, destination: Path) -> Path:
    """Build tiny-imagenet-100 from Tiny ImageNet-200 at `destination`, atomically, and return `destination`.

    Its classes are the first 100 lines of wnids.txt. The published test images have no labels, so that their classes
    are unknown: the test images are the published validation images of the 100 classes instead. The template lists
    them with label 0, and answers.csv with their true labels, to score a submission. Raises `UserError`.
    """
    _check_source(source, destination)

    def write(folder: Path) -> None:
        _copy_images(source, folder)
        _write_tables(source, folder)

    try:
        write_folder_atomically(destination, write)
    except OSError as fault:
        raise UserError(f"{destination}: cannot be written ({fault.strerror or fault})") from None
    return destination
