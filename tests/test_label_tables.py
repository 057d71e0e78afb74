"""Labels that stand in a csv or in file names: found, read and ordered, or refused with what to change."""

import re
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_layouts import QUICK, id2label, labels_of, paint, save, write_class_folders

from data_loading import describe_layout, describe_warnings, draw_splits, load_dataset, main, open_data
from transfer.config import RunArguments
from transfer.data import listing
from transfer.data.splits import describe_imbalance
from transfer.errors import UserError
from transfer.submission import form_of

ANIMALS = ["bee", "lion", "wolf"]


def write_table(
    root: Path, names=ANIMALS, folder="train_images", file="train.csv", ids="{}.jpg", header="image_id,label", sep=","
) -> Path:
    """18 images in one folder, a csv with their labels, 3 test images and a template."""
    lines = [header] if header else []
    for i in range(18):
        save(paint(2 + i % 3, i), root / folder / f"{i:03d}.jpg")
        lines.append(f"{ids.format(f'{i:03d}')}{sep}{names[i % 3]}")
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text("\n".join(lines) + "\n")
    for i in range(3):
        save(paint(2 + i, 90 + i), root / "test_images" / f"{100 + i}.jpg")
    return root


def classes_of(data) -> dict[str, str]:
    return {Path(f).name: data.class_ids[k] for f, k in zip(data.train_files, data.train_labels, strict=True)}


def is_right(data, names=ANIMALS) -> bool:
    return classes_of(data) == {f"{i:03d}.jpg": names[i % 3] for i in range(18)}


def rewrite(root: Path, change, file="train.csv") -> None:
    (root / file).write_text(change((root / file).read_text()))


def test_labels_in_a_csv_run_from_end_to_end(tmp_path, checkpoints, finetune):
    root = write_table(tmp_path / "animals")
    (root / "sample_submission.csv").write_text("image_id,label\n102.jpg,bee\n100.jpg,bee\n101.jpg,bee\n")
    out = finetune(root, checkpoints("convnext"), num_train_epochs=12, **QUICK)
    assert id2label(out) == ANIMALS
    lines = (out / "submission.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["image_id", "102.jpg", "100.jpg", "101.jpg"]
    predicted = {line.split(",")[0]: line.split(",")[1] for line in lines[1:]}
    assert all(predicted[f"{100 + k}.jpg"] in (str(k), name) for k, name in enumerate(ANIMALS))


def test_blank_rows_as_spreadsheets_leave_them_are_not_rows(tmp_path):
    root = write_table(tmp_path / "animals")
    rewrite(root, lambda text: text + ",\n ,\n\n")
    (root / "sample_submission.csv").write_text("image_id,label\n102.jpg,bee\n100.jpg,bee\n101.jpg,bee\n,\n")
    data = open_data(str(root))
    assert is_right(data) and data.test_ids == ["100.jpg", "101.jpg", "102.jpg"]


def test_labels_in_file_names_run_from_end_to_end(tmp_path, checkpoints, finetune):
    for label, name in enumerate(("cat", "dog")):
        for i in range(9):
            save(paint(2 + label, i), tmp_path / "pets" / "train" / f"{name}.{i}.jpg")
        save(paint(2 + label, 90), tmp_path / "pets" / "test" / f"{label}.jpg")
    out = finetune(
        tmp_path / "pets", checkpoints("convnext"), num_train_epochs=12, label_pattern=r"^(\w+)\.\d+\.jpg$", **QUICK
    )
    assert id2label(out) == ["cat", "dog"] and labels_of(out / "submission.csv") == {"0": 0, "1": 1}


FORMS = {
    "train_labels.csv": {"file": "train_labels.csv"},
    "ids without ending": {"ids": "{}"},
    "paths": {"ids": "train_images/{}.jpg"},
    "paths from above": {"ids": "/home/me/animals/train_images/{}.jpg"},
    "Windows paths": {"ids": r"train_images\{}.jpg"},
    "semicolons": {"sep": ";", "header": "id;class"},
    "tabs": {"sep": "\t", "header": "id\tclass", "file": "labels.tsv"},
    "lines of a txt": {"sep": " ", "header": "", "file": "list.txt", "ids": "train_images/{}.jpg"},
    "no header": {"header": ""},
    "metadata.csv": {"folder": "train", "file": "train/metadata.csv", "header": "file_name,label"},
    "beside the root": {"folder": "set/train", "file": "train.csv"},
    "images/": {"folder": "images", "file": "labels.csv"},
    "two levels": {"folder": "data/train/part", "file": "data/train.csv"},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_table_is_recognised_in_every_usual_form(form, tmp_path):
    data = open_data(str(write_table(tmp_path / "animals", **FORMS[form])))
    assert is_right(data) and data.class_ids == ANIMALS and data.kind == "labels in a csv"
    assert load_dataset(data)["train"].features["label"].names == ANIMALS
    said = "\n".join(describe_layout(data))
    assert "labels from column " in said and f" of {Path(FORMS[form].get('file', 'train.csv')).name}" in said


def test_images_may_lie_in_several_folders(tmp_path):
    root = write_table(tmp_path / "animals")
    for i in range(0, 18, 2):
        (root / "part2").mkdir(exist_ok=True)
        (root / "train_images" / f"{i:03d}.jpg").rename(root / "part2" / f"{i:03d}.jpg")
    data = open_data(str(root))
    assert is_right(data) and {f.split("/")[0] for f in data.train_files} == {"part2", "train_images"}


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["3", "1", "2"], ["1", "2", "3"]),
        (["2.5", "10", "1"], ["1", "2.5", "10"]),
        (["class 10", "class 9", "b"], ["b", "class 9", "class 10"]),
        (["bee, honey", "lion", "wolf"], ["bee, honey", "lion", "wolf"]),
    ],
)
def test_labels_are_ordered_by_value_or_naturally(names, order, tmp_path):
    data = open_data(str(write_table(tmp_path / "animals", names=names, sep=";", header="id;label")))
    assert data.class_ids == data.class_names == order and is_right(data, names)


def test_a_number_that_also_names_an_image_is_a_label(tmp_path):
    data = open_data(str(write_table(tmp_path / "animals", names=["000", "001", "002"])))
    assert is_right(data, ["000", "001", "002"])


def test_names_and_labels_may_have_any_unicode_form(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = write_table(tmp_path / "animals", names=[decomposed, "lion", "wolf"])
    save(paint(2, 70), root / "train_images" / f"{decomposed}.jpg")
    rewrite(root, lambda text: f"{text}{composed}.jpg,{composed}\n")
    data = open_data(str(root))
    assert data.class_ids == [composed, "lion", "wolf"] and data.train_labels.count(0) == 7


def test_images_that_differ_in_their_ending_have_their_own_rows(tmp_path):
    root = write_table(tmp_path / "animals")
    save(paint(3, 70), root / "train_images" / "000.png")
    rewrite(root, lambda text: f"{text}000.png,lion\n")
    assert classes_of(open_data(str(root)))["000.png"] == "lion"
    rewrite(root, lambda text: text.replace(".jpg", ""))
    with pytest.raises(
        UserError, match=r"rows name several images; write the folder and the extension \(line 2, 000\)"
    ):
        open_data(str(root))


def test_validation_images_take_their_labels_from_the_same_or_their_own_csv(tmp_path):
    root = write_table(tmp_path / "animals", folder="train", file="train/metadata.csv", header="file_name,label")
    for i in range(3):
        save(paint(2 + i, 40 + i), root / "val" / f"{i:03d}.jpg")
    (root / "val" / "metadata.csv").write_text("file_name,label\n000.jpg,wolf\n001.jpg,wolf\n002.jpg,bee\n")
    own = open_data(str(root))
    assert is_right(own) and own.validation_labels == [2, 2, 0]
    lines = [f"train/{line}" for line in (root / "train" / "metadata.csv").read_text().splitlines()[1:]]
    lines += [f"val/{line}" for line in (root / "val" / "metadata.csv").read_text().splitlines()[1:]]
    for split in ("train", "val"):
        (root / split / "metadata.csv").unlink()
    (root / "labels.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    together = open_data(str(root))
    assert is_right(together) and together.validation_labels == [2, 2, 0]


@pytest.mark.parametrize("ids", ["{:04d}.JPG", "{:03d}.png", "{:d}", "{:.1f}", "Train_Images/{:03d}.Jpg", "{:d}.jpeg"])
def test_names_are_found_in_another_case_with_another_ending_or_without_zeros(ids, tmp_path):
    root = write_table(tmp_path / "animals")
    lines = [f"{ids.format(i)},{ANIMALS[i % 3]}" for i in range(18)]
    (root / "train.csv").write_text("\n".join(["id,label", *lines]) + "\n")
    assert is_right(open_data(str(root)))


def test_a_name_that_is_alike_never_takes_an_image_that_another_row_names(tmp_path):
    root = write_table(tmp_path / "animals")
    rewrite(root, lambda text: text.replace("003.jpg,bee", "003.JPG,bee"))
    assert is_right(open_data(str(root)))
    rewrite(root, lambda text: f"{text}0.jpg,bee\n")
    with pytest.raises(UserError, match=r"1 rows have no image \(line 20, 0.jpg\)"):
        open_data(str(root))


def test_a_column_of_numbers_is_not_taken_for_names_beside_the_one_of_names(tmp_path):
    root = write_table(tmp_path / "animals")
    write_columns(root, "row,id,label", "{n},{image},{three}")
    assert is_right(open_data(str(root)), ["0", "1", "2"])


@pytest.mark.parametrize("options", [{}, {"labels_csv": "train.csv"}, {"label_column": "label"}])
def test_a_csv_that_names_no_image_is_shown_beside_the_first_image(options, tmp_path):
    root = write_table(tmp_path / "animals", ids="id_{}")
    with pytest.raises(
        UserError,
        match=r"train.csv: no column names the images: the first one has 'id_000', .* is train_images/000.jpg",
    ):
        open_data(str(root), **options)


def test_notes_are_not_shown_as_a_csv_that_names_no_image(tmp_path):
    root = write_table(tmp_path / "animals")
    (root / "train.csv").rename(root / "README.txt")
    (root / "README.txt").write_text("These are animals.\nDo not feed them.\nThey may bite.\n")
    with pytest.raises(UserError, match=r"or --label_pattern$"):
        open_data(str(root))


def one_hot(i: int) -> str:
    return ",".join("01"[i % 3 == k] for k in range(3))


@pytest.mark.parametrize("ending", ["", ".0"])
def test_one_hot_labels_are_the_names_of_their_columns(ending, tmp_path):
    root = write_table(tmp_path / "plants")
    rows = [f"{i:03d},{one_hot(i).replace(',', ending + ',')}{ending}" for i in range(18)]
    (root / "train.csv").write_text("\n".join(["image_id,wolf,bee,lion", *rows]) + "\n")
    data = open_data(str(root))
    assert is_right(data, ["wolf", "bee", "lion"]) and data.class_ids == ANIMALS
    assert "columns wolf, bee, lion (one for each class) of train.csv" in "\n".join(describe_layout(data))
    assert open_data(str(root), label_column="bee").class_ids == ["0" + ending, "1" + ending]


def test_rows_of_several_classes_are_refused(tmp_path):
    root = write_table(tmp_path / "plants")
    rows = [f"{i:03d},{one_hot(i) if i else '1,1,0'}" for i in range(18)]
    (root / "train.csv").write_text("\n".join(["image_id,wolf,bee,lion", *rows]) + "\n")
    with pytest.raises(UserError, match=r"train.csv: line 2 has 1 in 2 of the columns wolf, bee, lion, but an image"):
        open_data(str(root))


def test_one_hot_labels_that_contradict_the_class_folders_are_refused(tmp_path):
    root = sort_into(write_table(tmp_path / "plants"), "pq")
    rows = [f"{i:03d},{one_hot(i)}" for i in range(18)]
    (root / "train.csv").write_text("\n".join(["image_id,wolf,bee,lion", *rows]) + "\n")
    with pytest.raises(UserError, match=r"train.csv: sorts the images into other classes than their folders do"):
        open_data(str(root))


@pytest.mark.parametrize("prefix", ["", "test_images/", "/home/me/animals/test_images/"])
def test_rows_of_test_images_are_ignored_and_counted(prefix, tmp_path):
    root = write_table(tmp_path / "animals", header="id,label")
    rewrite(root, lambda text: text + "".join(f"{prefix}{100 + i}.jpg,emu\n" for i in range(3)))
    add_column(root, "split", lambda i: "train" if i < 18 else "test")
    data = open_data(str(root))
    assert is_right(data) and data.class_ids == ANIMALS and len(data.test_files) == 3
    assert "column label of train.csv (3 rows of test images ignored)" in "\n".join(describe_layout(data))


def test_a_row_without_an_image_is_no_row_of_a_test_image_of_the_same_name(tmp_path):
    root = write_table(tmp_path / "animals")
    save(paint(2, 95), root / "test_images" / "003.jpg")
    rewrite(root, lambda text: f"{text}test_images/003.jpg,emu\n")
    assert is_right(open_data(str(root)))
    (root / "train_images" / "004.jpg").rename(root / "test_images" / "004.jpg")
    with pytest.raises(UserError, match=r"1 rows have no image \(line 6, 004.jpg\)"):
        open_data(str(root))


def test_a_class_that_only_validation_images_have_is_refused_or_left_out(tmp_path):
    root = write_table(tmp_path / "animals", folder="train")
    for i in range(3):
        save(paint(2 + i, 40 + i), root / "val" / f"v{i}.jpg")
    (root / "val.csv").write_text("image_id,label\nv0,bee\nv1,emu\nv2,wolf\n")
    with pytest.raises(UserError, match=r"class emu has no images to train on \(1 such classes in all\); add some"):
        open_data(str(root))
    (tmp_path / "three.txt").write_text("\n".join(ANIMALS))
    data = open_data(str(root), classes_file=str(tmp_path / "three.txt"))
    assert is_right(data) and data.validation_labels == [0, 2] and data.left_out == 1


def test_images_of_one_class_are_not_uneven():
    assert describe_imbalance(["bee", "wolf"], [0] * 12) == []


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["0", "1", "nan"], "'nan' is a missing value among numbers; give its images a number, or list the right"),
        (["0", "1", "NULL"], "'NULL' is a missing value among numbers"),
        (["1", "2", "1.0"], "'1' and '1.0' are the same number; write it in one way"),
        (["1.50", "2", "1.5"], "are the same number"),
        (["1", "01", "2"], None),
        (["1", "nan", "two"], None),
        (["1.0", "2.0", "2.5"], None),
    ],
)
def test_numeric_labels_that_are_missing_or_written_in_two_ways_are_refused(names, fault, tmp_path):
    root = write_table(tmp_path / "animals", names=names)
    if fault is None:
        assert is_right(open_data(str(root)), names)
        return
    with pytest.raises(UserError, match=re.escape(fault)):
        open_data(str(root))
    (tmp_path / "two.txt").write_text("\n".join(names[:2]))
    assert open_data(str(root), classes_file=str(tmp_path / "two.txt")).left_out == 1


def test_odd_names_of_classes_are_said(tmp_path):
    def say(root: Path) -> str:
        data = open_data(str(root))
        return "\n".join(describe_warnings(RunArguments(data_dir=str(root)), data, load_dataset(data)))

    said = say(write_table(tmp_path / "table", names=["Dog", "dog", "None"]))
    assert "classes Dog, dog differ in upper and lower case alone" in said
    assert "class None may be a missing value" in said
    for k, name in enumerate(["Cat", "cat", "none"] * 3):
        save(paint(2 + k % 3, k), tmp_path / "folders" / "train" / name / f"{k}.jpg")
    said = say(tmp_path / "folders")
    assert "classes Cat, cat differ" in said and "missing value" not in said


def test_a_row_never_takes_an_image_of_another_folder(tmp_path):
    root = write_table(tmp_path / "animals", ids="other/{}.jpg")
    with pytest.raises(UserError, match="train_images: found 0 class folders"):
        open_data(str(root))


def test_the_images_that_the_template_lists_are_the_test_images_of_a_common_folder(tmp_path):
    root = write_table(tmp_path / "plants", folder="images")
    for file in (root / "test_images").iterdir():
        file.rename(root / "images" / file.name)
    (root / "test_images").rmdir()
    with pytest.raises(UserError, match=r"100.jpg: has no label in column label of train.csv \(3 images have none\)"):
        open_data(str(root))
    (root / "sample_submission.csv").write_text("image_id,label\n100,bee\n102,bee\n101,bee\n")
    data = open_data(str(root))
    assert is_right(data) and data.test_ids == ["100", "101", "102"]


def test_a_classes_file_chooses_and_orders_the_labels(tmp_path):
    root = write_table(tmp_path / "animals")
    (tmp_path / "two.txt").write_text("wolf\nbee\n")
    data = open_data(str(root), classes_file=str(tmp_path / "two.txt"))
    assert data.class_ids == ["wolf", "bee"] and len(data.train_files) == 12 and data.test_files == []
    (tmp_path / "two.txt").write_text("wolf\nghost\n")
    with pytest.raises(UserError, match="no image has the class ghost"):
        open_data(str(root), classes_file=str(tmp_path / "two.txt"))


# Choices and refusals


def add_column(root: Path, name: str, value) -> None:
    lines = (root / "train.csv").read_text().splitlines()
    rows = [f"{line},{value(i)}" for i, line in enumerate(lines[1:])]
    (root / "train.csv").write_text("\n".join([f"{lines[0]},{name}", *rows]) + "\n")


@pytest.mark.parametrize("value", [lambda i: i / 7, lambda i: "", lambda i: "train", lambda i: f"{i:03d}"])
def test_a_column_that_cannot_be_the_label_is_passed_over(value, tmp_path):
    root = write_table(tmp_path / "animals")
    add_column(root, "extra", value)
    assert is_right(open_data(str(root)))


def test_the_label_column_is_chosen_where_several_fit(tmp_path, capsys):
    root = write_table(tmp_path / "animals", header="image_id,kind")
    add_column(root, "age", lambda i: i % 2)
    with pytest.raises(UserError, match="kind, age could each be the label column; choose it with --label_column"):
        open_data(str(root))
    assert open_data(str(root), label_column="age").class_ids == ["0", "1"]
    main([str(root), "--label_column", "kind"])
    assert "labels from column kind of train.csv" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--label_column breed: .*train.csv has no such column, only image_id, kind"):
        open_data(str(root), label_column="breed")


ONE_MEANT = [  # columns, those of the template, what is said
    ("image,dx:three,age:two,sex:four", None, "column dx of train.csv (not age, sex)"),
    ("image,variety:three,label:four", None, "column label of train.csv (not variety)"),
    ("image,diagnosis:three,kind:two,target:four", "image,target", "column target of train.csv (not diagnosis, kind)"),
    ("image,kind:three,Target:two", "image,target", "column Target of train.csv (not kind)"),
    ("patient:three,image,Kind:four,age:two", "patient,kind", "column Kind of train.csv (not patient, age)"),
    ("image,label:eleven,sex:two", None, "column label of train.csv (not sex)"),
    ("image,Id:eleven,view:two", "image,id", "column Id of train.csv (not view)"),
    ("image,label:two,male:half", None, "column label of train.csv (not male)"),
]
SEVERAL_MEANT = [
    ("image,species:three,age:four,individual_id:six", None),  # individuals divide the species
    ("image,species:three,class:two,age:four", None),
    ("image,species:three,class:two,age:four", "image,species,class"),
    ("image,kind:three,label_quality:two", None),
    ("image,emotion:three,labeler:two", None),
    ("image,dish:six,category:three", None),
    ("image,patient:three,kind:four", "patient,target"),
    ("image,class:two,name:words", None),  # names divide the classes, although they hardly repeat
]


def write_meant(root: Path, header: str, template: str | None) -> dict[str, str]:
    """A csv of these columns, and a template; returns what the columns hold."""
    kinds = dict(part.split(":") for part in header.split(",") if ":" in part)
    write_columns(
        root, re.sub(":[a-z]+", "", header), re.sub("[^,:]+:([a-z]+)|image", "{\\1}", header).replace("{}", "{image}")
    )
    if template:
        rows = "".join(f"{100 + i},0" + ",0" * (template.count(",") - 1) + "\n" for i in range(3))
        (root / "sample_submission.csv").write_text(f"{template}\n{rows}")
    return kinds


@pytest.mark.parametrize(("header", "template", "said"), ONE_MEANT)
@pytest.mark.parametrize("place", [".", ".."])
def test_the_template_or_the_names_of_columns_show_which_one_is_the_label(header, template, said, place, tmp_path):
    root = write_table(tmp_path / "animals")
    kinds = write_meant(root, header, template)
    if template:
        (root / "sample_submission.csv").rename(root / place / "sample_submission.csv")
    data = open_data(str(root))
    count = {"two": 2, "three": 3, "four": 4, "eleven": 11}[kinds[said.split()[1]]]
    assert classes_of(data) == {f"{i:03d}.jpg": str(i % count) for i in range(18)}
    assert f"labels from {said}" in "\n".join(describe_layout(data))


@pytest.mark.parametrize(("header", "template"), SEVERAL_MEANT)
def test_a_csv_of_which_several_columns_may_be_meant_is_refused(header, template, tmp_path):
    root = write_table(tmp_path / "animals")
    kinds = write_meant(root, header, template)
    with pytest.raises(UserError, match=f"{', '.join(kinds)} could each be the label column; choose it with"):
        open_data(str(root))


@pytest.mark.parametrize(
    ("label", "cells"), [("0", ["0", "1", "2"]), ("bee", ["wolf", "bee", "lion"]), (None, ["0", "1", "2"])]
)
def test_numbers_beside_the_names_of_the_classes_are_the_labels(label, cells, tmp_path):
    root = write_table(tmp_path / "animals", names=["wolf", "bee", "lion"], header="image_id,name")
    add_column(root, "number", lambda i: i % 3)
    if label:
        rows = "".join(f"{100 + i}.jpg,{label}\n" for i in range(3))
        (root / "sample_submission.csv").write_text(f"image_id,prediction\n{rows}")
    data = open_data(str(root))
    assert data.class_ids == ["0", "1", "2"] and data.class_names == ["wolf", "bee", "lion"]
    assert form_of(data).render(np.eye(3), 1.0) == [[cell] for cell in cells]
    if label != "bee":  # with two columns of names, the classes are called by their numbers
        add_column(root, "latin", lambda i: ["lupus", "apis", "leo"][i % 3])
        assert open_data(str(root)).class_names == ["0", "1", "2"]


def split_of_row(i: int) -> str:
    return "train" if i < 9 else "valid" if i < 12 else "Test"


def test_a_column_of_splits_is_kept_to(tmp_path):
    root = write_table(tmp_path / "animals")
    shutil.rmtree(root / "test_images")
    add_column(root, "set", split_of_row)
    data = open_data(str(root))
    assert sorted(classes_of(data)) == [f"{i:03d}.jpg" for i in range(9)]
    assert [Path(file).name for file in data.validation_files] == ["009.jpg", "010.jpg", "011.jpg"]
    assert [Path(file).name for file in data.test_files] == [f"{i:03d}.jpg" for i in range(12, 18)]
    assert data.validation_labels == [0, 1, 2] and data.test_labels == [0, 1, 2, 0, 1, 2]
    assert "column label of train.csv (split by column set)" in "\n".join(describe_layout(data))


def test_rows_for_testing_may_have_no_label(tmp_path):
    root = write_table(tmp_path / "animals")
    rewrite(root, lambda text: re.sub("(01[2-7].jpg),.*", r"\1,", text))
    add_column(root, "set", split_of_row)
    with pytest.raises(UserError, match=r"rows for testing, and test images without a row \(test_images/100.jpg\)"):
        open_data(str(root))
    shutil.rmtree(root / "test_images")
    data = open_data(str(root))
    assert len(data.test_files) == 6 and data.test_labels == [] and len(data.train_files) == 9
    rewrite(root, lambda text: f"{text}000.jpg,bee,valid\n")
    with pytest.raises(UserError, match=r"1 rows give an image a second split \(line 20, 000.jpg\)"):
        open_data(str(root))


def test_rows_for_testing_without_labels_tell_nothing_about_the_columns(tmp_path):
    root = write_table(tmp_path / "animals", names=["wolf", "bee", "lion"], header="image_id,name")
    shutil.rmtree(root / "test_images")
    add_column(root, "number", lambda i: i % 3)
    rewrite(root, lambda text: re.sub("(01[2-7].jpg),.*", r"\1,,", text))
    add_column(root, "set", split_of_row)
    data = open_data(str(root))
    assert data.class_ids == ["0", "1", "2"] and data.class_names == ["wolf", "bee", "lion"]
    rows = [f"{i:03d},{one_hot(i) if i < 12 else '0,0,0'},{split_of_row(i)}" for i in range(18)]
    (root / "train.csv").write_text("\n".join(["image_id,wolf,bee,lion,split", *rows]) + "\n")
    data = open_data(str(root))
    assert data.class_ids == ANIMALS and data.test_labels == [] and len(data.test_files) == 6


def test_the_columns_of_the_template_are_the_one_hot_labels(tmp_path):
    root = write_table(tmp_path / "plants")
    rows = [f"{i:03d},p{i % 4},{i % 2},{one_hot(i)}" for i in range(18)]
    (root / "train.csv").write_text("\n".join(["image,patient,sex,wolf,bee,lion", *rows]) + "\n")
    rows = [f"{100 + i},0.3,0.3,0.4" for i in range(3)]
    (root / "sample_submission.csv").write_text("\n".join(["image,wolf,bee,lion", *rows]) + "\n")
    assert is_right(open_data(str(root)), ["wolf", "bee", "lion"])


@pytest.mark.parametrize("mark", ["?", "-1", "unknown", "bee"])
def test_a_mark_in_all_rows_for_testing_is_no_label(mark, tmp_path):
    root = write_table(tmp_path / "animals")
    shutil.rmtree(root / "test_images")
    rewrite(root, lambda text: re.sub("(01[2-7].jpg),.*", rf"\1,{mark}", text))
    add_column(root, "set", split_of_row)
    data = open_data(str(root))
    assert data.class_ids == ANIMALS and data.test_labels == [] and len(data.test_files) == 6


@pytest.mark.parametrize(
    ("name", "cells", "held_out"),
    [
        ("is_valid", ["False", "True"], "validation"),
        ("Usage", ["Training", "PrivateTest"], "test"),
        ("phase", ["train", "eval"], "validation"),
        ("split", ["train", "holdout"], "test"),
        ("fold", ["0", "1"], None),
        ("usage", ["Casual", "Sports"], None),
    ],
)
def test_other_ways_to_tell_the_splits(name, cells, held_out, tmp_path):
    root = write_table(tmp_path / "animals")
    shutil.rmtree(root / "test_images")
    add_column(root, name, lambda i: cells[i >= 12])
    data = open_data(str(root))
    assert len(data.train_files) == (12 if held_out else 18)
    assert len(data.validation_files) == 6 * (held_out == "validation")
    assert data.test_labels == [0, 1, 2, 0, 1, 2] * (held_out == "test")


@pytest.mark.parametrize(
    ("name", "cells", "message"),
    [
        ("split", ["train", "val", "rest"], "column split seems to tell which images .* but has 'rest' in it"),
        (
            "part",
            ["train", "val", ""],
            "column part seems to tell which images are to validate or to test, but has ''",
        ),
        ("is_train", ["1", "0", "1"], "column is_train seems to tell .* but has '1' in it"),
        ("valid", ["1", "0", "1"], "column valid seems to tell .* but has '1' in it"),  # or was each row checked?
        ("split", ["val", "test", "test"], "column split seems to tell .* but has no train in it"),
    ],
)
def test_a_column_that_may_tell_the_splits_is_not_passed_over(name, cells, message, tmp_path):
    root = write_table(tmp_path / "animals")
    add_column(root, name, lambda i: cells[i % 3])
    for options in ({}, {"label_column": "label"}):
        with pytest.raises(UserError, match=message):
            open_data(str(root), **options)


def test_a_class_may_be_called_like_a_split(tmp_path):
    names = ["train", "bus", "test"]
    root = write_table(tmp_path / "vehicles", names=names)
    assert is_right(open_data(str(root)), names)
    add_column(root, "wheels", lambda i: i % 4)
    assert is_right(open_data(str(root)), names)


def test_a_second_csv_is_read_as_the_first(tmp_path):
    root = write_table(tmp_path / "animals", folder="images")
    shutil.rmtree(root / "test_images")
    write_columns(root, "image,label,grade", "{image},{six},{two}")
    lines = (root / "train.csv").read_text().splitlines()
    (root / "train.csv").write_text("\n".join(lines[:13]))
    (root / "dev.csv").write_text("\n".join([lines[0], *lines[13:]]))  # each label once
    data = open_data(str(root))
    assert data.validation_labels == list(range(6)) and len(data.train_files) == 12
    add_column(root, "patient", lambda i: f"p{i % 4}")
    assert len(set(open_data(str(root), group_column="patient").train_groups)) == 4
    (root / "dev.csv").write_text("\n".join(["image,label_note,grade", *lines[13:]]))
    with pytest.raises(UserError, match=r"dev.csv: none of image, label_note, grade seems to be the label column"):
        open_data(str(root))
    (root / "dev.csv").rename(root / "val_score.csv")
    with pytest.raises(UserError, match=r"train.csv and val_score.csv could each hold the labels"):
        open_data(str(root))


def test_the_csv_files_of_both_splits_may_name_images_of_one_folder(tmp_path):
    root = write_table(tmp_path / "animals", folder="images")
    lines = (root / "train.csv").read_text().splitlines()
    (root / "train.csv").write_text("\n".join(lines[:13]))
    (root / "validation.csv").write_text("\n".join([lines[0], *lines[13:]]))
    data = open_data(str(root))
    assert len(data.train_files) == 12 and len(data.test_files) == 3
    assert [Path(file).name for file in data.validation_files] == [f"{i:03d}.jpg" for i in range(12, 18)]
    assert data.validation_labels == [0, 1, 2, 0, 1, 2]
    (root / "train.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"train.csv and validation.csv could each hold the labels"):
        open_data(str(root))


def test_the_image_column_is_chosen_where_several_fit(tmp_path):
    root = write_table(tmp_path / "animals")
    add_column(root, "twin", lambda i: f"{(i + 3) % 18:03d}.jpg")
    with pytest.raises(UserError, match="image_id, twin could each be the image column; choose it with --image_col"):
        open_data(str(root))
    assert is_right(open_data(str(root), image_column="twin"))


def test_the_csv_is_chosen_where_several_fit(tmp_path):
    root = write_table(tmp_path / "animals")
    shutil.copy(root / "train.csv", root / "train_old.csv")
    with pytest.raises(
        UserError, match=r"train.csv and train_old.csv could each hold the labels; choose one with --la"
    ):
        open_data(str(root))
    for name in ("train.csv", str(root / "train_old.csv")):
        assert is_right(open_data(str(root), labels_csv=name))
    with pytest.raises(UserError, match=r"ghost.csv: cannot be read"):
        open_data(str(root), labels_csv="ghost.csv")


def test_a_csv_that_contradicts_the_class_folders_is_used_only_if_it_is_named(tmp_path):
    root = write_table(tmp_path / "animals")
    (root / "train_images" / "a").mkdir()
    (root / "train_images" / "b").mkdir()
    for i in range(18):
        (root / "train_images" / f"{i:03d}.jpg").rename(root / "train_images" / "ab"[i // 9] / f"{i:03d}.jpg")
    with pytest.raises(
        UserError, match=r"train.csv: sorts the images into other classes than their folders do; use it"
    ):
        open_data(str(root))
    assert is_right(open_data(str(root), labels_csv=str(root / "train.csv")))


def sort_into(root: Path, folders: str) -> Path:
    """The images of `write_table`, moved into folders of the training folder, in turn."""
    for i in range(18):
        file = root / "train_images" / f"{i:03d}.jpg"
        (file.parent / folders[i % len(folders)]).mkdir(exist_ok=True)
        file.rename(file.parent / folders[i % len(folders)] / file.name)
    return root


def write_columns(root: Path, header: str, cells: str, more="") -> None:
    rows = [
        cells.format(
            image=f"{i:03d}.jpg",
            n=i,
            two=i % 2,
            three=i % 3,
            four=i % 4,
            six=i % 6,
            eleven=i % 11,
            half=i // 9,
            words=chr(97 + i % 12),
        )
        for i in range(18)
    ]
    (root / "train.csv").write_text("\n".join([header, *rows]) + f"\n{more}")


@pytest.mark.parametrize(
    ("header", "cells", "more"),
    [
        ("image,beast", "{image},{three}", "ghost.jpg,0\n"),
        ("image,diagnosis,age", "{image},{three},{four}", ""),
        ("image,patient,diagnosis", "{image},p{two},{three}", ""),
        ("image,patient,beast", "{image},p{two},{three}", ""),
    ],
)
def test_folders_of_patients_are_not_the_classes_beside_a_csv_of_several_columns(header, cells, more, tmp_path):
    root = sort_into(write_table(tmp_path / "animals"), "pq")
    (root / "sample_submission.csv").write_text("image,beast\n100,0\n101,0\n102,0\n")
    write_columns(root, header, cells, more)
    with pytest.raises(UserError, match=r"train.csv: sorts the images into other classes than their folders do"):
        open_data(str(root))


@pytest.mark.parametrize(
    ("header", "cells"),
    [
        ("subject,classname,img", "s{two},c{three},{image}"),
        ("img,width,height,split", "{image},{two},{four},{two}"),
        ("img,url", "{image},http://{image}"),
        ("img,x,y", "{image},{two},{four}"),
    ],
)
def test_a_csv_that_describes_the_images_of_class_folders_leaves_them_alone(header, cells, tmp_path):
    root = sort_into(write_table(tmp_path / "drivers"), "abc")
    write_columns(root, header, cells)
    data = open_data(str(root))
    assert data.class_ids == ["a", "b", "c"] and data.ignored == {"train.csv": 1}


def test_folders_in_the_root_are_parts_of_the_images_where_a_csv_has_the_labels(tmp_path):
    root = write_table(tmp_path / "animals", folder="part1")
    shutil.rmtree(root / "test_images")
    (root / "part2").mkdir()
    for i in range(9):
        (root / "part1" / f"{i:03d}.jpg").rename(root / "part2" / f"{i:03d}.jpg")
    assert is_right(open_data(str(root)))
    (root / "train.csv").unlink()
    assert open_data(str(root)).class_ids == ["part1", "part2"]


def test_a_label_pattern_labels_images_of_train_alone_where_there_is_a_train_folder(tmp_path):
    for i in range(6):
        save(paint(2 + i % 2, i), tmp_path / "pets" / "train" / "train" / f"{['cat', 'dog'][i % 2]}.{i}.jpg")
        save(paint(2, 20 + i), tmp_path / "pets" / "test1" / f"{i}.jpg")
        save(paint(2, 40 + i), tmp_path / "pets" / "more" / f"{i}.jpg")
    data = open_data(str(tmp_path / "pets"), label_pattern=r"^(\w+)\.")
    assert data.class_ids == ["cat", "dog"] and len(data.train_files) == 6 and len(data.test_files) == 6
    assert data.unused_images == {"more": 6}


def test_a_csv_that_agrees_with_the_class_folders_changes_nothing(tmp_path):
    root = write_class_folders(tmp_path / "things")
    before = open_data(str(root))
    rows = [f"{file},{before.class_ids[k]}" for file, k in zip(before.train_files, before.train_labels, strict=True)]
    (root / "train.csv").write_text("path,class\n" + "\n".join(rows) + "\n")
    after = open_data(str(root))
    assert after.ignored == {"train.csv": 1} and replace(after, ignored=before.ignored) == before


FAULTS = [
    (lambda text: f"{text}ghost.jpg,bee\nspook.jpg,bee\n", "2 rows have no image (line 20, ghost.jpg)"),
    (lambda text: f"{text}000.jpg,wolf\n", "1 rows give an image a second label (line 20, 000.jpg)"),
    (lambda text: text.replace("003.jpg,bee", "003.jpg,"), "1 rows have no label (line 5, 003.jpg)"),
    (lambda text: text.replace("003.jpg,bee\n", ""), "003.jpg: has no label in column label of train.csv (1 images"),
    (lambda text: re.sub("lion|wolf", "bee", text), "labels from column label of train.csv: fewer than two classes"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[message[:30] for _, message in FAULTS])
def test_a_faulty_table_is_refused_with_its_first_fault_and_their_number(change, message, tmp_path, capsys):
    root = write_table(tmp_path / "animals")
    rewrite(root, change)
    with pytest.raises(SystemExit) as stop:
        main([str(root)])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: ") and message in error and "\n" not in error


def test_a_ragged_table_that_is_named_is_refused(tmp_path):
    root = write_table(tmp_path / "animals")
    rewrite(root, lambda text: f"{text}1,2,3\n")
    with pytest.raises(UserError, match=r"train.csv: line 20 has 3 columns, but line 1 has 2"):
        open_data(str(root), labels_csv="train.csv")


def test_a_repeated_row_is_one_image(tmp_path):
    root = write_table(tmp_path / "animals")
    rewrite(root, lambda text: f"{text}000.jpg,bee\n")
    assert is_right(open_data(str(root)))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "is not a regular expression"),
        ("bee", "has 0 groups; the label is the only group"),
        ("(b)(e)", "has 2 groups"),
        (r"^(\w+)\.x$", r"18 images do not match (train_images/000.jpg)"),
        (r"^\d(\d)", None),
    ],
)
def test_a_label_pattern_is_a_regular_expression_with_one_group(pattern, message, tmp_path):
    root = write_table(tmp_path / "animals")
    if message is None:
        assert open_data(str(root), label_pattern=pattern).class_ids == ["0", "1"]
        return
    with pytest.raises(UserError, match=re.escape(message)):
        open_data(str(root), label_pattern=pattern)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dataset_name", "b", "--labels_csv", "c"], "--dataset_name and --labels_csv cannot be combined"),
        (
            ["--data_dir", "b", "--label_pattern", "(c)", "--label_column", "d"],
            "--label_pattern and --label_column cannot",
        ),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(words, message, tmp_path, capsys):
    from finetune_vit import main as run

    (tmp_path / "recipe.yaml").write_text("num_train_epochs: 1\n")
    with pytest.raises(SystemExit):
        run([str(tmp_path / "recipe.yaml"), *words])
    assert message in capsys.readouterr().err


def test_the_documentation_has_a_row_for_every_place_of_labels():
    text = (ROOT / "docs" / "data.md").read_text()
    assert "| labels in a csv |" in text and "| labels in file names |" in text


def test_notes_on_images_in_class_folders_without_train_are_no_labels(tmp_path):
    root = tmp_path / "pets"
    for i in range(12):
        save(paint(2 + i % 2, i), root / ["cats", "dogs"][i % 2] / f"{i}.jpg")
    lines = [f"{i}.jpg,{['a', 'b', 'c'][i % 3]}" for i in range(12)]
    (root / "metadata.csv").write_text("file_name,split\n" + "\n".join(lines) + "\n")
    with pytest.raises(
        UserError, match=r"metadata.csv: sorts the images into other classes .*use it with --labels_csv"
    ):
        open_data(str(root))
    assert open_data(str(root), labels_csv="metadata.csv").class_ids == ["a", "b", "c"]


def test_links_to_nothing_and_a_folder_above_that_may_not_be_listed_do_no_harm(tmp_path, monkeypatch):
    root = write_table(tmp_path / "animals")
    (root / "labels.csv").symlink_to("nothing.csv")
    known, listed = open_data(str(root)), listing.list_folder

    def list_but_above(folder):
        if folder == root.parent:
            raise UserError(f"{folder}: cannot be listed (Permission denied)")
        return listed(folder)

    monkeypatch.setattr(listing, "list_folder", list_but_above)
    assert open_data(str(root)) == known and is_right(known)


def test_images_without_a_group_are_groups_of_their_own_and_a_fold_is_never_empty(tmp_path):
    root = write_table(tmp_path / "animals")
    text = (root / "train.csv").read_text().splitlines()
    rows = [f"{line},{'' if i % 2 else 'p' + str(i % 3)}" for i, line in enumerate(text[1:])]
    (root / "train.csv").write_text("\n".join([text[0] + ",patient", *rows]) + "\n")
    data = open_data(str(root), group_column="patient", label_column=text[0].split(",")[1])
    assert len(set(data.train_groups)) == 9 + 3
    everyone = replace(data, train_groups=["one"] * len(data.train_files))
    with pytest.raises(UserError, match=r"--kfold 2: fold \d would have no image.*use fewer folds"):
        draw_splits(everyone, 0.1, 0, None, (1, 2))
