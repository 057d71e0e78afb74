"""Datasets as known competitions and collections bring them: read as they are meant, or refused with the reason."""

from pathlib import Path

import pytest
from test_layouts import paint, save

from data_loading import describe_layout, open_data
from transfer.errors import UserError
from transfer.submission import form_of

NAMES = ["cat", "dog", "eel"]


def draw(root: Path, *files: str) -> None:
    for n, file in enumerate(files):
        save(paint(n % 11, n, size=(8, 8)), root / file)


def draw_classes(root: Path, pattern: str, names=NAMES, count=4) -> None:
    """Images of each class, with {c} for its name and {i} for a number."""
    draw(root, *(pattern.format(c=name, i=i) for name in names for i in range(count)))


def write(path: Path, header: str, rows) -> None:
    path.write_text("\n".join([header, *rows]) + "\n")


def warnings_of(data) -> list[str]:
    return [line for line in describe_layout(data) if line.startswith("warning")]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("asl_alphabet_train/asl_alphabet_train", "asl_alphabet_test/asl_alphabet_test"),
        ("Final_Training/Images", "Final_Test/Images"),
        ("images_train", "images_test"),
        ("train_image", "test_image"),
        ("train-jpg", "test-jpg"),
    ],
)
def test_folders_that_are_called_alike_are_those_of_the_splits(train, test, tmp_path):
    draw_classes(tmp_path, train + "/{c}/{c}{i}.png")
    draw(tmp_path, *(f"{test}/{i}.png" for i in range(5)))
    data = open_data(str(tmp_path))
    assert data.class_ids == NAMES and (len(data.train_files), len(data.test_files)) == (12, 5)


def test_folders_that_are_called_alike_are_no_splits_beside_one_of_a_usual_name(tmp_path):
    draw_classes(tmp_path, "train/{c}/{i}.png")
    draw_classes(tmp_path, "train_512/{c}/{i}.png")
    draw(tmp_path, "test_512/0.png")
    data = open_data(str(tmp_path))
    assert len(data.train_files) == 12 and not data.test_files and data.unused_images.total() == 13


@pytest.mark.parametrize("train", [["train_1", "train_2"], ["seg_train", "seg_training"]])
def test_several_train_folders_that_are_called_alike_are_refused(train, tmp_path):
    for folder in train:
        draw_classes(tmp_path, folder + "/{c}/{i}.png")
    draw(tmp_path, f"{train[0].replace('train', 'test')}/0.png")
    with pytest.raises(UserError, match=f"{' and '.join(train)} could each be the train folder"):
        open_data(str(tmp_path))


@pytest.mark.parametrize(
    "names",
    [["bullet_train", "car", "test_tube"], ["diesel_train", "steam_train"], ["test_negative", "test_positive"]],
)
def test_a_class_that_is_called_like_a_split_stays_a_class(names, tmp_path):
    draw_classes(tmp_path, "{c}/{i}.png", names)
    assert open_data(str(tmp_path)).class_ids == names


def test_folders_that_are_all_called_like_splits_are_no_classes(tmp_path):
    draw_classes(tmp_path, "{c}/{c}_{i}.png", ["train_1", "train_2", "train_3"])
    with pytest.raises(UserError, match="not a dataset of a known layout"):
        open_data(str(tmp_path))
    write(
        tmp_path / "labels.csv",
        "file,kind",
        (f"train_{k}_{i}.png,{NAMES[i % 3]}" for k in (1, 2, 3) for i in range(4)),
    )
    assert open_data(str(tmp_path)).class_ids == NAMES


def test_images_beside_the_dataset_are_said_to_be_unused(tmp_path):
    draw_classes(tmp_path, "plants/plants/train/{c}/{i}.png")
    draw(tmp_path, *(f"test/test/{i}.png" for i in range(5)))
    assert warnings_of(open_data(str(tmp_path)))[0].startswith("warning     5 images in ../../test/test/ are not used")
    assert not warnings_of(open_data(str(tmp_path / "plants" / "plants")))


def test_a_list_that_numbers_the_images_of_class_folders_has_no_labels(tmp_path):
    draw_classes(tmp_path, "images/{c}/{c}{i}.png")
    listed = [f"{c}/{c}{i}.png" for c in NAMES for i in range(4)]
    write(tmp_path / "images.txt", f"1 {listed[0]}", (f"{n} {file}" for n, file in enumerate(listed[1:], 2)))
    assert open_data(str(tmp_path)).class_ids == NAMES
    assert open_data(str(tmp_path / "images")).class_ids == NAMES


def test_a_list_of_the_splits_has_no_labels(tmp_path):
    draw_classes(tmp_path, "images/{c}/{c}{i}.png")
    rows = [f"{c}/{c}{i}.png,{'train' if i else 'test'}" for c in NAMES for i in range(4)]
    write(tmp_path / "splits.csv", "file,split", rows)
    assert open_data(str(tmp_path)).class_ids == NAMES


def test_notes_beside_the_splits_of_images_in_class_folders_are_no_labels(tmp_path):
    for split in ("train", "val"):
        draw_classes(tmp_path / "sorted", split + "/{c}/{c}{i}.png")
    listed = [(split, f"{split}/{c}/{c}{i}.png") for split in ("train", "val") for c in NAMES for i in range(4)]
    rows = [f"{file},{split},{['north', 'south'][n % 2]}" for n, (split, file) in enumerate(listed)]
    write(tmp_path / "sorted" / "metadata.csv", "file,split,site", rows)
    assert open_data(str(tmp_path / "sorted")).class_ids == NAMES
    draw_classes(tmp_path / "flat", "images/{c}/{c}{i}.png")
    rows = [f"{c}/{c}{i}.png,{['train', 'test'][i % 2]},{['north', 'south'][i // 2]}" for c in NAMES for i in range(4)]
    write(tmp_path / "flat" / "list.csv", "file,split,site", rows)
    with pytest.raises(UserError, match="none of file, split, site seems to be the label column"):
        open_data(str(tmp_path / "flat"))
    assert open_data(str(tmp_path / "flat"), label_column="site").class_ids == ["north", "south"]


def test_csv_files_of_the_splits_divide_the_images_of_class_folders(tmp_path):
    draw_classes(tmp_path, "{c}/{c}_{i}.png", ["eel", "cat", "dog"], count=8)
    number = {"eel": 1, "cat": 0, "dog": 2}
    for name, places in (("train", range(5)), ("validation", (5, 6)), ("test", [7])):
        rows = [f"{i},{c}/{c}_{i}.png,{number[c]},{c}" for c in number for i in places]
        write(tmp_path / f"{name}.csv", ",Filename,Label,ClassName", rows)
    data = open_data(str(tmp_path))
    assert data.class_ids == ["0", "1", "2"] and data.class_names == ["cat", "eel", "dog"]
    assert (len(data.train_files), len(data.validation_files), len(data.test_files)) == (15, 6, 3)
    assert data.test_labels == [0, 2, 1] and data.test_ids == ["cat_7", "dog_7", "eel_7"]
    for name in ("validation", "test"):
        (tmp_path / f"{name}.csv").unlink()
    write(tmp_path / "train.csv", "Filename,ClassName", [f"{c}/{c}_{i}.png,{c}" for c in number for i in range(8)])
    data = open_data(str(tmp_path))
    assert data.class_ids == NAMES and data.kind == "class folders without train/" and len(data.train_files) == 24


def test_test_images_beside_a_test_folder_of_other_files_are_those_that_the_template_lists(tmp_path):
    draw(tmp_path, *(f"jpeg/train/a{i}.jpg" for i in range(12)), *(f"jpeg/test/b{i}.jpg" for i in range(3)))
    for name in (*(f"train/a{i}.dcm" for i in range(12)), *(f"test/b{i}.dcm" for i in range(3))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("DICM")
    rows = [f"a{i},p{i % 5},{['ill', 'well'][i % 2]},{i % 2}" for i in range(12)]
    write(tmp_path / "train.csv", "image_name,patient_id,diagnosis,target", rows)
    write(tmp_path / "sample_submission.csv", "image_name,target", (f"b{i},0" for i in range(3)))
    data = open_data(str(tmp_path))
    assert data.class_names == ["ill", "well"] and data.test_ids == ["b0", "b1", "b2"] and len(data.train_files) == 12


def test_lists_in_txt_files_divide_the_images(tmp_path):
    draw_classes(tmp_path, "images/{c}{i}.png", count=6)
    for name, places in (("train", range(3)), ("val", [3, 4]), ("test", [5])):
        rows = [f"{c}{i}.png {k}" for k, c in enumerate(NAMES) for i in places]
        write(tmp_path / f"{name}.txt", rows[0], rows[1:])
    data = open_data(str(tmp_path))
    assert (len(data.train_files), len(data.validation_files), len(data.test_files)) == (9, 6, 3)
    assert data.validation_labels == [0, 0, 1, 1, 2, 2]
    (tmp_path / "test.txt").rename(tmp_path / "testing_notes.txt")
    write(tmp_path / "testing_notes.txt", "broken cat5.png", ["blurred dog5.png", "see also the web page"])
    with pytest.raises(UserError, match=r"cat5\.png: has no label"):
        open_data(str(tmp_path))


@pytest.mark.parametrize("place", ["", "Test/"])
def test_a_csv_of_test_images_may_have_their_labels(place, tmp_path):
    draw_classes(tmp_path, "Train/{c}/{i}.png", ["00000", "00001", "00010"])
    draw(tmp_path, *(f"Test/{i:05d}.png" for i in range(6)))
    rows = [f"{30 + i},5,{[10, 0, 1][i % 3]},Test/{i:05d}.png" for i in range(6)]
    write(tmp_path / f"{place}Test.csv", "Width,Roi,ClassId,Path", rows)
    data = open_data(str(tmp_path))
    assert data.test_labels == [2, 0, 1, 2, 0, 1] and not data.ignored
    assert "6 to predict and to measure the test accuracy on, after training (labels from Test.csv)" in "\n".join(
        describe_layout(data)
    )


@pytest.mark.parametrize(
    ("name", "header", "cells"),
    [
        ("test.csv", "Width,ClassId,Path", [0, 0, 0]),  # a mark, not labels
        ("test.csv", "Width,ClassId,Path", [0, 1, 1]),  # classes may be counted from 1 here
        ("test.csv", "Width,ClassId,Path", [0, 1, 7]),  # no class of train/
        ("test.csv", "Width,Size,Path", [0, 1, 10]),  # not called so
        ("test_predictions.csv", "Width,ClassId,Path", [0, 1, 10]),
    ],
)
def test_other_columns_of_a_csv_of_test_images_are_no_labels(name, header, cells, tmp_path):
    draw_classes(tmp_path, "train/{c}/{i}.png", ["0", "1", "10"])
    draw(tmp_path, *(f"test/{i:05d}.png" for i in range(6)))
    write(tmp_path / name, header, [f"{30 + i},{cells[i % 3]},test/{i:05d}.png" for i in range(6)])
    data = open_data(str(tmp_path))
    assert data.test_labels == [] and data.ignored == {name: 1} and len(data.test_files) == 6


def test_only_the_column_of_the_training_labels_labels_test_images(tmp_path):
    draw(tmp_path, *(f"train/a{i}.png" for i in range(12)), *(f"test/b{i}.png" for i in range(4)))
    rows = [f"a{i},{i % 2},{i // 4}" for i in range(12)]
    write(tmp_path / "train.csv", "image,class,grade", rows)
    write(tmp_path / "sample_submission.csv", "image,grade", (f"b{i},0" for i in range(4)))
    write(tmp_path / "test.csv", "image,class", (f"b{i},{i % 2}" for i in range(4)))
    assert open_data(str(tmp_path)).test_labels == []
    write(tmp_path / "test.csv", "image,class,grade", (f"b{i},{i % 2},{i % 3}" for i in range(4)))
    assert open_data(str(tmp_path)).test_labels == [0, 1, 2, 0]


def test_a_csv_of_another_dataset_in_the_folder_above_has_no_labels(tmp_path):
    draw_classes(tmp_path / "pets", "{c}/{i}.png", count=9)
    write(tmp_path / "labels.csv", "id,label", (f"{i},{i % 4}" for i in range(9)))
    assert open_data(str(tmp_path / "pets")).class_ids == NAMES


def test_held_out_class_folders_may_be_named_in_another_case(tmp_path):
    for split in ("train", "val", "test"):
        draw_classes(tmp_path, split + "/{c}/{i}.png", [n.title() if split == "test" else n.upper() for n in NAMES])
    data = open_data(str(tmp_path))
    assert data.class_ids == ["CAT", "DOG", "EEL"] and len(data.test_files) == 12
    assert data.validation_labels == data.test_labels == [0] * 4 + [1] * 4 + [2] * 4
    for split in ("train", "val"):
        draw_classes(tmp_path / "letters", split + "/{c}/{i}.png", ["A", "B", "a", "b"])
    (tmp_path / "capitals.txt").write_text("A\nB\n")
    data = open_data(str(tmp_path / "letters"), classes_file=str(tmp_path / "capitals.txt"))
    assert data.validation_files == [f"val/{c}/{i}.png" for c in "AB" for i in range(4)]


@pytest.mark.parametrize("place", ["train/{c}", "data/{c}"])
def test_a_csv_of_numbered_classes_beside_numbered_images_has_no_labels(place, tmp_path):
    for start, name in enumerate(NAMES):
        draw(tmp_path, *(f"{place.format(c=name)}/{6 * start + i + 1}.png" for i in range(6)))
    write(tmp_path / "classes.csv", "id,class,side", (f"{n},{name},224" for n, name in enumerate(NAMES, 1)))
    assert open_data(str(tmp_path)).class_ids == NAMES


def test_masks_are_no_images_to_train_on(tmp_path):
    draw_classes(tmp_path / "radiographs", "{c}/images/{c}{i}.png")
    draw_classes(tmp_path / "radiographs", "{c}/masks/{c}{i}.png")
    draw_classes(tmp_path / "scans", "{c}/{c} ({i}).png")
    draw_classes(tmp_path / "scans", "{c}/{c} ({i})_mask.png")
    draw(tmp_path / "scans", "cat/cat (0)_mask_1.png")
    for name, masks in (("radiographs", 12), ("scans", 13)):
        data = open_data(str(tmp_path / name))
        assert data.class_ids == NAMES and len(data.train_files) == 12
        assert data.unused_images.total() == masks and len(warnings_of(data)) == 3


def test_masks_that_a_csv_labels_are_images(tmp_path):
    draw(tmp_path, *(f"images/{i}{end}.png" for i in range(6) for end in ("", "_mask")))
    rows = [f"{i}{end}.png,{kind}" for i in range(6) for end, kind in (("", "bare"), ("_mask", "masked"))]
    write(tmp_path / "train.csv", "image,kind", rows)
    assert len(open_data(str(tmp_path)).train_files) == 12
    write(tmp_path / "train.csv", "image,kind", (f"{i}.png,{NAMES[i % 3]}" for i in range(6)))
    data = open_data(str(tmp_path))
    assert data.class_ids == NAMES and data.unused_images == {"images": 6}


def test_masks_beside_the_images_of_a_csv_are_not_classes(tmp_path):
    draw(tmp_path, *(f"train/{kind}/{i}.png" for kind in ("images", "masks") for i in range(12)))
    write(tmp_path / "train.csv", "id,label", (f"{i},{NAMES[i % 3]}" for i in range(12)))
    data = open_data(str(tmp_path))
    assert data.class_ids == NAMES and data.unused_images == {"train/masks": 12}


def test_people_with_and_without_masks_are_classes(tmp_path):
    draw_classes(tmp_path, "{c}/{i}.png", ["mask", "no_mask"])
    draw(tmp_path, "mask/0_mask.png", "no_mask/a_mask.png")
    assert open_data(str(tmp_path)).class_ids == ["mask", "no_mask"]
    assert len(open_data(str(tmp_path)).train_files) == 9  # 0_mask.png is called as the mask of 0.png


@pytest.mark.parametrize(
    ("line", "message"),
    [("7.png,dog,extra", "line 9 has 3 columns, but line 1 has 2"), (None, "two columns have the same name")],
)
@pytest.mark.parametrize("place", ["train_images/{i}.png", "images/{i}.png", "part{part}/{i}.png"])
def test_a_damaged_csv_of_labels_is_said_to_be_damaged(place, line, message, tmp_path):
    draw(tmp_path, *(place.format(i=i, part=i % 2) for i in range(12)))
    rows = [f"{i}.png,{NAMES[i % 3]}" for i in range(12)]
    if line:
        rows[7] = line
    write(tmp_path / "train.csv", "id,label" if line else "id,id", rows)
    with pytest.raises(UserError, match=f"train.csv: {message}"):
        open_data(str(tmp_path))


def test_a_damaged_csv_beside_class_folders_in_train_changes_nothing(tmp_path):
    draw_classes(tmp_path, "train/{c}/{c}{i}.png")
    write(tmp_path / "notes.csv", "file,note", [*(f"cat{i}.png,x" for i in range(4)), "dog1.png,x,y"])
    assert open_data(str(tmp_path)).class_ids == NAMES
    write(tmp_path / "train.csv", "file,label", (f"{c}{i}.png,{i % 2}" for c in NAMES for i in range(4)))
    with pytest.raises(UserError, match=r"train.csv: sorts the images into other classes"):
        open_data(str(tmp_path))


def test_a_damaged_csv_in_the_folder_above_changes_nothing(tmp_path):
    draw_classes(tmp_path / "pets", "{c}/{i}.png")
    write(tmp_path / "passengers.csv", "id,name,name", (f"{i},a,b" for i in range(4)))
    assert open_data(str(tmp_path / "pets")).class_ids == NAMES


def test_a_csv_that_labels_folders_is_not_passed_over(tmp_path):
    patients = [f"{n:05d}" for n in range(6)]
    draw_classes(tmp_path, "train/{c}/FLAIR/Image-{i}.png", patients)
    write(
        tmp_path / "train_labels.csv", "BraTS21ID,MGMT_value", (f"{name},{n % 2}" for n, name in enumerate(patients))
    )
    with pytest.raises(UserError, match=r"train_labels.csv: gives the class folders labels"):
        open_data(str(tmp_path))
    (tmp_path / "train_labels.csv").rename(tmp_path / "patients.csv")
    assert open_data(str(tmp_path)).class_ids == patients


def test_a_csv_of_images_whose_numbers_are_also_those_of_the_folders_is_none_of_folders(tmp_path):
    draw(tmp_path, *(f"train/{i % 4}/{i}.png" for i in range(40)))
    write(tmp_path / "train.csv", "id,label,fold", (f"{i},{i % 4},{i % 2}" for i in range(40)))
    assert open_data(str(tmp_path)).class_ids == ["0", "1", "2", "3"]
    draw(tmp_path, *(f"digits/train/{i % 4}/{i + 100}.png" for i in range(40)))
    assert open_data(str(tmp_path / "digits")).class_ids == ["0", "1", "2", "3"]


@pytest.mark.parametrize("name", ["submission_format.csv", "example_submission.csv", "submission-example.csv"])
def test_a_template_may_be_called_an_example_or_a_format(name, tmp_path):
    draw_classes(tmp_path, "train/{c}/{c}{i}.png")
    draw(tmp_path, "test/0.png", "test/1.png")
    write(tmp_path / name, "file,species", ["1.png,cat", "0.png,cat"])
    data = open_data(str(tmp_path))
    assert data.template_path == tmp_path / name and form_of(data).what == "class names"


def test_sample_labels_are_labels_unless_another_csv_has_them(tmp_path):
    draw(tmp_path, *(f"images/{i}.png" for i in range(16)))
    rows = [f"{i}.png,{NAMES[i % 3]}" for i in range(12)]
    write(tmp_path / "sample_labels.csv", "image,label", [*rows, *(f"{i}.png,cat" for i in range(12, 16))])
    assert len(open_data(str(tmp_path)).train_files) == 16
    write(tmp_path / "train.csv", "image,label", rows)
    write(tmp_path / "sample_labels.csv", "image,label", (f"{i}.png,cat" for i in range(12, 16)))
    data = open_data(str(tmp_path))
    assert (len(data.train_files), data.test_ids[0]) == (12, "12.png")
    assert data.template_path == tmp_path / "sample_labels.csv"


def test_a_template_with_numbers_that_no_folder_has_does_not_show_the_folders_numbers(tmp_path):
    draw_classes(tmp_path, "train/{c}/{c}_{i}.png", ["1", "2", "3"])
    draw(tmp_path, *(f"test/{i}.png" for i in range(4)))
    write(tmp_path / "sample_submission.csv", "id,label", ["0,0", "1,1", "2,2", "3,0"])
    with pytest.raises(UserError, match=r"do not show how the classes .* are written"):
        open_data(str(tmp_path))
    data = open_data(str(tmp_path), submission_labels="index")
    assert form_of(data).what.startswith("integers 0 to 2")
    write(tmp_path / "sample_submission.csv", "id,label", (f"{i},0" for i in range(4)))
    assert form_of(open_data(str(tmp_path))).what == "folder numbers"


def test_a_csv_of_test_images_tells_them_from_the_others_in_a_common_folder(tmp_path):
    draw(tmp_path, *(f"images/{i}.png" for i in range(16)))
    write(tmp_path / "train.csv", "image_names,kind", (f"{i}.png,{NAMES[i % 3]}" for i in range(12)))
    write(tmp_path / "test.csv", "image_names", (f"{i}.png" for i in range(12, 16)))
    data = open_data(str(tmp_path))
    assert data.test_ids == ["12", "13", "14", "15"] and len(data.train_files) == 12 and not data.ignored
    draw(tmp_path, "images/16.png")
    with pytest.raises(UserError, match=r"16.png: has no label in column kind of train.csv"):
        open_data(str(tmp_path))


def test_a_few_numbered_images_may_have_labels_in_a_csv(tmp_path):
    draw(tmp_path, *(f"images/{i}.png" for i in range(60)))
    write(tmp_path / "train.csv", "id,kind", (f"{i},{NAMES[i % 3]}" for i in range(9)))
    write(tmp_path / "sample_submission.csv", "id,kind", (f"{i},cat" for i in range(9, 60)))
    data = open_data(str(tmp_path))
    assert data.class_ids == NAMES and (len(data.train_files), len(data.test_files)) == (9, 51)


@pytest.mark.parametrize("cell", ["nan", "?", "-1", ""])
def test_a_template_may_mark_labels_as_unknown(cell, tmp_path):
    draw_classes(tmp_path, "train/{c}/{c}_{i}.png", ["1", "2", "3"])
    draw(tmp_path, "test/a.png", "test/b.png")
    write(tmp_path / "sample_submission.csv", "id,label", [f"a,{cell}", f"b,{cell}"])
    assert form_of(open_data(str(tmp_path))).what == "folder numbers"


def test_a_class_may_be_called_none(tmp_path):
    draw_classes(tmp_path, "train/{c}/{c}_{i}.png", ["Donut", "None"])
    draw(tmp_path, "test/a.png", "test/b.png")
    write(tmp_path / "sample_submission.csv", "id,label", ["a,None", "b,None"])
    assert form_of(open_data(str(tmp_path))).what == "class names"


def test_validation_images_of_one_for_each_class_keep_their_csv(tmp_path):
    for split, count in (("train", 12), ("val", 3)):
        draw(tmp_path, *(f"{split}/{split[0]}{i}.png" for i in range(count)))
        write(
            tmp_path / split / "metadata.csv", "file_name,label", (f"{split[0]}{i}.png,{i % 3}" for i in range(count))
        )
    assert open_data(str(tmp_path)).validation_labels == [0, 1, 2]


def test_a_folder_without_pictures_is_said_to_have_none(tmp_path):
    (tmp_path / "train").mkdir()
    for n in range(3):
        (tmp_path / "train" / f"{n}.dcm").write_bytes(b"DICM")
    write(tmp_path / "train.csv", "id,label", ["0,1", "1,0", "2,1"])
    with pytest.raises(UserError, match=r"train: holds no images, only \*\.dcm; convert them to JPEG or PNG"):
        open_data(str(tmp_path))
