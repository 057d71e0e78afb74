"""Datasets as people bring them, from the folder to the rows of the csv: the color of each image tells its class."""

import csv
import gzip
import io
import shutil
import unicodedata
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, WNIDS, write_data_set
from PIL import Image
from test_label_tables import write_table
from test_layouts import (
    PAINTS,
    make_hub_splits,
    paint,
    save,
    write_class_folders,
    write_few_shot,
    write_parquet,
    write_tiny_imagenet,
)

from data_loading import (
    describe_images,
    describe_layout,
    describe_warnings,
    draw_splits,
    find_data,
    load_dataset,
    main,
)
from transfer.config import RunArguments
from transfer.data.label_tables.columns import DataOptions
from transfer.data.layouts import LAYOUTS, find_layout
from transfer.data.splits import split_fold
from transfer.errors import UserError
from transfer.runs import RunContext
from transfer.submission import fill_submission
from transfer.submission.__main__ import main as check_csv

ANIMALS = ["bee", "lion", "wolf"]
SURE = 50.0  # a logit: its class's probability is 1


def write(root: Path, names=ANIMALS, train="train/{}", test="test/{}.jpg", per_class=6, tests=6) -> Path:
    """Class folders and unlabeled test images; the image of class k has the color k + 2."""
    for label, name in enumerate(names):
        for i in range(per_class):
            save(paint(label + 2, i), root / train.format(name) / f"{name}_{i}.jpg")
    for i in range(tests if test else 0):
        save(paint(i % len(names) + 2, 90 + i), root / test.format(i))
    return root


def template(root: Path, header: str, cells: str, ids="{}", rows=6, file="sample_submission.csv") -> Path:
    (root / file).write_text("\n".join([header, *(f"{ids.format(i)},{cells}" for i in range(rows))]) + "\n")
    return root


def color_of(path: Path) -> int:
    """The number of the color that an image shows, counted from 0."""
    mean = np.asarray(Image.open(path).convert("RGB")).mean((0, 1))
    return int(np.abs(np.array(PAINTS) - mean).sum(1).argmin()) - 2


def open_right(root: Path, names, **options):
    """The dataset, once every label of train, validation and labeled test images is that of its image's color."""
    data = find_data(RunArguments(data_dir=str(root), **options))
    known = [unicodedata.normalize("NFC", name) for name in names]
    dataset = load_dataset(data, 0.25)
    labeled = [(row["file"], row["label"]) for split in ("train", "validation") for row in dataset[split]]
    for file, label in [*labeled, *zip(data.test_files, data.test_labels, strict=False)]:
        assert data.class_ids[label] == known[color_of(data.root / file)], file
    return data


def rows_of(data, names) -> list[list[str]]:
    """The rows of the csv for predictions that are right."""
    known = [unicodedata.normalize("NFC", name) for name in names]
    labels = [data.class_ids.index(known[color_of(data.root / file)]) for file in data.test_files]
    content = fill_submission(data, data.test_ids, SURE * np.eye(len(names))[labels], 1.0).decode()
    return list(csv.reader(io.StringIO(content)))


def words_of(data, names) -> dict[str, str]:
    return dict(rows_of(data, names)[1:])


def expect(words, ids="{}", tests=6) -> dict[str, str]:
    return {ids.format(i): words[i % len(words)] for i in range(tests)}


# The csv is written in the template's vocabulary


NUMBERED = ["1", "2", "3"]


@pytest.mark.parametrize(
    ("names", "header", "cell", "words"),
    [
        (ANIMALS, "file,species", "bee", ANIMALS),
        (NUMBERED, "id,label", "1", NUMBERED),
        (NUMBERED, "id,label", "0", NUMBERED),
        (NUMBERED, None, None, NUMBERED),
        (["0", "1", "2"], "id,label", "0", ["0", "1", "2"]),
        (["3", "7", "20"], "id,label", "7", ["3", "7", "20"]),
        (
            ["bee, honey", "cafe\u0301", "grey wolf"],
            "id,label",
            '"bee, honey"',
            ["bee, honey", "caf\u00e9", "grey wolf"],
        ),
    ],
)
def test_labels_are_written_as_in_the_template(names, header, cell, words, tmp_path):
    root = write(tmp_path / "data", names)
    if header:
        template(root, header, cell)
    data = open_right(root, names)
    assert rows_of(data, names)[0] == (header or "image_id,label").split(",")
    assert words_of(data, names) == expect(words)


def test_wnids_are_written_where_the_template_has_them(tmp_path):
    names = ["n03", "n01", "n02"]
    root = write(tmp_path / "data", names, "train/{}/images", "test/images/test_{}.JPEG")
    (root / "wnids.txt").write_text("n03\nn01\nn02\n")
    data = open_right(template(root, "Id,Prediction", "n01", "test_{}.JPEG"), names)
    assert data.class_ids == names and words_of(data, names) == expect(names, "test_{}.JPEG")


def test_the_checker_judges_by_the_templates_words(tmp_path, capsys):
    root = template(write(tmp_path / "data"), "file,species", "bee")
    for word, is_right in (("lion", True), ("0", False)):
        template(tmp_path, "file,species", word, file="mine.csv")
        words = [str(tmp_path / "mine.csv"), "--template", str(root / "sample_submission.csv")]
        if is_right:
            check_csv(words)
            assert "ok: 6 rows" in capsys.readouterr().out
        else:
            with pytest.raises(SystemExit):
                check_csv(words)
            assert "'0'" in capsys.readouterr().err


def test_probabilities_are_joined_to_the_columns_of_the_header(tmp_path):
    root = template(write(tmp_path / "data"), "id,wolf,bee,lion", "0.33,0.33,0.33")
    rows = rows_of(open_right(root, ANIMALS), ANIMALS)
    assert rows[0] == ["id", "wolf", "bee", "lion"]
    wanted = {"0": [0, 1, 0], "1": [0, 0, 1], "2": [1, 0, 0]}
    for name, *cells in rows[1:4]:
        assert [float(cell) for cell in cells] == pytest.approx(wanted[name])


def test_one_column_of_fractions_has_the_probability_of_class_1(tmp_path):
    root = template(write(tmp_path / "data", ["0", "1"]), "id,label", "0.5")
    written = words_of(open_right(root, ["0", "1"]), ["0", "1"])
    assert {i: round(float(cell)) for i, cell in written.items()} == {str(i): i % 2 for i in range(6)}
    assert 0 < float(written["0"]) < 1e-9


# Where things lie


def test_labels_in_a_csv_give_the_rows_of_the_template(tmp_path):
    root = template(write_table(tmp_path / "data"), "image_id,label", "bee", "10{}.jpg", 3)
    data = open_right(root, ANIMALS)
    assert words_of(data, ANIMALS) == {f"10{i}.jpg": name for i, name in enumerate(ANIMALS)}


def test_a_template_beside_the_dataset_is_found(tmp_path):
    names = ["0", "1", "2"]
    root = write(tmp_path / "download" / "dataset", names)
    template(root.parent, "ID,Label", "0")
    for place in (root, root.parent):
        data = open_right(place, names)
        assert words_of(data, names) == expect(names) and data.template_path.parent.samefile(root.parent)
        assert "in the folder above" in "\n".join(describe_layout(data))


def zip_of(folder: Path, path: Path) -> Path:
    """A zip of a folder's content, as it is downloaded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def pack(path: Path, kind: str) -> None:
    """Replace a csv by a zip or gz that holds it."""
    packed = path.with_name(f"{path.name}.{kind}")
    if kind == "gz":
        packed.write_bytes(gzip.compress(path.read_bytes()))
    else:
        with zipfile.ZipFile(packed, "w") as archive:
            archive.write(path, path.name)
    path.unlink()


@pytest.mark.parametrize("wrapped", ["", "animals"])
def test_what_lies_beside_a_zip_is_found_or_named(wrapped, tmp_path):
    root = write(tmp_path / "unpacked" / wrapped)
    path = zip_of(tmp_path / "unpacked", tmp_path / "downloads" / "data.zip")
    template(path.parent, "id,species", "bee")
    template(path.parent, "id,species", "bee", "x{}", file="other_sample.csv")
    (path.parent / "train.csv.gz").write_bytes(b"")
    data = open_right(path, ANIMALS)
    assert words_of(data, ANIMALS) == expect(ANIMALS)
    said = "\n".join(describe_layout(data))
    assert f"sample_submission.csv in {path.parent.resolve()} lists exactly the 6 test images" in said
    assert "ignored     1 ../other_sample.csv (lists other images), 1 ../train.csv.gz" in said
    template(root, "id,species", "lion")
    inside = open_right(zip_of(tmp_path / "unpacked", path), ANIMALS)
    assert inside.template_path.parent == inside.root


def test_labels_beside_a_zip_are_read_with_labels_csv(tmp_path):
    root = write_table(tmp_path / "unpacked")
    labels = (root / "train.csv").rename(tmp_path / "train.csv")
    path = zip_of(root, tmp_path / "data.zip")
    with pytest.raises(UserError, match=r"csv beside the zip \(train\.csv\), add --labels_csv"):
        find_data(RunArguments(data_dir=str(path)))
    data = open_right(path, ANIMALS, labels_csv=str(labels))
    assert data.sources == [labels] and not data.ignored


@pytest.mark.parametrize("is_zip", [False, True])
@pytest.mark.parametrize("kind", ["zip", "gz"])
def test_a_packed_template_and_packed_labels_are_read(kind, is_zip, tmp_path):
    root = template(write_table(tmp_path / "data"), "image_id,label", "bee", "10{}.jpg", 3)
    for name in ("sample_submission.csv", "train.csv"):
        pack(root / name, kind)
    data = open_right(zip_of(root, tmp_path / "data.zip") if is_zip else root, ANIMALS)
    assert words_of(data, ANIMALS) == {f"10{i}.jpg": name for i, name in enumerate(ANIMALS)} and not data.ignored


def test_a_packed_csv_beside_the_csv_itself_is_not_a_second_one(tmp_path):
    root = template(write_table(tmp_path / "data"), "image_id,label", "bee", "10{}.jpg", 3)
    for name in ("sample_submission.csv", "train.csv"):
        content = (root / name).read_text()
        pack(root / name, "zip")
        (root / name).write_text(content)
    data = open_right(root, ANIMALS)
    assert data.template_path.name == "sample_submission.csv" and data.ignored == {"*.zip": 2}


@pytest.mark.parametrize("place", ["data", "."])
def test_a_csv_that_gives_the_labels_is_not_the_template(place, tmp_path):
    root = write_table(tmp_path / "data", file="sample_labels.csv")
    shutil.rmtree(root / "test_images")
    labels = (root / "sample_labels.csv").rename(tmp_path / place / "sample_labels.csv")
    data = open_right(root, ANIMALS, labels_csv=str(labels))
    assert data.template_path is None and data.test_files == []


@pytest.mark.parametrize(("encoding", "shown"), [("cp1251", "'ï÷åëà'"), ("cp1252", "'bï'"), ("utf-8", None)])
def test_text_without_a_known_encoding_is_shown(encoding, shown, tmp_path):
    bee = "bï" if encoding == "cp1252" else "пчела"
    names = [bee, *ANIMALS[1:]]
    root = template(write_table(tmp_path / "data", names), "image_id,label", bee, "10{}.jpg", 3)
    for name in ("train.csv", "sample_submission.csv"):
        (root / name).write_bytes((root / name).read_text(encoding="utf-8").encode(encoding))
    lines = describe_layout(find_data(RunArguments(data_dir=str(root))))
    ending = f"was read as Windows-1252: {shown}; if that looks wrong, save the file as UTF-8"
    wanted = [f"warning     {name} {ending}" for name in ("train.csv", "sample_submission.csv") if shown]
    assert [line for line in lines if line.startswith("warning")] == wanted


@pytest.mark.parametrize(
    ("test", "told"),
    [
        ("test_stg1/{}.jpg", "there is no test folder; rename test_stg1/ to test/"),
        ("to_predict/a/{}.jpg", "there is no test folder; rename to_predict/ to test/"),
        ("extra/x{}.jpg", "there is no test folder; add the images as test/"),
        ("test/{}.heic.txt", "test/ has no images; add them"),
    ],
)
def test_a_template_without_test_images_says_where_they_may_be(test, told, tmp_path):
    root = template(write(tmp_path / "data", test=None), "id,label", "bee")
    save(paint(2, 0), root / "notes" / "picture.jpg")
    for i in range(6):
        file = root / test.format(i)
        save(paint(2, i), file) if file.suffix == ".jpg" else (file.parent.mkdir(exist_ok=True), file.touch())
    with pytest.raises(UserError, match=rf"sample_submission\.csv: lists 6 test images, but {told}"):
        find_data(RunArguments(data_dir=str(root)))


def test_resampled_labels_are_labels(tmp_path):
    data = open_right(write_table(tmp_path / "data", file="train_resampled.csv"), ANIMALS)
    assert data.template_path is None and [path.name for path in data.sources] == ["train_resampled.csv"]


@pytest.mark.parametrize("test", ["test/unknown/{}.jpg", "Test/{}.jpg", "test/images/{}.jpg", "test_images/a/{}.jpg"])
def test_test_images_are_found_and_predicted(test, tmp_path):
    root = template(write(tmp_path / "data", test=test), "id,label", "lion")
    assert words_of(open_right(root, ANIMALS), ANIMALS) == expect(ANIMALS)


@pytest.mark.parametrize("is_listed", [True, False])
def test_labeled_test_images_are_a_split_of_their_own(is_listed, tmp_path):
    root = write(tmp_path / "data", test=None)
    for split in ("valid", "test"):
        for label, name in enumerate(ANIMALS):
            for i in range(2):
                save(paint(label + 2, 70 + i), root / split / name / f"{name}{i}.jpg")
    if is_listed:
        (root / "sample_submission.csv").write_text("id,label\nwolf0,bee\nlion1,bee\n")
    data = open_right(root, ANIMALS)
    assert (len(data.validation_files), len(data.test_labels)) == (6, 6)
    assert not set(data.test_files) & {
        file for files, _ in draw_splits(data, 0.25, 0, None, None).values() for file in files
    }
    words = words_of(data, ANIMALS)
    assert set(words) == {f"{name}{i}" for name in ANIMALS for i in range(2)}
    assert not is_listed or all(name[:-1] == word for name, word in words.items())


def test_three_levels_down_beside_what_systems_leave(tmp_path):
    root = template(write(tmp_path / "down" / "a" / "b" / "c"), "id,label", "bee")
    junk = ("__MACOSX/._1.jpg", "@eaDir/1.jpg", ".ipynb_checkpoints/1.jpg", "Thumbs.db", ".DS_Store")
    for folder in (tmp_path / "down", root, root / "train", root / "train" / "bee"):
        for name in junk:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"junk")
    data = open_right(tmp_path / "down", ANIMALS)
    assert data.root == root and words_of(data, ANIMALS) == expect(ANIMALS)
    assert set(data.ignored.values()) == {3} and len(data.ignored) == len(junk)


def test_class_folders_are_read_with_the_folders_in_them(tmp_path):
    root = write(tmp_path / "data", train="train/{}/2023")
    write(root, train="train/{}/2024/may", test=None, per_class=2)
    assert len(open_right(root, ANIMALS).train_files) == 24


def test_class_folders_may_lie_in_images(tmp_path):
    root = write(tmp_path / "data", train="train/images/{}", test="test/images/{}.jpg")
    save(paint(2, 0), root / "train" / "images" / "cover.jpg")
    data = open_right(template(root, "id,label", "wolf"), ANIMALS)
    assert words_of(data, ANIMALS) == expect(ANIMALS) and data.unused_images == {"train/images": 1}


@pytest.mark.parametrize("has_csv", [False, True])
def test_class_folders_without_train_may_have_val_and_test(has_csv, tmp_path):
    root = write(tmp_path / "data", train="{}")
    write(root, train="val/{}", test=None, per_class=2)
    if has_csv:  # it only repeats the names of the folders
        rows = [f"{name}_{i}.jpg,{name}" for name in ANIMALS for i in range(2, 6)]
        (root / "train.csv").write_text("\n".join(["image,label", *rows]))
    data = open_right(template(root, "id,label", "wolf"), ANIMALS)
    assert (len(data.train_files), len(data.validation_files)) == (18, 6)
    assert words_of(data, ANIMALS) == expect(ANIMALS) and data.ignored == ({"train.csv": 1} if has_csv else {})


def test_annotations_left_over_in_val_are_no_labels_of_class_folders_without_train(tmp_path):
    root = write(tmp_path / "data", train="{}")
    write(root, train="val/{}", test=None, per_class=2)
    (root / "val" / "val_annotations.txt").write_text("".join(f"{n}_0.jpg\t{n}\t0\t0\n" for n in ANIMALS))
    assert open_right(root, ANIMALS).ignored == {"val_annotations.txt": 1}


def test_an_image_that_is_neither_labeled_nor_in_the_template_is_refused(tmp_path):
    root = write_table(tmp_path / "data", folder="images")
    shutil.rmtree(root / "test_images")
    for i in range(3):
        save(paint(2 + i, 90), root / "images" / f"10{i}.jpg")
    template(root, "image_id,label", "bee", "10{}.jpg", 3)
    assert words_of(open_right(root, ANIMALS), ANIMALS) == {f"10{i}.jpg": name for i, name in enumerate(ANIMALS)}
    save(paint(2, 99), root / "cover.jpg")
    with pytest.raises(UserError, match=r"cover.jpg: has no label .* \(1 images have none\); add rows"):
        open_right(root, ANIMALS)


def test_a_list_of_test_images_is_not_a_table_of_labels(tmp_path):
    root = write_table(tmp_path / "data")
    for i in range(3):
        (root / "test_images" / f"10{i}.jpg").rename(root / "test_images" / f"00{i}.jpg")  # as in train_images
    (root / "test.csv").write_text("image_id,width\n000.jpg,32\n001.jpg,32\n002.jpg,32\n")
    data = open_right(root, ANIMALS)
    assert words_of(data, ANIMALS) == {"000": "0", "001": "1", "002": "2"} and data.ignored == {"test.csv": 1}


def test_labels_beside_the_folder_of_the_images(tmp_path):
    root = write_table(tmp_path / "up" / "data", folder=".")
    (root / "train.csv").rename(root.parent / "train.csv")
    for place in (root, root.parent):
        data = open_right(place, ANIMALS)
        assert data.root == root and len(data.test_files) == 3


def test_names_with_commas_in_a_csv_with_semicolons(tmp_path):
    names = ["bee, honey", "lion", "wolf"]
    root = write_table(tmp_path / "data", names=names, sep=";", header="")
    assert open_right(root, names).class_ids == names


def test_a_label_pattern_finds_the_dataset_in_an_unpacked_archive(tmp_path):
    root = tmp_path / "download" / "pets"
    for label, name in enumerate(ANIMALS):
        for i in range(4):
            save(paint(label + 2, i), root / "images" / f"{name}.{i}.jpg")
    save(paint(3, 90), root / "test" / "9.jpg")
    data = open_right(tmp_path / "download", ANIMALS, label_pattern=r"^(.+)\.[0-9]+\.jpg$")
    assert data.root == root and words_of(data, ANIMALS) == {"9": "1"}


# What is in the pictures


def test_images_of_a_group_are_never_on_both_sides_of_a_split(tmp_path):
    root = write_table(tmp_path / "data")
    lines = (root / "train.csv").read_text().splitlines()
    groups = ["patient", *(f"p{i // 3}" for i in range(18))]  # a group has an image of each class
    (root / "train.csv").write_text("\n".join(f"{line},{group}" for line, group in zip(lines, groups, strict=True)))
    data = open_right(root, ANIMALS, group_column="patient", label_column="label")
    for fold in (None, (1, 3), (2, 3), (3, 3)):
        sides = [
            {int(Path(file).stem) // 3 for file in files}
            for files, _ in draw_splits(data, 0.3, 0, None, fold).values()
        ]
        assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_groups_of_very_different_sizes_are_shared_among_the_folds_evenly(tmp_path):
    sizes = [30, 12, 11, 9, 8, *[1] * 50]
    groups = [f"p{number}" for number, size in enumerate(sizes) for _ in range(size)]
    files, labels = [f"{i}.jpg" for i in range(len(groups))], [i % 2 + (i % 8 == 0) for i in range(len(groups))]
    held_out = [split_fold(files, labels, fold, 4, 0, groups, has_groups=True)[1] for fold in (1, 2, 3, 4)]
    assert sorted(position for fold in held_out for position in fold) == list(range(120))
    assert max(map(len, held_out)) <= 32
    assert sum(len({groups[p] for p in fold}) for fold in held_out) == len(sizes)  # no group is in two folds
    for label in range(3):
        counts = [sum(labels[p] == label for p in fold) for fold in held_out]
        assert max(counts) - min(counts) <= 2, (label, counts)


def test_copies_stay_on_one_side_and_are_counted(tmp_path):
    root = write(tmp_path / "data", per_class=8)
    for file in list((root / "train").rglob("*.jpg")):
        for i in range(2):
            shutil.copy(file, file.with_name(f"copy{i}_{file.name}"))
    data, run = open_right(root, ANIMALS), RunArguments(data_dir=str(root), validation_fraction=0.25)
    dataset = load_dataset(data, 0.25)
    contents = [
        {(data.root / file).read_bytes() for file in dataset[split]["file"]} for split in ("train", "validation")
    ]
    assert not contents[0] & contents[1]
    assert "24 pictures occur more than once in train (72 images)" in "\n".join(describe_warnings(run, data, dataset))


def test_a_broken_test_image_is_named_and_has_a_row(tmp_path):
    names = ["0", "1", "2"]
    root = template(write(tmp_path / "data", names), "id,label", "0")
    data = open_right(root, names)
    assert words_of(data, names) == expect(names)
    broken = root / "test" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    said = "\n".join(describe_images(data))
    assert "1 test image cannot be read" in said and "test/3.jpg" in said


def test_jfif_files_are_read(tmp_path):
    root = write(tmp_path / "data")
    for i in range(4):
        save(paint(2, 50 + i), root / "train" / "bee" / f"x{i}.jfif")
    save(paint(3, 60), root / "test" / "y.jfif")
    data = open_right(root, ANIMALS)
    assert len(data.train_files) == 22 and words_of(data, ANIMALS) == expect(["0", "1", "2"]) | {"y": "1"}


def test_a_class_with_one_image_is_said_by_the_check(tmp_path, capsys):
    root = write(tmp_path / "data")
    save(paint(5, 0), root / "train" / "zebra" / "1.jpg")
    main([str(root)])
    said = capsys.readouterr().out
    assert "1 class has too few images to validate on" in said and "add images: zebra (1)" in said and "ok  " in said


def test_uneven_classes_are_said_with_what_helps(tmp_path):
    root = write(tmp_path / "data", per_class=3)
    for i in range(60):
        save(paint(2, 50 + i, (8, 8)), root / "train" / "bee" / f"more_{i}.jpg")
    run = RunArguments(data_dir=str(root))
    data = find_data(run)
    said = "\n".join(describe_warnings(run, data, load_dataset(data)))
    assert "class bee has" in said and "--class_weights balanced" in said


def test_three_small_classes_are_few_steps_and_few_held_out_images(tmp_path):
    run = RunArguments(data_dir=str(write(tmp_path / "data", per_class=40)))
    data = find_data(run)
    context = RunContext(run, {}, "", data, load_dataset(data))
    args = SimpleNamespace(
        do_train=True,
        max_steps=0,
        train_batch_size=64,
        world_size=1,
        num_train_epochs=3,
        gradient_accumulation_steps=1,
    )
    said = "\n".join(context.describe_shortage(args))
    assert "optimizer steps are few: use recipes/small_folder.yaml" in said and "12 validation images are few" in said


def test_images_that_are_not_used_are_a_warning(tmp_path):
    root = write(tmp_path / "data")
    for place in ("train/1.jpg", "extra/a/1.jpg", "extra/a/2.jpg", "cover.jpg"):
        save(paint(2, 0), root / place)
    (root.parent / "old_template.csv").write_text("id,label\nx,1\n")
    data = open_right(root, ANIMALS)
    assert data.unused_images == {"train": 1, "extra/a": 2, ".": 1}
    said = "\n".join(describe_layout(data))
    assert "warning     2 images in extra/a/ are not used" in said and "../old_template.csv (lists other" in said


# The table of layouts in docs/data.md


def write_flat(root: Path) -> Path:
    return write(write(root, train="{}"), train="val/{}", test=None, per_class=2)


def write_file_names(root: Path) -> Path:
    for label, name in enumerate(ANIMALS):
        for i in range(4):
            save(paint(label + 2, i), root / "pictures" / f"{name}.{i}.jpg")
    save(paint(3, 90), root / "test" / "9.jpg")
    return root


def write_hub(root: Path) -> Path:
    return write_parquet(root, make_hub_splits())


@dataclass(frozen=True)
class Example:
    """A dataset for one row of the table, and what is true of it."""

    build: Callable[[Path], Path]
    reader: str  # in `LAYOUTS`; empty for the Hub
    kind: str  # how the check calls the layout, at least its beginning
    class_ids: list[str]  # in label order
    published: int = 0  # validation images; none are held out then
    numbers: list[str] = field(default_factory=list)  # labels in the csv without class names in a template
    options: dict[str, str] = field(default_factory=dict)


EXAMPLES = {  # first cell of a row
    "the competition's": Example(write_data_set, "WnidFolders", "", WNIDS, 0, list("0123")),
    "Tiny ImageNet as published": Example(
        write_tiny_imagenet, "WnidFolders", "Tiny ImageNet as published", WNIDS, 12, list("0123")
    ),
    "numbered class folders": Example(
        lambda root: write_few_shot(write(root, ["11", "20"], test=None)),
        "ClassFolders",
        "numbered class folders",
        [*map(str, range(12)), "20"],
        0,
        [*map(str, range(12)), "20"],
    ),
    "class folders": Example(
        write_class_folders, "ClassFolders", "class folders", ["class 2", "class 9", "class 10"], 9, list("012")
    ),
    "class folders without train/": Example(
        write_flat, "FlatClassFolders", "class folders without train/", ANIMALS, 6, list("012")
    ),
    "labels in a csv": Example(write_table, "LabelTables", "labels in a csv", ANIMALS, 0, list("012")),
    "labels in file names": Example(
        write_file_names,
        "FileNames",
        "labels in file names",
        ANIMALS,
        0,
        list("012"),
        {"label_pattern": r"^(.+)\.[0-9]+\.jpg$"},
    ),
    "Hub dataset": Example(
        write_hub, "", "Hub dataset", ["red", "green", "blue"], 9, list("012"), {"label_column_name": "fine"}
    ),
}


def table_of_layouts() -> list[list[str]]:
    """The cells of each row of the first table in docs/data.md."""
    text = (ROOT / "docs" / "data.md").read_text().partition("\n| layout |")[2]
    lines = text.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.parametrize("cells", table_of_layouts(), ids=lambda cells: cells[0])
def test_every_layout_of_the_documentation_is_read_as_it_says(cells, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    example, is_hub = EXAMPLES[cells[0]], cells[0] == "Hub dataset"
    root = example.build(tmp_path / "data")
    options = example.options | {"dataset_name" if is_hub else "data_dir": str(root)}
    data = find_data(RunArguments(**options))
    if not is_hub:
        assert type(find_layout(root, DataOptions(**example.options))[1]).__name__ == example.reader
    assert data.kind.startswith(example.kind) and bool(data.kind) == bool(example.kind)
    assert data.class_ids == example.class_ids and len(data.validation_files) == example.published
    assert written(data) == {example.numbers[1]}
    rows = [f"{image_id},{example.class_ids[1]}" for image_id in data.test_ids]
    (tmp_path / "names.csv").write_text("\n".join(["id,label", *rows]))
    assert written(find_data(RunArguments(**options, template=str(tmp_path / "names.csv")))) == {example.class_ids[1]}


def written(data) -> set[str]:
    """The labels of a csv that says class number 1 everywhere."""
    scores = np.eye(len(data.class_ids))[[1] * len(data.test_ids)]
    content = fill_submission(data, data.test_ids, scores, 1.0).decode()
    return {row[1] for row in list(csv.reader(io.StringIO(content)))[1:]}


def test_every_reader_has_a_row():
    assert [cells[0] for cells in table_of_layouts()] == list(EXAMPLES)
    readers = {type(layout).__name__ for layout in LAYOUTS}
    assert readers == {example.reader for example in EXAMPLES.values()} - {""} | {"ChosenLabels"}  # as LabelTables
