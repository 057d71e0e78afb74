"""Class folders as people have them: other names and depths, more image formats, names in any Unicode form."""

import shutil
import unicodedata
from pathlib import Path

import pytest
from conftest import WNIDS
from PIL import Image
from test_layouts import QUICK, id2label, labels_of, paint, save, write_class_folders, write_tiny_imagenet

from data_loading import describe_layout, load_dataset, main, open_data
from transfer.data.listing import IMAGE_SUFFIXES, find_split_folder
from transfer.errors import UserError

ANIMALS = ["bee", "lion", "wolf"]


def write_animals(root: Path, train="train", test="test", per_class=6, suffix=".jpg") -> Path:
    """Class folders of three animals in `train`, which may be the root itself, and test images in `test`."""
    for label, name in enumerate(ANIMALS, start=2):
        for i in range(per_class):
            save(paint(label, i), root / train / name / f"{name}_{i}{suffix}")
        if test:
            save(paint(label, 90), root / test / f"{label}{suffix}")
    return root


def counts(place) -> tuple[int, int, int]:
    data = open_data(str(place))
    return len(data.train_files), len(data.validation_files), len(data.test_files)


# Names and places


@pytest.mark.parametrize("name", ["Train", "training", "train_images", "Training Set", "TRAIN-DATA", "train/train"])
def test_the_train_folder_may_have_any_usual_name(name, tmp_path):
    assert counts(write_animals(tmp_path / "things", train=name)) == (18, 0, 3)


@pytest.mark.parametrize("name", ["val", "Valid", "validation", "VAL_images"])
def test_the_validation_folder_may_have_any_usual_name(name, tmp_path):
    root = write_animals(tmp_path / "things")
    shutil.copytree(root / "train", root / name)
    assert counts(root) == (18, 18, 3)


@pytest.mark.parametrize(
    "name", ["Test", "testing", "test_images", "test/images", "Test/Images", "test/unknown", "test/test"]
)
def test_the_test_images_are_found_under_any_usual_name(name, tmp_path):
    data = open_data(str(write_animals(tmp_path / "things", test=name)))
    assert data.test_files == [f"{name}/{label}.jpg" for label in (2, 3, 4)] and data.test_ids == ["2", "3", "4"]
    assert not data.ignored


def test_two_folders_for_one_split_are_refused(tmp_path):
    root = write_animals(tmp_path / "things")
    (root / "train").rename(root / "training")
    write_animals(root, train="Train_images")
    with pytest.raises(UserError, match="Train_images and training could each be the train folder; merge them, or"):
        open_data(str(root))


@pytest.mark.parametrize("above", ["a", "a/b", "a/b/c"])
def test_the_root_is_found_up_to_three_levels_down(above, tmp_path):
    root = write_animals(tmp_path / "download" / above)
    (tmp_path / "download" / "__MACOSX" / "train" / "bee").mkdir(parents=True)
    assert open_data(str(tmp_path / "download")).root == root


def test_a_root_four_levels_down_is_refused(tmp_path):
    write_animals(tmp_path / "download" / "a/b/c/d")
    with pytest.raises(UserError, match="is not a dataset of a known layout"):
        open_data(str(tmp_path / "download"))


def test_a_class_called_train_is_not_another_dataset(tmp_path):
    root = write_animals(tmp_path / "download" / "vehicles")
    save(paint(1, 1), root / "train" / "train" / "1.jpg")
    assert open_data(str(tmp_path / "download")).class_ids == ["bee", "lion", "train", "wolf"]


JUNK = ["__MACOSX", "@eaDir", ".ipynb_checkpoints", "__pycache__", ".cache"]


@pytest.mark.parametrize("split", ["train", "val", "."])
def test_folders_and_files_of_systems_are_never_classes_or_images(split, tmp_path):
    root = write_animals(tmp_path / "things", test="test" if split != "." else None)
    shutil.copytree(root / "train", root / "val")
    if split == ".":
        shutil.rmtree(root / "val")
        for name in ANIMALS:
            (root / "train" / name).rename(root / name)
        (root / "train").rmdir()
    for name in JUNK:
        save(paint(0, 0), root / split / name / "bee.jpg")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "._bee_1.jpg"):
        (root / split / "bee" / name).write_bytes(b"\0")
    data = open_data(str(root))
    assert data.class_ids == ANIMALS and len(data.train_files) == 18
    assert data.ignored["Thumbs.db"] == data.ignored[".DS_Store"] == data.ignored["desktop.ini"] == 1


def test_validation_images_sorted_into_class_folders_need_no_annotations(tmp_path):
    root = write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    annotated = open_data(str(root))
    for file, label in zip(annotated.validation_files, annotated.validation_labels, strict=True):
        place = root / "val" / WNIDS[label] / "images" / Path(file).name
        place.parent.mkdir(parents=True, exist_ok=True)
        (root / file).rename(place)
    for leftover in (True, False):  # the empty val/images goes last
        data = open_data(str(root))
        assert len(data.validation_files) == 12 and data.ignored["val_annotations.txt"] == 1
        assert all(f"val/{WNIDS[k]}/" in f for f, k in zip(data.validation_files, data.validation_labels, strict=True))
        if leftover:
            (root / "val" / "images").rmdir()


# Class folders without train/


def test_folders_of_images_in_the_root_are_classes_and_validation_is_held_out(tmp_path, checkpoints, finetune):
    root = write_animals(tmp_path / "animals", train=".", test=None)
    (root / "README.md").write_text("three animals")
    (root / "notes").mkdir()
    data = open_data(str(root))
    assert data.class_ids == ANIMALS and data.test_files == []
    assert {name: len(split) for name, split in load_dataset(data).items()} == {"train": 15, "validation": 3}
    said = "\n".join(describe_layout(data))
    assert "layout      class folders without train/: <class>/*, labels from folder names" in said
    assert "no test images: there will be no submission" in said and "1 README.md" in said
    out = finetune(root, checkpoints("convnext"), **QUICK)
    assert id2label(out) == ANIMALS and not (out / "submission.csv").exists()


def test_a_test_folder_beside_class_folders_without_train_is_not_a_class(tmp_path):
    root = write_animals(tmp_path / "animals", train=".")
    data = open_data(str(root))
    assert data.class_ids == ANIMALS and data.test_files == ["test/2.jpg", "test/3.jpg", "test/4.jpg"]


@pytest.mark.parametrize("missing", ["one class", "images"])
def test_folders_of_images_that_may_be_something_else_are_refused(missing, tmp_path):
    root = write_animals(tmp_path / "animals", train=".", test=None)
    if missing == "one class":
        shutil.rmtree(root / "lion")
        shutil.rmtree(root / "wolf")
    if missing == "images":
        (root / "bee").rename(root / "images")
    with pytest.raises(UserError, match=r"folders? of images \(.*\), no train/: "):
        open_data(str(root))


# Image files


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".ppm", ".PNG", ".tga", ".jp2", ".avif"])
def test_every_picture_format_of_pillow_is_read(suffix, tmp_path):
    if Image.registered_extensions().get(suffix.lower()) not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {suffix}")
    root = write_animals(tmp_path / "things", per_class=2, suffix=suffix)
    dataset = load_dataset(open_data(str(root)), 0.5)
    assert {name: len(split) for name, split in dataset.items()} == {"train": 3, "validation": 3, "test": 3}
    assert dataset["train"][0]["image"].size == (32, 32)


def test_documents_films_and_icons_are_not_images():
    assert {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".jfif"} <= IMAGE_SUFFIXES
    assert not {".pdf", ".eps", ".ps", ".mpg", ".ico", ".h5", ".wmf", ".txt", ".csv"} & IMAGE_SUFFIXES


def test_jfif_files_run_from_end_to_end(tmp_path, checkpoints, finetune):
    root = write_animals(tmp_path / "things", suffix=".jfif")
    out = finetune(root, checkpoints("convnext"), num_train_epochs=12, **QUICK)
    assert labels_of(out / "submission.csv") == {"2": 0, "3": 1, "4": 2}


def test_images_whose_names_differ_only_in_their_ending_are_different_images(tmp_path):
    root = write_animals(tmp_path / "things")
    save(paint(2, 50), root / "train" / "bee" / "bee_0.png")
    save(paint(2, 51), root / "test" / "2.png")
    data = open_data(str(root))
    assert len(data.train_files) == 19 and data.test_ids == ["2.jpg", "2.png", "3.jpg", "4.jpg"]


# Class names


def test_a_class_name_with_a_comma_stays_whole_without_words_txt(tmp_path):
    root = write_animals(tmp_path / "things")
    (root / "train" / "bee").rename(root / "train" / "bee, honey")
    assert open_data(str(root)).class_names == ["bee, honey", "lion", "wolf"]


def test_names_that_differ_in_unicode_form_are_one_class(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = write_animals(tmp_path / "things")
    (root / "train" / "bee").rename(root / "train" / decomposed)
    save(paint(2, 70), root / "train" / composed / "more.jpg")
    save(paint(2, 71), root / "val" / composed / "1.jpg")
    data = open_data(str(root))
    assert data.class_ids == [composed, "lion", "wolf"]
    assert data.train_labels.count(0) == 7 and data.validation_labels == [0]
    (tmp_path / "order.txt").write_text(f"wolf\nlion\n{decomposed}\n")
    assert open_data(str(root), classes_file=str(tmp_path / "order.txt")).class_ids == ["wolf", "lion", composed]
    assert "<class>" in "\n".join(describe_layout(data)) and decomposed not in "\n".join(describe_layout(data))


def test_the_check_says_the_same_as_the_run(tmp_path, capsys):
    main([str(write_animals(tmp_path / "Download" / "Things", train="Train", test="Test/unknown"))])
    assert "layout      class folders: Train/<class>/*, Test/unknown/*, labels from folder" in capsys.readouterr().out


def test_the_competitions_folders_are_still_the_first_choice(tmp_path):
    root = write_class_folders(tmp_path / "things")
    assert [find_split_folder(root, split) for split in ("train", "val", "test")] == ["train", "val", "test"]
