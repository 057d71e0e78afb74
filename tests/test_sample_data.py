"""The generated data have the competition's layout and quirks, and classes that can be told apart."""

import csv
import hashlib
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transfer.data.tiny_imagenet import PATTERNS, SHAPES, _mask, draw_image, generate_sample_data, sample_classes

TRAIN_PER_CLASS, TEST_IMAGES = 3, 310


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return generate_sample_data(tmp_path_factory.mktemp("sample"), 0, TRAIN_PER_CLASS, TEST_IMAGES)


def _template(folder: Path) -> list[list[str]]:
    with (folder / "submission_sample.csv").open(newline="") as file:
        return list(csv.reader(file))


def _pixels(shape: str, pattern: str, seed) -> np.ndarray:
    image, _ = draw_image(shape, pattern, np.random.default_rng(seed))
    return np.asarray(image.convert("RGB"), float)  # (64, 64, 3) in 0..255


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_layout_is_the_competitions(folder):
    wnids = (folder / "wnids.txt").read_text().splitlines()
    expected = {"wnids.txt", "words.txt", "submission_sample.csv", "test/.DS_Store"}
    for wnid in wnids:
        expected.add(f"train/{wnid}/{wnid}_boxes.txt")
        expected |= {f"train/{wnid}/images/{wnid}_{k}.JPEG" for k in range(TRAIN_PER_CLASS)}
    expected |= {f"test/images/{row[0]}.JPEG" for row in _template(folder)[1:]}
    assert set(_digests(folder)) == expected


def test_the_wnids_are_invented_and_not_sorted(folder):
    wnids = (folder / "wnids.txt").read_text().splitlines()
    assert len(set(wnids)) == 100
    assert wnids != sorted(wnids)
    assert all(re.fullmatch(r"n9\d{7}", wnid) for wnid in wnids)


def test_words_name_every_class_once_and_more(folder):
    text = (folder / "words.txt").read_text()
    words = dict(line.split("\t") for line in text.splitlines())
    names = [words[wnid].split(", ")[0] for wnid in sample_classes()]
    assert len(set(names)) == 100
    assert "striped star" in names
    assert len(words) == len(text.splitlines()) > 100
    assert list(words) == sorted(words)
    assert not text.endswith("\n")


def test_the_template_lists_random_ids_in_another_order_with_label_0(folder):
    header, *rows = _template(folder)
    ids, labels = zip(*rows, strict=True)
    assert header == ["image_id", "label"]
    assert set(labels) == {"0"}
    assert len(set(ids)) == TEST_IMAGES
    assert list(ids) != sorted(ids)
    assert all(re.fullmatch(r"[0-9a-z]{16}", image_id) for image_id in ids)


def test_images_are_64_pixels_wide_and_a_few_are_greyscale(folder):
    modes = []
    for path in folder.rglob("*.JPEG"):
        with Image.open(path) as image:
            assert (image.format, image.size) == ("JPEG", (64, 64))
            modes.append(image.mode)
    assert set(modes) == {"RGB", "L"}
    assert 0.005 < modes.count("L") / len(modes) < 0.05


def test_a_few_test_images_repeat_training_images(folder):
    digests = _digests(folder)
    train = {digest for name, digest in digests.items() if name.startswith("train/")}
    test = [digest for name, digest in digests.items() if name.startswith("test/images/")]
    assert sum(digest in train for digest in test) == 2  # one in 150
    assert len(set(test)) == len(test)


def test_boxes_lie_inside_the_images(folder):
    for path in folder.glob("train/*/*_boxes.txt"):
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        assert [row[0] for row in rows] == [f"{path.parent.name}_{k}.JPEG" for k in range(TRAIN_PER_CLASS)]
        for x_min, y_min, x_max, y_max in (map(int, row[1:]) for row in rows):
            assert 0 <= x_min < x_max <= 63
            assert 0 <= y_min < y_max <= 63


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    first, second = (generate_sample_data(tmp_path / name, 7, 1, 5) for name in ("first", "second"))
    assert _digests(first) == _digests(second)


def test_another_seed_gives_other_pictures_of_the_same_classes(tmp_path):
    one, two = (_digests(generate_sample_data(tmp_path / str(seed), seed, 1, 5)) for seed in (1, 2))
    same = {name for name, digest in one.items() if two.get(name) == digest}
    assert same == {"wnids.txt", "words.txt", "test/.DS_Store"}


def test_a_folder_in_the_way_is_not_written_into(tmp_path):
    (tmp_path / "tiny-imagenet-100").mkdir()
    with pytest.raises(FileExistsError):
        generate_sample_data(tmp_path)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_images_of_one_class_differ_a_lot(pattern):
    images = [_pixels("star", pattern, [0, k]) for k in range(8)]
    differences = [np.abs(a - b).mean() for a, b in itertools.combinations(images, 2)]
    assert min(differences) > 15
    assert np.mean(differences) > 40


def test_the_mean_color_does_not_give_the_class_away():
    means = np.array(
        [[_pixels(shape, "plain", [i, k]).mean((0, 1)) for k in range(12)] for i, shape in enumerate(SHAPES)]
    )  # (10 shapes, 12 images, 3)
    assert means.mean(axis=1).std(axis=0).mean() < means.std(axis=1).mean()


def test_no_two_shapes_cover_the_same_pixels():
    place = np.array([[50.0, 0, 64], [0, 50.0, 64]])
    masks = {shape: np.asarray(_mask(shape, place)) > 0 for shape in SHAPES}
    for one, other in itertools.combinations(masks.values(), 2):
        assert (one & other).sum() / (one | other).sum() < 0.9
