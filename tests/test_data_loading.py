"""Layouts, labels, splits and refusals of data_loading.py."""

import os
import runpy
import shutil
import sys
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import COLORS, ROOT, WNIDS, draw_picture, write_data_set
from PIL import Image

from data_loading import find_data, load_dataset, main, open_data
from transfer.config import RunArguments
from transfer.data.listing import image_id_of
from transfer.data.splits import CopyCounts, count_copies, split_fingerprint, split_validation
from transfer.errors import UserError
from transfer.runs import RunContext


def zip_folder(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, f"{folder.name}/{file.relative_to(folder)}")
    return path


def test_labels_follow_the_lines_of_wnids_txt_in_every_split(pristine_data):
    dataset = load_dataset(open_data(str(pristine_data)), validation_fraction=0.25)
    assert dataset["train"].features["label"].names == WNIDS != sorted(WNIDS)
    for split in ("train", "validation"):
        for row in dataset[split]:
            assert WNIDS[row["label"]] in row["file"]


def test_images_decode_to_rgb_and_test_images_carry_their_ids(pristine_data):
    dataset = load_dataset(open_data(str(pristine_data)))
    assert Image.open(pristine_data / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_0.JPEG").mode == "L"
    assert {image.mode for image in dataset["train"]["image"]} == {"RGB"}
    assert set(dataset["test"].column_names) == {"image", "image_id", "file"}
    template = (pristine_data / "submission_sample.csv").read_text().split()[1:]
    assert sorted(dataset["test"]["image_id"]) == sorted(line.split(",")[0] for line in template)


def test_folder_parent_and_zip_give_the_same_data_set(pristine_data, tmp_path):
    archive = zip_folder(pristine_data, tmp_path / "download.zip")
    with zipfile.ZipFile(archive, "a") as added:
        added.writestr("__MACOSX/tiny-imagenet-100/._train", b"x")
    found = [open_data(str(place)) for place in (pristine_data, pristine_data.parent, archive)]
    assert len({split_fingerprint(load_dataset(folder)) for folder in found}) == 1
    assert all(folder.class_names == ["red thing", "green thing", "blue thing", "grey"] for folder in found)
    assert found[2].ignored - found[0].ignored == {"__MACOSX/* (hidden or left by a system)": 1}


def test_boxes_and_other_files_are_ignored_and_counted(data):
    (data / "train" / WNIDS[0] / "images" / "Thumbs.db").write_bytes(b"x")
    (data / "train" / WNIDS[0] / "images" / "png").write_bytes(b"x")
    folder = open_data(str(data))
    assert folder.ignored == {"*_boxes.txt": 4, ".DS_Store": 1, "Thumbs.db": 1, "png": 1}
    assert len(folder.train_files) == 48


def test_the_split_is_stratified_and_depends_on_names_and_its_own_seed_alone(pristine_data, tmp_path):
    elsewhere = shutil.copytree(pristine_data, tmp_path / "elsewhere")
    for wnid in WNIDS:  # other bytes, other times, same names
        Image.new("RGB", (8, 8), COLORS[wnid]).save(elsewhere / "train" / wnid / "images" / f"{wnid}_5.JPEG")

    def held_out(place, seed):
        return load_dataset(open_data(str(place)), 0.25, seed)["validation"]

    first = held_out(pristine_data, 0)
    assert [first["label"].count(label) for label in range(4)] == [3, 3, 3, 3]
    assert first["file"] == held_out(elsewhere, 0)["file"]
    assert first["file"] != held_out(pristine_data, 1)["file"]


def test_train_and_validation_share_no_image_and_lose_none(pristine_data):
    dataset = load_dataset(open_data(str(pristine_data)), 0.25)
    train, validation = set(dataset["train"]["file"]), set(dataset["validation"]["file"])
    assert not train & validation and len(train | validation) == 48


def test_a_small_part_is_even_over_the_classes(pristine_data):
    train = load_dataset(open_data(str(pristine_data)), 0.25, max_train_samples=10)["train"]
    assert sorted(train["label"].count(label) for label in range(4)) == [2, 2, 3, 3]


def test_names_that_two_classes_share_are_told_apart(data):
    (data / "words.txt").write_text("".join(f"{wnid}\tcrane, {wnid}\n" for wnid in WNIDS))
    assert open_data(str(data)).class_names == [f"crane ({wnid})" for wnid in WNIDS]


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(data):
    before = open_data(str(data))
    for name in ("wnids.txt", "submission_sample.csv"):
        text = (data / name).read_text()
        (data / name).write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    after = open_data(str(data))
    assert (after.class_ids, after.test_files) == (before.class_ids, before.test_files)


def test_ids_are_file_names_without_their_ending():
    assert image_id_of("test/images/a.b.JPEG") == "a.b"


def rename_class(data):
    (data / "train" / WNIDS[1]).rename(data / "train" / "n00000099")


def empty_class(data):
    shutil.rmtree(data / "train" / WNIDS[2] / "images")


def add_class(data):
    shutil.copytree(data / "train" / WNIDS[2], data / "train" / "n00000099")


def drop_test_image(data):
    next(iter(sorted((data / "test" / "images").iterdir()))).unlink()


def add_test_image(data):
    Image.new("RGB", (8, 8)).save(data / "test" / "images" / "new.JPEG")


def write(name, text):
    return lambda data: (data / name).write_text(text)


def edit_template(line):
    def edit(data):
        path = data / "submission_sample.csv"
        path.write_text(path.read_text() + line)

    return edit


REFUSALS = [
    (lambda data: (data / "wnids.txt").unlink(), "no wnids.txt, which gives every class its label"),
    (write("wnids.txt", "\n \n"), "wnids.txt: is empty"),
    (write("wnids.txt", "\n".join([*WNIDS, WNIDS[0]])), f"wnids.txt: lists {WNIDS[0]} more than once"),
    (write("wnids.txt", "\n".join([*WNIDS, "n12345678"])), "n12345678: class folder is missing"),
    (write("words.txt", f"{WNIDS[0]}\tred thing\n"), f"{WNIDS[1]} is an unknown wnid: not in words.txt"),
    (rename_class, f"{WNIDS[1]}: class folder is missing"),
    (add_class, "n00000099: class folder is not in wnids.txt"),
    (empty_class, f"{WNIDS[2]}: has no images"),
    (lambda data: shutil.rmtree(data / "train"), "has no train folder"),
    (drop_test_image, "1 ids have no test image"),
    (add_test_image, "1 test images have no row ('new')"),
    (edit_template("ghost,0\n"), "1 ids have no test image ('ghost')"),
    (write("submission_sample.csv", "image_id\nx\n"), "has 1 columns; a template has two"),
    (write("submission_sample.csv", "image_id,label\n"), "has no rows"),
    (write("submission_sample.csv", "image_id,label\na,0\na,0\n"), "id 'a' appears twice"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSALS, ids=[message[:40] for _, message in REFUSALS])
def test_a_faulty_data_set_is_refused_with_its_fault(spoil, message, data, capsys):
    spoil(data)
    with pytest.raises(SystemExit) as stop:
        main([str(data)])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert error.startswith("error: ") and message in error and "\n" not in error


def test_a_folder_that_is_something_else_is_refused_with_what_was_expected(tmp_path):
    (tmp_path / "holiday").mkdir()
    with pytest.raises(
        UserError, match=r"holiday: is not a dataset of a known layout; expected wnids.txt, train/<wnid>/images"
    ):
        open_data(str(tmp_path / "holiday"))


def test_two_data_sets_in_one_folder_must_be_told_apart(tmp_path):
    for name in ("a", "b"):
        write_data_set(tmp_path / name, per_class=2, test_images=1).rename(tmp_path / name / "set")
        (tmp_path / name / "set").rename(tmp_path / f"{name}-set")
    with pytest.raises(UserError, match="holds several datasets"):
        open_data(str(tmp_path))


def test_unreadable_images_are_all_named(data, capsys):
    images = data / "train" / WNIDS[0] / "images"
    (images / f"{WNIDS[0]}_1.JPEG").write_bytes(b"")
    (images / f"{WNIDS[0]}_2.JPEG").write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stop:
        main([str(data)])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith(f"error: {images / f'{WNIDS[0]}_1.JPEG'}: cannot be read")
    assert f"{WNIDS[0]}_2.JPEG" in error and "2 of 58 images" in error and "--skip_unreadable true" in error


def test_unreadable_training_images_are_left_out_if_asked_for(data, capsys):
    broken = [f"train/{WNIDS[0]}/images/{WNIDS[0]}_{number}.JPEG" for number in (1, 2)]
    for file in broken:
        (data / file).write_bytes(b"no picture")
    next((data / "test" / "images").iterdir()).write_bytes(b"")
    main([str(data), "--skip_unreadable"])
    assert f"warning     2 images cannot be read and are left out: {', '.join(broken)}" in capsys.readouterr().out
    found = find_data(RunArguments(data_dir=str(data), skip_unreadable=True))
    assert len(found.train_files) == len(found.train_labels) == 46 and not set(broken) & set(found.train_files)
    assert len(found.test_files) == 10 and found.train_labels.count(0) == 10
    for file in (data / "train" / WNIDS[0] / "images").iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match=f"no training image of class {WNIDS[0]} can be read; replace its images"):
        find_data(RunArguments(data_dir=str(data), skip_unreadable=True))


def test_folds_are_recommended_only_where_they_can_be_drawn(tmp_path):
    def advice(per_class, **published):
        data = replace(open_data(str(write_data_set(tmp_path / str(per_class), per_class=per_class))), **published)
        context = RunContext(RunArguments(), {}, "", data, load_dataset(data))
        return "\n".join(context.describe_shortage(SimpleNamespace(do_train=False, max_steps=1)))

    assert "--kfold 5 validates on every image" in advice(5)
    few = advice(4)
    assert "4 validation images are few" in few and "--kfold" not in few and "add images" in few
    assert "--kfold" not in advice(6, validation_files=["test/images/test_0.JPEG"], validation_labels=[0])


def test_copies_stay_on_one_side_of_the_split_and_of_every_fold(tmp_path, capsys):
    root = write_data_set(tmp_path, per_class=10)
    for wnid in WNIDS:
        images = root / "train" / wnid / "images"
        for i in range(10):
            for copy in range(4):
                shutil.copy(images / f"{wnid}_{i}.JPEG", images / f"copy{copy}_{i}.JPEG")
    data = open_data(str(root))
    for fold in (None, (1, 3), (3, 3)):
        splits = load_dataset(data, 0.2, fold=fold)
        held_out, kept = (
            {(root / file).read_bytes() for file in splits[name]["file"]} for name in ("validation", "train")
        )
        assert held_out and kept and not held_out & kept and len(held_out | kept) == 40
    assert [load_dataset(data, 0.2)["validation"]["label"].count(label) for label in range(4)] == [10] * 4
    main([str(root)])
    assert "40 pictures occur more than once in train (200 images), 0 of them with several" in capsys.readouterr().out


def test_a_copy_under_another_label_moves_alone_and_all_else_stays_where_it_was(data):
    before = load_dataset(open_data(str(data)), 0.25)
    held_out = next(file for file in before["validation"]["file"] if WNIDS[0] in file)
    trained = next(file for file in before["train"]["file"] if WNIDS[1] in file)
    shutil.copy(data / held_out, data / trained)
    after = load_dataset(open_data(str(data)), 0.25)
    moved = set(after["validation"]["file"]) ^ set(before["validation"]["file"])
    assert moved in ({held_out}, {trained})
    copies = count_copies(open_data(str(data)), 0.25, 0)
    assert copies == CopyCounts(pictures=1, images=2, with_several_labels=1, moved=1, published=0)


def test_a_file_that_becomes_a_copy_at_the_same_size_and_time_is_noticed(data):
    one, other = (data / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_{number}.JPEG" for number in (1, 2))
    size = max(one.stat().st_size, other.stat().st_size)
    for file in (one, other):
        file.write_bytes(file.read_bytes().ljust(size, b"\0"))
    times = other.stat().st_atime_ns, other.stat().st_mtime_ns
    assert count_copies(open_data(str(data)), 0.25, 0) is None
    other.write_bytes(one.read_bytes())
    os.utime(other, ns=times)
    assert count_copies(open_data(str(data)), 0.25, 0).pictures == 1


def test_a_split_without_straddling_copies_is_that_of_the_names_alone():
    files = [f"{number}.jpg" for number in range(40)]
    labels = [number % 2 for number in range(40)]
    for seed in range(20):
        train, validation = split_validation(files, labels, 0.3, seed)
        contents = list(files)
        for side in (train, validation):  # pairs of one class, and of two
            contents[side[0]] = contents[next(p for p in side[1:] if labels[p] == labels[side[0]])]
            contents[side[-1]] = contents[next(p for p in side if labels[p] != labels[side[-1]])]
        assert split_validation(files, labels, 0.3, seed, contents) == (train, validation)


def test_one_picture_that_makes_up_most_of_a_class_is_trained_on():
    files = [f"{number}.jpg" for number in range(20)]
    contents = ["same"] * 15 + files[15:]
    train, validation = split_validation(files, [0] * 20, 0.2, 0, contents)
    assert set(range(15)) <= set(train) and len(validation) == 4


def test_a_class_with_a_single_image_is_trained_on_and_the_check_says_what_the_run_says(data, capsys):
    shutil.rmtree(data / "train" / WNIDS[0] / "images")
    (data / "train" / WNIDS[0] / "images").mkdir()
    draw_picture(WNIDS[0], 0).save(data / "train" / WNIDS[0] / "images" / "only.JPEG")
    main([str(data)])
    said = capsys.readouterr().out
    assert (
        "ok " in said and "1 class has too few images to validate on" in said and "add images: n00000030 (1)" in said
    )
    splits = load_dataset(open_data(str(data)))
    assert splits["train"]["label"].count(0) == 1 and 0 not in splits["validation"]["label"]


def test_classes_of_single_images_alone_are_refused_by_the_check_and_the_run_alike(tmp_path, capsys):
    root = write_data_set(tmp_path, per_class=1)
    message = "is the only image of its class, as in every class"
    with pytest.raises(UserError, match=message):
        load_dataset(open_data(str(root)))
    with pytest.raises(SystemExit):
        main([str(root)])
    assert message in capsys.readouterr().err


def test_the_command_prints_what_it_found(data, monkeypatch, capsys):
    twin = data / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_3.JPEG"
    shutil.copy(twin, data / "train" / WNIDS[1] / "images" / f"{WNIDS[1]}_3.JPEG")
    shutil.copy(twin, next((data / "test" / "images").iterdir()))
    monkeypatch.setattr(sys, "argv", ["data_loading.py", str(data)])
    runpy.run_path(str(ROOT / "data_loading.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for part in (
        "classes     4, 12 training images each; labels follow wnids.txt, which is not sorted",
        "labels      0 = n00000030 red thing, 1 = n00000010 green thing",
        "ignored     4 *_boxes.txt, 1 .DS_Store",
        "submission_sample.csv lists exactly the 10 test images",
        "modes 54 RGB, 4 L (all are converted to RGB); sizes 58 of 32x32",
        "1 repeated within train, 1 test images also in train",
        f"two labels  train/{WNIDS[0]}/images/{WNIDS[0]}_3.JPEG (red thing) = train/{WNIDS[1]}/images/",
    ):
        assert part in printed
