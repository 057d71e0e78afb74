"""Other layouts than the competition's: recognized, labeled correctly, or refused with the reason."""

import csv
import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import ROOT, WNIDS, draw_picture
from PIL import Image

from data_loading import describe_layout, find_data, load_dataset, main, open_data
from transfer.config import RunArguments
from transfer.data import sources, tiny_imagenet
from transfer.data.listing import natural_key
from transfer.data.sources import open_hub_data
from transfer.data.splits import split_fingerprint
from transfer.errors import UserError
from transfer.submission import form_of
from transfer.submission.__main__ import main as check_csv

# Eleven distinct colors: with eleven classes, folder 10 must sort after folder 9.
PAINTS = [(0, 0, 0), (255, 255, 255), (230, 20, 20), (20, 200, 20), (20, 20, 230), (240, 240, 20), (20, 230, 230)]
PAINTS += [(230, 20, 230), (128, 128, 128), (250, 130, 20), (100, 10, 100)]


def paint(label: int, seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    noise = np.random.default_rng([label, seed]).normal(0, 6, (size[1], size[0], 3))
    return Image.fromarray((PAINTS[label] + noise).clip(0, 255).astype(np.uint8))


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_tiny_imagenet(root: Path, per_class: int = 9, validation: int = 3) -> Path:
    """Tiny ImageNet as published: validation images are numbered across the classes."""
    for wnid in WNIDS:
        for i in range(per_class):
            save(draw_picture(wnid, i), root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t31\t31\n")
    lines = []
    for i in range(validation * len(WNIDS)):
        wnid = WNIDS[(i * 3) % len(WNIDS)]
        save(draw_picture(wnid, 500 + i), root / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t31\t31\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    for i in range(6):
        save(draw_picture(WNIDS[i % len(WNIDS)], 900 + i), root / "test" / "images" / f"test_{i}.JPEG")
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    (root / "words.txt").write_text("".join(f"{wnid}\tname of {wnid}\n" for wnid in sorted(WNIDS)))
    return root


def write_few_shot(root: Path, classes: int = 11, per_class: int = 6, tested: int = 12, rows: int = 10) -> Path:
    """The course's later layout: numbered folders, numbered test images, a template that leaves some out."""
    for label in range(classes):
        for i in range(per_class):
            save(paint(label, i), root / "train" / str(label) / f"{i}.jpg")
    for i in range(tested):
        save(paint(i * 7 % classes, 100 + i), root / "test" / f"{i}.jpg")
    template = "".join(f"{i},0\n" for i in reversed(range(rows)))
    (root / "sample_submission.csv").write_text("ID,Label\n" + template)
    return root


def write_class_folders(root: Path) -> Path:
    """Class folders of mixed sizes with val/ and test/, and nothing that says in which order they are."""
    for label, name in enumerate(["class 2", "class 9", "class 10"], start=2):
        for i in range(9):
            save(paint(label, i, (30 + i, 40 - i)), root / "train" / name / f"{i}.png")
        for i in range(3):
            save(paint(label, 50 + i, (36, 30 + i)), root / "val" / name / f"{i}.png")
        save(paint(label, 99, (50, 40)), root / "test" / f"{name} seen.png")
    return root


def make_hub_splits(names=("red", "green", "blue")) -> datasets.DatasetDict:
    """A Hub dataset whose ClassLabel is not sorted, with another ClassLabel beside it."""
    features = datasets.Features(
        img=datasets.Image(),
        fine=datasets.ClassLabel(names=list(names)),
        coarse=datasets.ClassLabel(names=["a", "b"]),
    )

    def rows(count: int, seed: int) -> datasets.Dataset:
        labels = [i % 3 for i in range(count)]
        images = [paint(label + 2, seed + i) for i, label in enumerate(labels)]
        return datasets.Dataset.from_dict({"img": images, "fine": labels, "coarse": [0] * count}, features)

    return datasets.DatasetDict(train=rows(24, 0), valid=rows(9, 100), test=rows(6, 200))


def write_parquet(folder: Path, splits: datasets.DatasetDict) -> Path:
    for name, rows in splits.items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    return folder


def labels_of(path: Path) -> dict[str, int]:
    with path.open() as file:
        return {image_id: int(label) for image_id, label in list(csv.reader(file))[1:]}


def id2label(out: Path) -> list[str]:
    names = json.loads((out / "model" / "config.json").read_text())["id2label"]
    return [names[str(label)] for label in range(len(names))]


QUICK = {"learning_rate": "2e-2", "layer_decay": 1, "min_crop_scale": 0.8}


# Tiny ImageNet as published


def test_published_validation_images_are_the_validation_split_with_their_annotated_labels(tmp_path):
    folder = open_data(str(write_tiny_imagenet(tmp_path / "tiny-imagenet-200")))
    dataset = load_dataset(folder, validation_fraction=0.5)
    assert {name: len(split) for name, split in dataset.items()} == {"train": 36, "validation": 12, "test": 6}
    for row in dataset["validation"]:
        number = int(row["file"].split("_")[1].split(".")[0])
        assert dataset["train"].features["label"].names[row["label"]] == WNIDS[number * 3 % len(WNIDS)]
    said = "\n".join(describe_layout(folder))
    assert (
        "Tiny ImageNet as published: train/<wnid>/images/*, val/images/*, test/images/*, labels from wnids.txt" in said
    )
    assert "36 to train, 12 to validate (as published, none are held out of train), 6 to predict" in said


def test_a_classes_file_takes_its_classes_alone_in_its_order(tmp_path):
    root = write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    chosen = tmp_path / "two.txt"
    chosen.write_text("\n".join([WNIDS[3], WNIDS[0]]))
    folder = open_data(str(root), classes_file=str(chosen))
    assert folder.class_ids == [WNIDS[3], WNIDS[0]] and folder.test_files == []
    dataset = load_dataset(folder)
    assert {name: len(split) for name, split in dataset.items()} == {"train": 18, "validation": 6}
    assert all(folder.class_ids[row["label"]] in row["file"] for row in dataset["train"])
    said = "\n".join(describe_layout(folder))
    assert "labels from two.txt" in said and "2 more classes in train/ are left out" in said
    assert "there will be no submission" in said


def test_make_100_builds_the_competitions_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny_imagenet, "CLASSES", 2)
    source, destination = write_tiny_imagenet(tmp_path / "tiny-imagenet-200"), tmp_path / "new" / "tiny-imagenet-100"
    main(["make-100", str(source), str(destination)])
    folder = open_data(str(destination))
    assert folder.class_ids == WNIDS[:2] and folder.class_names == [f"name of {wnid}" for wnid in WNIDS[:2]]
    assert (len(folder.train_files), len(folder.validation_files), len(folder.test_files)) == (18, 0, 6)
    assert (folder.root / folder.train_files[5]).read_bytes() == (source / folder.train_files[5]).read_bytes()
    template = (destination / "submission_sample.csv").read_text().splitlines()
    assert template[0] == "image_id,label" and all(line.endswith(",0") for line in template[1:])
    for image_id, label in labels_of(destination / "answers.csv").items():
        assert WNIDS[label] == WNIDS[int(image_id.split("_")[1]) * 3 % len(WNIDS)]
    main([str(destination)])
    assert "submission_sample.csv lists exactly the 6 test images" in capsys.readouterr().out


def test_make_100_refuses_what_it_cannot_use_and_leaves_nothing(tmp_path, pristine_data, monkeypatch, capsys):
    for source, message in (
        (pristine_data, "is not Tiny ImageNet-200 as published"),
        (tmp_path, "is not a dataset of a known layout"),
    ):
        with pytest.raises(SystemExit):
            main(["make-100", str(source), str(tmp_path / "made")])
        assert message in capsys.readouterr().err and not (tmp_path / "made").exists()
    monkeypatch.setattr(tiny_imagenet, "CLASSES", 2)
    with pytest.raises(SystemExit):
        main(["make-100", str(write_tiny_imagenet(tmp_path / "source")), str(pristine_data)])
    assert f"{pristine_data}: already exists; choose a new folder" in capsys.readouterr().err
    monkeypatch.setattr(tiny_imagenet, "_write_tables", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(SystemExit):
        main(["make-100", str(tmp_path / "source"), str(tmp_path / "made")])
    assert "cannot be written (disk full)" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_tiny_imagenet_as_published_runs_from_end_to_end(tmp_path, checkpoints, finetune):
    root = write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    out = finetune(root, checkpoints("convnext"), num_train_epochs=8, **QUICK)
    validation = json.loads((out / "metrics.json").read_text())["validation"]
    assert validation["n"] == 12 and validation["accuracy"] > 0.8
    assert id2label(out) == [f"name of {wnid}" for wnid in WNIDS]
    predicted = labels_of(out / "submission.csv")
    assert sum(WNIDS[predicted[f"test_{i}"]] == WNIDS[i % len(WNIDS)] for i in range(6)) >= 5


# numbered class folders


def test_numbers_sort_as_numbers():
    assert sorted(["10", "9", "1", "010", "b2", "b10", "a"], key=natural_key) == [
        "1",
        "9",
        "010",
        "10",
        "a",
        "b2",
        "b10",
    ]


def test_numbered_folders_are_their_own_labels_and_10_comes_after_9(tmp_path):
    folder = open_data(str(write_few_shot(tmp_path / "few")))
    assert folder.class_ids == [str(label) for label in range(11)]
    for row in load_dataset(folder)["train"]:
        assert row["file"].split("/")[1] == str(row["label"])
    assert folder.test_ids == [str(i) for i in range(12)]
    said = "\n".join(describe_layout(folder))
    assert (
        "numbered class folders: train/<class>/*, test/*" in said
        and "labels from folder names in natural order" in said
    )
    assert "sample_submission.csv lists 10 of the 12 test images; the submission will list all" in said


def test_numbered_folders_run_from_end_to_end_and_every_test_image_is_submitted(
    tmp_path, checkpoints, finetune, capsys
):
    root = write_few_shot(tmp_path / "few")
    out = finetune(root, checkpoints("convnext"), num_train_epochs=16, **QUICK)
    lines = (out / "submission.csv").read_text().splitlines()
    assert lines[0] == "ID,Label"  # as the template has it
    assert [line.split(",")[0] for line in lines[1:]] == [*map(str, reversed(range(10))), "10", "11"]
    predicted = labels_of(out / "submission.csv")
    assert sum(predicted[str(i)] == i * 7 % 11 for i in range(12)) >= 10
    assert id2label(out) == [str(label) for label in range(11)]
    check_csv([str(out / "submission.csv"), "--template", str(root / "sample_submission.csv")])
    assert "ok: 12 rows" in capsys.readouterr().out


def test_a_csv_without_the_test_images_that_the_template_forgot_is_faulty(tmp_path, capsys):
    root = write_few_shot(tmp_path / "few")
    with pytest.raises(SystemExit):
        check_csv([str(root / "sample_submission.csv"), "--template", str(root / "sample_submission.csv")])
    assert "2 ids are missing ('10', '11')" in capsys.readouterr().err


def test_ids_are_file_names_with_their_ending_where_the_template_writes_them_so(tmp_path):
    root = write_few_shot(tmp_path / "few", classes=2)
    (root / "sample_submission.csv").write_text("filename,class\n" + "".join(f"{i}.jpg,0\n" for i in range(12)))
    dataset = load_dataset(open_data(str(root)))
    assert dataset["test"]["image_id"][:2] == ["0.jpg", "1.jpg"]


# class folders


def test_class_folders_are_labeled_in_natural_order_and_their_val_is_the_validation_split(tmp_path):
    folder = open_data(str(write_class_folders(tmp_path / "things")))
    assert folder.class_ids == ["class 2", "class 9", "class 10"]
    dataset = load_dataset(folder)
    assert {name: len(split) for name, split in dataset.items()} == {"train": 27, "validation": 9, "test": 3}
    for split in ("train", "validation"):
        assert all(row["file"].split("/")[1] == folder.class_ids[row["label"]] for row in dataset[split])
    said = "\n".join(describe_layout(folder))
    assert "class folders: train/<class>/*, val/<class>/*, test/*, labels from folder names in natural" in said
    assert "labels by folder names in natural order, which is not the sorted order" in said
    assert "0 = class 2, 1 = class 9, 2 = class 10" in said


def test_class_folders_of_mixed_sizes_run_from_end_to_end(tmp_path, checkpoints, finetune):
    out = finetune(write_class_folders(tmp_path / "things"), checkpoints("convnext"), num_train_epochs=8, **QUICK)
    validation = json.loads((out / "metrics.json").read_text())["validation"]
    assert validation["n"] == 9 and validation["accuracy"] > 0.8
    assert id2label(out) == ["class 2", "class 9", "class 10"]
    predicted = labels_of(out / "submission.csv")
    assert predicted == {"class 2 seen": 0, "class 9 seen": 1, "class 10 seen": 2}


def test_validation_images_that_are_also_in_train_are_reported(tmp_path, capsys):
    root = write_class_folders(tmp_path / "things")
    shutil.copy(root / "train" / "class 2" / "0.png", root / "val" / "class 2" / "0.png")
    main([str(root)])
    assert "1 validation images also in train" in capsys.readouterr().out


def test_labeled_test_images_are_measured_after_training_and_choose_nothing(tmp_path, checkpoints, finetune, capsys):
    root = write_class_folders(tmp_path / "things")
    whole = finetune(root, checkpoints("convnext"), output_dir="unlabeled", num_train_epochs=2, **QUICK)
    shutil.rmtree(root / "test")
    for label, name in enumerate(["class 2", "class 9", "class 10"], start=2):
        for i in range(2):
            save(paint(label, 70 + i), root / "Test" / name / f"{i}.png")  # the classes share file names
    capsys.readouterr()
    out = finetune(root, checkpoints("convnext"), output_dir="labeled", num_train_epochs=2, **QUICK)
    metrics, predicted = json.loads((out / "metrics.json").read_text()), labels_of(out / "submission.csv")
    assert sorted(predicted) == sorted(f"{name}/{i}" for name in ("class 2", "class 9", "class 10") for i in range(2))
    names = ["class 2", "class 9", "class 10"]
    hits = sum(names[label] == image_id.rpartition("/")[0] for image_id, label in predicted.items())
    assert metrics["test"]["n"] == 6 and metrics["test"]["accuracy"] == hits / 6
    said = capsys.readouterr().out
    assert f"test accuracy {hits / 6:.4f} (95% interval" in said
    assert "to measure the test accuracy on" in (out / "run.log").read_text()
    assert "| test | 6 |" in (out / "model" / "README.md").read_text()
    assert "test accuracy" in (out / "report.html").read_text()
    assert "test" not in json.loads((whole / "metrics.json").read_text())
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, out)]
    assert weights[0] == weights[1]


def test_test_folders_that_are_no_classes_or_hold_no_images_tell_no_labels(tmp_path):
    root = write_class_folders(tmp_path / "things")
    save(paint(2, 0), root / "test" / "class 2" / "0.png")
    assert open_data(str(root)).test_labels == []  # images lie beside the folder
    for file in (root / "test").glob("*.png"):
        file.unlink()
    assert open_data(str(root)).test_labels == [0]
    (root / "test" / "class 9").mkdir()
    assert open_data(str(root)).test_labels == []
    save(paint(2, 0), root / "test" / "class 9" / "0.png")
    save(paint(2, 0), root / "test" / "other" / "0.png")
    assert open_data(str(root)).test_labels == []


# a Hub dataset


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return write_parquet(tmp_path / "me" / "colors", make_hub_splits())


def test_a_hub_data_set_keeps_its_labels_and_its_images_bytes(hub):
    folder = open_hub_data(str(hub), label_column="fine")
    assert folder.class_ids == ["red", "green", "blue"]
    dataset, source = load_dataset(folder), make_hub_splits()
    for ours, theirs in (("train", "train"), ("validation", "valid")):
        assert dataset[ours]["label"][:] == source[theirs]["fine"][:]
        stored = source[theirs].cast_column("img", datasets.Image(decode=False))["img"][:]
        assert [(folder.root / file).read_bytes() for file in dataset[ours]["file"]] == [i["bytes"] for i in stored]
    assert dataset["test"]["image_id"][:] == [str(row) for row in range(6)]
    assert "labels from column fine" in "\n".join(describe_layout(folder))


def test_a_hub_data_set_may_have_a_template_with_class_names(hub, tmp_path):
    (tmp_path / "t.csv").write_text("id,label\n" + "".join(f"{i},green\n" for i in range(6)))
    run = RunArguments(dataset_name=str(hub), label_column_name="fine", template=str(tmp_path / "t.csv"))
    data = find_data(run)
    assert data.test_ids == list("012345") and form_of(data).words == ("red", "green", "blue")


def test_a_hub_data_set_is_copied_once_and_anew_when_it_changes(hub, monkeypatch):
    first = open_hub_data(str(hub), label_column="fine")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_write_splits", None)
        assert open_hub_data(str(hub), label_column="fine").root == first.root
    write_parquet(hub, datasets.DatasetDict(train=make_hub_splits()["train"].select(range(12))))
    second = open_hub_data(str(hub), label_column="fine")
    assert second.root != first.root and len(second.train_files) == 12


def test_a_data_set_saved_anew_to_the_same_folder_is_copied_anew(tmp_path, hub):
    def save_and_open(label: int):
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
        rows = {"image": [Image.new("RGB", (8, 8), PAINTS[label]), Image.new("RGB", (8, 8))], "label": [0, 1]}
        datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features)).save_to_disk(tmp_path / "saved")
        return open_hub_data(str(tmp_path / "saved"))

    first, again = save_and_open(2), open_hub_data(str(tmp_path / "saved"))
    assert again.root == first.root
    second = save_and_open(3)  # as many images, of the same size
    assert second.root != first.root
    assert (second.root / "train/0.png").read_bytes() != (first.root / "train/0.png").read_bytes()


def test_a_small_hub_data_set_is_memory_mapped_even_if_datasets_would_keep_it_in_memory(hub, monkeypatch):
    monkeypatch.setattr(datasets.config, "IN_MEMORY_MAX_SIZE", 2**30)
    assert all(rows.cache_files for rows in sources.load_splits(str(hub), None).values())


def test_a_folder_of_save_to_disk_and_one_of_images_are_data_sets_too(tmp_path, hub):
    make_hub_splits().save_to_disk(tmp_path / "saved")
    write_class_folders(tmp_path / "things")
    shutil.rmtree(tmp_path / "things" / "test")
    saved = open_hub_data(str(tmp_path / "saved"), label_column="fine")
    assert split_fingerprint(load_dataset(saved)) == split_fingerprint(
        load_dataset(open_hub_data(str(hub), label_column="fine"))
    )
    assert open_hub_data(str(tmp_path / "things")).class_ids == [
        "class 10",
        "class 2",
        "class 9",
    ]  # as `datasets` sorts


def test_a_hub_data_set_runs_from_end_to_end(hub, checkpoints, tmp_path, monkeypatch):
    from finetune_vit import main as run

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("per_device_train_batch_size: 8\nnum_train_epochs: 8\nlayer_decay: 1\nlearning_rate: 2.0e-2\n")
    words = ["--dataset_name", str(hub), "--label_column_name", "fine", "--output_dir", str(tmp_path / "out")]
    run([str(recipe), "--model_name_or_path", str(checkpoints("convnext")), *words])
    assert id2label(tmp_path / "out") == ["red", "green", "blue"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["validation"]["n"] == 9
    predicted = labels_of(tmp_path / "out" / "submission.csv")
    assert sum(predicted[str(row)] == row % 3 for row in range(6)) >= 5


@pytest.mark.parametrize(
    ("values", "order"),
    [
        (["class 10", "class 9", "bee, honey"], ["bee, honey", "class 9", "class 10"]),
        ([10, 9, 3], ["3", "9", "10"]),
    ],
)
def test_a_label_column_of_strings_or_integers_becomes_a_classlabel_in_natural_order(values, order, tmp_path):
    splits = make_hub_splits().remove_columns("coarse")
    kind = datasets.Value("string" if isinstance(values[0], str) else "int32")
    plain = datasets.DatasetDict(
        {
            name: rows.remove_columns("fine").add_column("fine", [values[k] for k in rows["fine"][:]])
            for name, rows in splits.items()
        }
    ).cast_column("fine", kind)
    place = write_parquet(tmp_path / "plain", plain)
    folder = open_hub_data(str(place))
    assert folder.class_ids == folder.class_names == order
    wanted = [order.index(str(values[k])) for k in splits["train"]["fine"][:]]
    assert folder.train_labels == wanted and folder.validation_labels == wanted[:9]
    assert len(folder.test_files) == 6


def test_a_plain_label_column_of_a_hub_data_set_must_be_clear(tmp_path):
    splits = make_hub_splits()
    names = datasets.Value("string")
    plain = splits.cast_column("fine", names).cast_column("coarse", names)
    place = write_parquet(tmp_path / "plain", plain)
    with pytest.raises(UserError, match="several label columns, fine and coarse; choose one with --label_column_name"):
        open_hub_data(str(place))
    assert len(open_hub_data(str(place), label_column="fine").class_ids) == 3
    for row, message in (("", "row 0 of train has no label"), ("new", "validation has the label new, which train")):
        split = "train" if row == "" else "valid"
        changed = plain[split].map(lambda old, i, row=row: {"fine": old["fine"] if i else row}, with_indices=True)
        bad = write_parquet(tmp_path / f"bad {split}", datasets.DatasetDict({**plain, split: changed}))
        with pytest.raises(UserError, match=message):
            open_hub_data(str(bad), label_column="fine")


def without_labels(splits):
    return splits.remove_columns(["fine", "coarse"])


def without_images(splits):
    return splits.remove_columns(["img"])


def hidden_labels(splits):
    return splits.map(lambda row: {"fine": -1})


def only_test(splits):
    return datasets.DatasetDict(test=splits["test"])


@pytest.mark.parametrize(
    ("change", "label", "message"),
    [
        (None, None, "has several label columns, fine and coarse; choose one with --label_column_name"),
        (None, "color", "--label_column_name color: is not among the label columns of"),
        (without_labels, None, "no column of img is a ClassLabel or has strings or integers; make one with"),
        (without_images, "fine", "has 0 image columns among fine, coarse; expected one"),
        (hidden_labels, "fine", "row 0 of train has no label"),
        (only_test, "fine", "has no split train, only test"),
    ],
)
def test_a_hub_data_set_that_cannot_be_used_is_refused_with_its_fault(change, label, message, tmp_path):
    splits = make_hub_splits()
    place = write_parquet(tmp_path / "faulty", change(splits) if change else splits)
    with pytest.raises(UserError) as refusal:
        open_hub_data(str(place), label_column=label)
    assert message in str(refusal.value)


def test_a_row_that_is_not_an_image_is_named_and_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=["a", "b"]))
    good = {
        "bytes": (lambda b: (paint(1, 0).save(b, "PNG"), b.getvalue())[1])(io.BytesIO()),
        "path": None,
    }
    rows = {"image": [good, {"bytes": b"no picture", "path": None}], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "bad" / "train.parquet")
    with pytest.raises(UserError, match="split train: row 1 cannot be read as an image"):
        open_hub_data(str(tmp_path / "bad"))
    assert not [path for path in (tmp_path / "cache" / "finetune-vit" / "hub").iterdir() if path.is_dir()]


def test_images_of_a_hub_data_set_keep_their_labels_in_every_format(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.ClassLabel(names=["a", "b"]))

    def pack(*formats):
        rows: dict = {"image": [], "label": [number % 2 for number in range(len(formats))]}
        for number, kind in enumerate(formats):
            file = io.BytesIO()
            paint(1, number).save(file, kind, **({"save_all": True} if kind == "MPO" else {}))
            rows["image"].append({"bytes": file.getvalue(), "path": None})
        place = tmp_path / "-".join(formats)
        datasets.Dataset.from_dict(rows, features).to_parquet(place / "train.parquet")
        return str(place)

    formats = ("PNG", "MPO", "JPEG2000", "WEBP", "BMP")
    folder = open_hub_data(pack(*formats))
    assert [file.rpartition("/")[2].partition(".")[0] for file in folder.train_files] == list("01234")
    assert folder.train_labels == [0, 1, 0, 1, 0]
    with pytest.raises(UserError, match="split train: row 1 is a file of the format ICO; convert it to JPEG or PNG"):
        open_hub_data(pack("PNG", "ICO"))


def test_a_missing_hub_data_set_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="--dataset_name me/nothing: cannot be loaded: ") as refusal:
        open_hub_data("me/nothing")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data_dir", "a", "--dataset_name", "b"], "--dataset_name and --data_dir cannot be combined"),
        (["--dataset_name", "b", "--classes_file", "c"], "--dataset_name and --classes_file cannot be combined"),
        (
            ["--data_dir", "a", "--label_column_name", "b"],
            "--label_column_name needs --dataset_name, which is missing",
        ),
    ],
)
def test_arguments_of_two_sources_do_not_mix(words, message, tmp_path, capsys):
    from finetune_vit import main as run

    (tmp_path / "recipe.yaml").write_text("num_train_epochs: 1\n")
    with pytest.raises(SystemExit):
        run([str(tmp_path / "recipe.yaml"), *words])
    assert message in capsys.readouterr().err


# the documentation


def test_the_documentation_has_a_row_for_every_layout(tmp_path, pristine_data, hub):
    rows = [line for line in (ROOT / "docs" / "data.md").read_text().splitlines() if line.startswith("| ")]
    folders = [open_data(str(pristine_data)), open_hub_data(str(hub), label_column="fine")]
    for write in (write_tiny_imagenet, write_few_shot, write_class_folders):
        folders.append(open_data(str(write(tmp_path / write.__name__))))
    for folder in folders:
        kind = folder.kind.split(f" {hub}")[0] or "the competition's"
        assert any(row.startswith(f"| {kind} |") for row in rows), kind


# refusals


def remove_order(root):
    (root / "wnids.txt").unlink()


def name_number(root):
    (root / "train" / "3").rename(root / "train" / "three")


def two_templates(root):
    (root / "template.csv").write_text("ID,Label\n0,0\n")


def unknown_id(root):
    (root / "sample_submission.csv").write_text("ID,Label\nghost,0\n")


def one_class(root):
    for label in range(1, 11):
        shutil.rmtree(root / "train" / str(label))


def flat_train(root):
    shutil.rmtree(root / "train")
    save(paint(0, 0), root / "train" / "0.jpg")


def empty_class(root):
    (root / "train" / "11").mkdir()


def remove_annotations(root):
    (root / "val" / "val_annotations.txt").unlink()


def add_line(line):
    def add(root):
        path = root / "val" / "val_annotations.txt"
        path.write_text(path.read_text() + line)

    return add


def add_image(root):
    save(draw_picture(WNIDS[0], 1), root / "val" / "images" / "val_99.JPEG")


def empty_val(root):
    shutil.rmtree(root / "val")
    (root / "val" / "class 2").mkdir(parents=True)


def unknown_val(root):
    (root / "val" / "class 3").mkdir()


REFUSALS = [
    (write_tiny_imagenet, remove_order, "no wnids.txt, which gives every class its label"),
    (
        write_tiny_imagenet,
        remove_annotations,
        "val: has no class folders; expected val/<class>/*, or val/im",
    ),
    (
        write_tiny_imagenet,
        add_line("val_50.JPEG\tn00000010\n"),
        "lists the missing image val_50.JPEG",
    ),
    (write_tiny_imagenet, add_line("val_0.JPEG\tn00000010\n"), "line 13 lists val_0.JPEG a second time"),
    (write_tiny_imagenet, add_line("nonsense\n"), "val_annotations.txt: line 13 is not `file<TAB>class ...`"),
    (write_tiny_imagenet, add_image, "has no line for the image val/images/val_99.JPEG"),
    (
        write_tiny_imagenet,
        remove_order,
        "if the class folders are not named 0 to N-1, give their order with --classes_file",
    ),
    (write_few_shot, name_number, "no wnids.txt, which gives every class its label"),
    (
        write_few_shot,
        two_templates,
        "sample_submission.csv and template.csv could each be the template; rename the right one",
    ),
    (write_few_shot, unknown_id, "1 ids have no test image ('ghost')"),
    (write_few_shot, one_class, "train: found 1 class folder (0); expected at least two"),
    (write_few_shot, flat_train, "train: found 0 class folders (none); expected at least two"),
    (write_few_shot, empty_class, "11: has no images, but every folder in train/ is a class"),
    (
        write_class_folders,
        empty_val,
        "val: has no images; add some, or remove the folder to hold out a part of train/",
    ),
    (write_class_folders, unknown_val, "val: class 3 is not a class of train/"),
]


@pytest.mark.parametrize(("write", "spoil", "message"), REFUSALS, ids=[message[:50] for *_, message in REFUSALS])
def test_a_faulty_layout_is_refused_with_its_fault(write, spoil, message, tmp_path, capsys):
    root = write(tmp_path / "data")
    spoil(root)
    with pytest.raises(SystemExit) as stop:
        main([str(root)])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert error.startswith("error: ") and message in error and "\n" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "two.txt: is empty"), ("nowhere\nclass 2", "nowhere: class folder is missing"), (None, "cannot be read")],
)
def test_a_faulty_classes_file_is_refused(text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / "two.txt").write_text(text)
    with pytest.raises(SystemExit):
        main([str(write_class_folders(tmp_path / "things")), "--classes_file", str(tmp_path / "two.txt")])
    assert message in capsys.readouterr().err
