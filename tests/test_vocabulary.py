"""The template says how a submission writes labels; what it does not say is never guessed."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from data_loading import describe_layout, main, open_data
from transfer import submission
from transfer.config import SUBMISSION_LABELS
from transfer.data.labels import match_ids, name_test_images
from transfer.data.listing import NATURAL_ORDER, choose_templates
from transfer.errors import UserError
from transfer.evaluation.predictions import Predictions, average_probabilities, fit_temperature
from transfer.submission import Classes, decide_form, form_of
from transfer.submission.__main__ import main as check_csv

ANIMALS = ["bee", "lion", "wolf"]
COLORS = [(230, 20, 20), (20, 200, 20), (20, 20, 230)]


def save(path: Path, label: int, seed: int = 0) -> None:
    noise = np.random.default_rng([label, seed]).normal(0, 6, (32, 32, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((COLORS[label % 3] + noise).clip(0, 255).astype(np.uint8)).save(path)


def write_data(root: Path, folders, template: str | None = None, images=None, per_class: int = 6) -> Path:
    """Class folders, test images "0.png" to "5.png" unless named otherwise, and a template of these lines."""
    for label, folder in enumerate(folders):
        for i in range(per_class):
            save(root / "train" / folder / f"{i}.png", label, i)
    for i, name in enumerate([f"{i}.png" for i in range(6)] if images is None else images):
        save(root / "test" / name, i, 99 + i)
    if template is not None:
        (root / "sample_submission.csv").write_text(template)
    return root


def rows(label: str, header: str = "id,label", ids="012345") -> str:
    return "\n".join([header, *(f"{i},{label}" for i in ids)]) + "\n"


def decide(tmp_path, folders, text, order=NATURAL_ORDER, names=None, asked=None):
    (tmp_path / "t.csv").write_text(text)
    return decide_form(tmp_path / "t.csv", Classes(tuple(folders), tuple(names or folders), order), asked)


# the decision

NUMBERED = ["1", "2", "3"]
WNIDS = ["n03", "n01", "n02"]
PADDED = "column label of train.csv in natural order"
DECIDED = [  # folders, template rows, what gave the order, words
    (ANIMALS, rows("bee"), None, ANIMALS),
    (ANIMALS, "id,label\n0,bee\n1,wolf\n", None, ANIMALS),
    (["1", "2", "3"], rows("1"), None, ["1", "2", "3"]),
    (["1", "2", "3"], rows("0"), None, ["1", "2", "3"]),
    (["1", "2", "3"], rows(""), None, ["1", "2", "3"]),
    (["1", "2", "3"], rows("3"), None, ["1", "2", "3"]),
    (["0", "1", "2"], rows("0"), None, ["0", "1", "2"]),
    (["2", "5", "11"], rows("0"), None, ["2", "5", "11"]),
    (["2", "5", "11"], rows("11"), None, ["2", "5", "11"]),
    (["001", "002", "003"], rows("0"), None, ["1", "2", "3"]),
    (["001", "002", "003"], rows("001"), None, ["001", "002", "003"]),
    (["007", "012"], rows("007"), PADDED, ["007", "012"]),
    (["007", "012"], rows("12"), PADDED, ["7", "12"]),
    (["7", "12"], rows("0"), PADDED, ["7", "12"]),
    (["caf\u00e9", "bar"], rows("cafe\u0301"), None, ["cafe\u0301", "bar"]),
    (["cafe\u0301", "bar"], rows("caf\u00e9"), None, ["caf\u00e9", "bar"]),
    (["0.5", "1.0"], rows("0.5"), None, ["0.5", "1.0"]),
    (WNIDS, rows("n01"), "wnids.txt", WNIDS),
    (WNIDS, rows("0"), "wnids.txt", ["0", "1", "2"]),
    (WNIDS, rows("2"), "wnids.txt", ["0", "1", "2"]),
    (WNIDS, rows(""), "wnids.txt", ["0", "1", "2"]),
    (ANIMALS, rows("0"), "classes.txt", ["0", "1", "2"]),
    (ANIMALS, rows("0"), "column label", ["0", "1", "2"]),
    (["0.5", "1.0", "2.0"], rows("0.5"), None, ["0.5", "1.0", "2.0"]),
    (["0", "cat", "dog"], "id,label\n0,0\n1,cat\n", None, ["0", "cat", "dog"]),
]


@pytest.mark.parametrize(("folders", "text", "order", "words"), DECIDED)
def test_the_template_decides_the_words_of_the_labels(tmp_path, folders, text, order, words):
    form = decide(tmp_path, folders, text, order or NATURAL_ORDER)
    assert list(form.words) == words


def test_every_value_of_submission_labels_has_a_form():
    assert {form.flag for form in submission.FORMS} == set(SUBMISSION_LABELS)


def test_a_form_is_added_with_one_class_and_one_row(tmp_path, monkeypatch):
    class Letters(submission.WordForm):
        flag = "letter"

        @classmethod
        def make(cls, classes):
            return cls(classes, "letters", tuple("ABCDEFGH"[: len(classes.ids)]))

    monkeypatch.setattr(submission, "FORMS", (*submission.FORMS, Letters))
    root = write_data(tmp_path / "d", ANIMALS, rows("B"))
    data = open_data(str(root))
    csv = submission.fill_submission(data, data.test_ids, np.eye(3)[[0, 1, 2, 2, 1, 0]], 1.0)
    assert csv.decode() == "id,label\n0,A\n1,B\n2,C\n3,C\n4,B\n5,A\n"
    assert "labels      written as letters" in "\n".join(describe_layout(data))
    (tmp_path / "a.csv").write_bytes(csv.replace(b"A", b"D"))
    with pytest.raises(SystemExit):
        check_csv([str(tmp_path / "a.csv"), "--template", str(root / "sample_submission.csv")])


def test_names_of_words_txt_and_wnids_are_told_apart(tmp_path):
    for label, what in (("a wolf", "class names"), ("n02", "wnids"), ("1", "integers 0 to 2, by wnids.txt")):
        form = decide(tmp_path, WNIDS, rows(label), "wnids.txt", ["a bee", "a lion", "a wolf"])
        assert form.what == what


UNDECIDED = [
    (ANIMALS, rows("0"), None, "no wnids.txt, which gives every class its label"),
    (ANIMALS, "id,label\n0,0\n1,1\n2,2\n", None, "no wnids.txt"),
    (ANIMALS, rows("Bee"), None, "the labels 'Bee' do not show how the classes ('bee', 'lion', 'wolf') are written"),
    (ANIMALS, rows("unknown"), None, "do not show"),
    (ANIMALS, rows("0.5"), None, "do not show"),
    (["1", "2", "3"], "id,label\n0,0\n1,1\n2,2\n3,4\n", None, "do not show"),
    (["3", "1", "2"], rows("1"), "classes.txt", "do not show"),
    (["01", "02", "10"], rows("10"), None, "do not show"),
    (
        ["007", "012"],
        rows("0"),
        PADDED,
        "whether labels are written as the text '007' or as the number 7",
    ),
    (["007", "012"], rows(""), PADDED, "--submission_labels wnid (the text) or folder (the number)"),
    (["00", "01"], rows("0"), PADDED, "as the text '00' or as the number 0"),
    (["cat", "dog"], rows("0.5"), None, "does not say of which ('cat', 'dog')"),
    (ANIMALS, rows("0.3,0.3,0.4", "id,bee,lion,tiger"), None, "are not the 3 classes ('bee', 'lion', 'wolf')"),
    (ANIMALS, rows("0.5,0.5", "id,bee,lion"), None, "are not the 3 classes"),
    (["cat", "dog"], rows("0.5", "id,cat_or_dog"), "classes.txt", "does not say of which"),
    (["dog", "hot_dog"], rows("0.5", "id,dog_hot_dog"), None, "does not say of which"),
    (["tumor", "normal"], rows("0.5", "id,no_tumor"), None, "does not say of which"),
    (["cat", "cats"], rows("0,1", "id,dog,dogs"), None, "are not the 2 classes"),
    (ANIMALS, rows("0,0,1", "id,0,1,2"), None, "are not the 3 classes"),
]


@pytest.mark.parametrize(("folders", "text", "order", "message"), UNDECIDED)
def test_what_a_template_does_not_decide_is_refused_with_a_way_out(tmp_path, folders, text, order, message):
    with pytest.raises(UserError) as refusal:
        decide(tmp_path, folders, text, order or NATURAL_ORDER)
    assert message in str(refusal.value) and "--submission_labels" in str(refusal.value)


ASKED = [
    (ANIMALS, rows("0"), "index", ["0", "1", "2"]),
    (["1", "2", "3"], rows("0"), "index", ["0", "1", "2"]),
    (["001", "002"], rows("0"), "folder", ["1", "2"]),
    (["001", "002"], rows("0"), "name", ["001", "002"]),
    (ANIMALS, rows("Bee"), "wnid", ANIMALS),
]


@pytest.mark.parametrize(("folders", "text", "asked", "words"), ASKED)
def test_submission_labels_overrules_the_template(tmp_path, folders, text, asked, words):
    assert list(decide(tmp_path, folders, text, asked=asked).words) == words


COLUMNS = [  # folders, header, cells, label of each column
    (ANIMALS, "id,wolf,bee,lion", "0.3,0.3,0.4", (2, 0, 1)),
    (ANIMALS, "id,Wolf,BEE,lion", "0,0,0", (2, 0, 1)),
    (["great dane", "shih-tzu"], "id,Shih_Tzu,great_dane", "0.5,0.5", (1, 0)),
    (ANIMALS, "id,p_lion,p_bee,p_wolf", "0.3,0.3,0.4", (1, 0, 2)),
    (NUMBERED, "id,Class 3,Class 1,Class 2", "0,0,1", (2, 0, 1)),
    (["cat", "cats"], "id,cats,cat", "0,1", (1, 0)),
    (["c0", "c1", "c2"], "img,c0,c1,c2", "1,0,0", (0, 1, 2)),
    (ANIMALS, "id,wolf,bee,lion", ",,", (2, 0, 1)),
    (["1", "2", "10"], "id,1,2,10", "0,0,1", (0, 1, 2)),
    (["cat", "dog"], "id,dog", "0.5", (1,)),
    (["cat", "dog"], "id,is_cat", "0.5", (0,)),
    (["tumor", "no_tumor"], "id,no_tumor", "0.5", (1,)),
    (["tumor", "no_tumor"], "id,p_no_tumor", "0.5", (1,)),
    (["tumor", "no_tumor"], "id,Tumor", "0.5", (0,)),
    (["dog", "hot_dog"], "id,Hot Dog", "0.5", (1,)),
    (["dog", "hotdog"], "id,hot_dog", "0.5", (1,)),
    (["hot_dog", "not_hot_dog"], "id,hot_dog", "0.5", (0,)),
    (["hot_dog", "not_hot_dog"], "id,is_not_hot_dog", "0.5", (1,)),
    (["0", "1"], "id,label", "0.5", (1,)),
]


@pytest.mark.parametrize(("folders", "header", "cells", "labels"), COLUMNS)
def test_probabilities_are_joined_to_the_header_by_name(tmp_path, folders, header, cells, labels):
    assert decide(tmp_path, folders, rows(cells, header)).labels == labels


@pytest.mark.parametrize(
    ("labels", "asked", "words"),
    [
        (["007", "012"], None, ["007", "012"]),
        (["7", "12"], None, ["7", "12"]),
        (["007", "012"], "folder", ["7", "12"]),
        (["007", "012"], "wnid", ["007", "012"]),
        (["cat", "dog"], None, ["0", "1"]),
    ],
)
def test_labels_of_a_csv_keep_their_zeros_without_a_template(labels, asked, words):
    form = decide_form(None, Classes(tuple(labels), tuple(labels), PADDED), asked)
    assert list(form.words) == words and "folder" not in form.what


def test_probabilities_can_be_asked_for(tmp_path):
    form = decide(tmp_path, ["cat", "dog"], rows("0"), asked="probability")
    assert form.labels == (1,) and form.what == "the probability of 'dog'"
    with pytest.raises(UserError, match="are not the 3 classes"):
        decide(tmp_path, ANIMALS, rows("0"), asked="probability")
    with pytest.raises(UserError, match="--submission_labels name cannot fill"):
        decide(tmp_path, ANIMALS, rows("0,0,1", "id,bee,lion,wolf"), asked="name")


def test_probabilities_are_calibrated_and_sum_to_one(tmp_path):
    form = decide(tmp_path, ANIMALS, rows("0,0,1", "id,wolf,bee,lion"))
    scores = np.array([[1000.0, 0, -3], [0.1, 0.2, 0.3]], dtype=np.float32)
    cells = np.array(form.render(scores, 2.0), dtype=float)
    assert np.allclose(cells, softmax(scores.astype(float) / 2, axis=-1)[:, [2, 0, 1]], atol=1e-9)
    assert np.allclose(cells.sum(1), 1, atol=1e-8)


# templates and ids


@pytest.mark.parametrize(
    ("images", "ids", "expected"),
    [
        (["1.png", "2.png"], ["2", "1"], ["1", "2"]),
        (["1.png", "2.png"], ["2.png", "1.png"], ["1.png", "2.png"]),
        (["a1.PNG", "a2.png"], ["A2.jpg", "A1.jpg"], ["A1.jpg", "A2.jpg"]),
        (["0001.png", "0002.png"], ["2", "1"], ["1", "2"]),
        (["1.png", "2.png"], ["0002", "0001"], ["0001", "0002"]),
        (["1.png", "2.png"], ["test/2.png", "test/1.png"], ["test/1.png", "test/2.png"]),
        (["1.png", "1.jpg"], ["1.jpg", "1.png"], ["1.jpg", "1.png"]),
        (["1.png", "01.png"], ["01", "1"], ["01", "1"]),
        (["t_07.png", "t_8.png"], ["T_7", "T_08"], ["T_7", "T_08"]),
    ],
)
def test_ids_match_exactly_or_uniquely_once_made_plain(tmp_path, images, ids, expected):
    root = write_data(tmp_path / "d", ANIMALS, rows("bee", ids=ids), images)
    data = open_data(str(root))
    assert sorted(data.test_ids) == sorted(expected)
    for file, image_id in zip(data.test_files, data.test_ids, strict=True):
        names = [Path(file).stem.lower().lstrip("0"), Path(image_id).stem.lower().lstrip("0")]
        assert names[0].replace("_0", "_") == names[1].replace("_0", "_")
        assert "." not in image_id or "jpg" in image_id.lower() or Path(file).suffix == Path(image_id).suffix


def test_images_that_differ_by_their_ending_match_ids_in_another_case():
    ids = match_ids(["test/a.png", "test/a.jpg", "test/b.jpg"], {"A.JPG", "A.PNG", "B"})
    assert ids == {"test/a.png": "A.PNG", "test/a.jpg": "A.JPG", "test/b.jpg": "B"}


@pytest.mark.parametrize("ids", [["1", "2"], ["01.png", "1"], ["001", "01"]])
def test_ids_that_match_several_images_are_refused_beside_image_names(tmp_path, ids):
    root = write_data(tmp_path / "d", ANIMALS, rows("bee", ids=ids), ["1.png", "1.jpg", "3.png"])
    with pytest.raises(UserError) as refusal:
        open_data(str(root))
    assert "have no test image" in str(refusal.value) and "--template" in str(refusal.value)
    assert "the images are named '1.jpg', '1.png', '3.png'" in str(refusal.value)


def test_images_that_differ_by_their_ending_are_two_ids_without_a_template_too(tmp_path):
    data = open_data(str(write_data(tmp_path / "d", ANIMALS, None, ["1.png", "1.jpg"])))
    assert data.test_ids == ["1.jpg", "1.png"]


def test_images_of_equal_names_in_several_folders_are_told_apart_by_their_folder(tmp_path):
    files = ["test/a/1.png", "test/b/1.png", "test/b/2.png"]
    assert name_test_images(tmp_path, files) == ["a/1", "b/1", "b/2"]
    assert name_test_images(tmp_path, files, {"b/1.png", "a/1.png", "2"}) == ["a/1.png", "b/1.png", "2"]
    assert match_ids(files, {"1", "1.png"}) == {}


def test_the_template_is_found_above_the_root_if_it_lists_the_test_images(tmp_path):
    root = write_data(tmp_path / "up" / "d", ANIMALS)
    (root.parent / "sample_submission.csv").write_text(rows("bee"))
    (root.parent / "other_template.csv").write_text(rows("bee", ids=["x", "y"]))
    data = open_data(str(root))
    said = "\n".join(describe_layout(data))
    assert "sample_submission.csv in the folder above lists exactly the 6 test images" in said
    assert "../other_template.csv (lists other images)" in said
    (root / "sample_submission.csv").write_text(rows("wolf"))
    assert open_data(str(root)).template_path == root / "sample_submission.csv"


@pytest.mark.parametrize(
    ("name", "is_template"),
    [
        *((name, True) for name in ("sample_submission.csv", "SampleSubmission.csv", "submissionSample.csv")),
        *((name, True) for name in ("samplesubmission.csv.zip", "samples.tsv", "My Template.csv.gz")),
        *((name, False) for name in ("train_upsampled.csv", "train_resampled.csv", "subsample.csv")),
        *((name, False) for name in ("sampled.csv", "DownSampler.csv", "sample_submission.txt", "sample.zip")),
    ],
)
def test_a_template_has_the_word_sample_in_its_name(name, is_template):
    assert choose_templates([name]) == [name] * is_template


def test_two_templates_above_that_both_fit_are_refused(tmp_path):
    root = write_data(tmp_path / "up" / "d", ANIMALS)
    for name in ("template.csv", "sample.csv"):
        (root.parent / name).write_text(rows("bee"))
    with pytest.raises(UserError, match="choose one with --template"):
        open_data(str(root))


def test_the_template_can_be_given(tmp_path, capsys):
    root = write_data(tmp_path / "d", ANIMALS, rows("bee"))
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "mine.tsv").write_text(rows("wolf").replace(",", "\t"))
    main([str(root), "--template", str(tmp_path / "far" / "mine.tsv")])
    out = capsys.readouterr().out
    assert f"mine.tsv in {(tmp_path / 'far').resolve()} lists exactly" in out
    assert "labels      written as class names, as in mine.tsv" in out


# from end to end

CASES = {  # folders, template, test images, the labels that the csv may hold
    "names": (ANIMALS, rows("bee", "file,species"), ANIMALS),
    "one_based": (NUMBERED, rows("1"), NUMBERED),
    "one_based zeros": (NUMBERED, rows("0"), NUMBERED),
    "one_based_without_template": (NUMBERED, None, NUMBERED),
    "semicolons": (ANIMALS, rows("lion").replace(",", ";"), ANIMALS),
}


def predicted_labels(out: Path) -> dict[str, int]:
    predictions = Predictions.load(out)
    return dict(zip(predictions.test_ids.tolist(), predictions.test_logits.argmax(1).tolist(), strict=True))


def check(out: Path, template: Path) -> int:
    try:
        check_csv([str(out / "submission.csv"), "--template", str(template)])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize("case", CASES)
def test_a_run_writes_the_labels_as_the_template_does(case, tmp_path, checkpoints, finetune):
    folders, template, words = CASES[case]
    root = write_data(tmp_path / "d", folders, template, per_class=4)
    out = finetune(root, checkpoints("convnext"), num_train_epochs=1)
    separator = ";" if case == "semicolons" else ","
    lines = [line.split(separator) for line in (out / "submission.csv").read_text().splitlines()]
    assert lines[0] == ((template or "image_id,label").splitlines()[0]).split(separator)
    labels = predicted_labels(out)
    assert lines[1:] == [[i, words[labels[i]]] for i in "012345"]
    if template:
        assert check(out, root / "sample_submission.csv") == 0


def test_a_run_writes_wnids_where_the_template_does(tmp_path, checkpoints, finetune):
    root = write_data(tmp_path / "d", WNIDS, rows("n01", "Id,Prediction"), per_class=4)
    (root / "wnids.txt").write_text("\n".join(WNIDS))
    out = finetune(root, checkpoints("convnext"), num_train_epochs=1)
    labels = predicted_labels(out)
    lines = (out / "submission.csv").read_text().splitlines()
    assert lines == ["Id,Prediction", *(f"{i},{WNIDS[labels[i]]}" for i in "012345")]
    assert check(out, root / "sample_submission.csv") == 0


def temperature_of(out: Path) -> float:
    return json.loads((out / "metrics.json").read_text())["calibration"]["temperature"]


@pytest.mark.parametrize(
    ("folders", "header", "cells", "columns"),
    [
        (ANIMALS, "id,wolf,bee,lion", "0.33,0.33,0.33", [2, 0, 1]),
        (["0", "1"], "id,label", "0.5", [1]),
    ],
)
def test_a_run_writes_calibrated_probabilities(folders, header, cells, columns, tmp_path, checkpoints, finetune):
    root = write_data(tmp_path / "d", folders, rows(cells, header), per_class=4)
    out = finetune(root, checkpoints("convnext"), num_train_epochs=1)
    lines = [line.split(",") for line in (out / "submission.csv").read_text().splitlines()]
    assert lines[0] == header.split(",") and [line[0] for line in lines[1:]] == list("012345")
    predictions = Predictions.load(out)
    logits = dict(zip(predictions.test_ids.tolist(), predictions.test_logits, strict=True))
    expected = softmax(np.array([logits[i] for i in "012345"], dtype=np.float64) / temperature_of(out), axis=1)
    assert np.allclose(np.array([line[1:] for line in lines[1:]], dtype=float), expected[:, columns], atol=1e-8)
    assert check(out, root / "sample_submission.csv") == 0


def test_a_run_finds_the_template_in_the_folder_above(tmp_path, checkpoints, finetune):
    root = write_data(tmp_path / "up" / "dataset", ["0", "1", "2"], per_class=4)
    (root.parent / "sample_submission.csv").write_text(rows("0", "ID,Label", ids="543210"))
    out = finetune(root.parent, checkpoints("convnext"), num_train_epochs=1)
    assert "sample_submission.csv in the folder above" in (out / "run.log").read_text()
    lines = [line.split(",") for line in (out / "submission.csv").read_text().splitlines()]
    assert lines[0] == ["ID", "Label"] and [line[0] for line in lines[1:]] == list("543210")
    assert check(out, root.parent / "sample_submission.csv") == 0


def test_a_run_refuses_before_training_what_the_template_does_not_decide(tmp_path, finetune, capsys):
    root = write_data(tmp_path / "d", ANIMALS, rows("0"), per_class=4)
    with pytest.raises(SystemExit):
        finetune(root, "no model is loaded")
    assert "--submission_labels index, folder, name, wnid or probability" in capsys.readouterr().err


def test_probabilities_asked_for_without_a_template_have_a_column_for_each_class(tmp_path, checkpoints, finetune):
    root = write_data(tmp_path / "d", ANIMALS, per_class=4)
    out = finetune(root, checkpoints("convnext"), num_train_epochs=1, submission_labels="probability")
    lines = [line.split(",") for line in (out / "submission.csv").read_text().splitlines()]
    assert lines[0] == ["image_id", *ANIMALS]
    assert all(abs(sum(map(float, line[1:])) - 1) < 1e-8 for line in lines[1:])


def test_a_run_of_seeds_submits_the_calibrated_probabilities_of_what_it_chooses(tmp_path, checkpoints, finetune):
    from finetune_vit import main as run

    root = write_data(tmp_path / "d", ANIMALS, rows("0.3,0.3,0.4", "id,lion,wolf,bee"), per_class=4)
    out, recipe = tmp_path / "out", str(tmp_path / "tiny.yaml")
    words = ["--data_dir", root, "--model_name_or_path", checkpoints("convnext"), "--output_dir", out]
    run([recipe, *map(str, words), "--num_train_epochs", "1", "--seeds", "1", "2"])
    lines = [line.split(",") for line in (out / "submission.csv").read_text().splitlines()]
    assert lines[0] == ["id", "lion", "wolf", "bee"]
    source = json.loads((out / "metrics.json").read_text())["submission"]["from"]
    if source == "ensemble":
        scores = average_probabilities([Predictions.load(out / f"seed-{seed}").test_logits for seed in (1, 2)])
        validated = average_probabilities(
            [Predictions.load(out / f"seed-{seed}").validation_logits for seed in (1, 2)]
        )
    else:
        chosen = Predictions.load(out if source == "soup" else out / source.replace(" ", "-"))
        scores, validated = chosen.test_logits, chosen.validation_logits
    temperature = fit_temperature(validated.astype(float), Predictions.load(out).validation_labels)
    expected = softmax(scores.astype(float) / temperature, axis=1)[:, [1, 2, 0]]
    assert np.allclose(np.array([line[1:] for line in lines[1:]], dtype=float), expected, atol=1e-8)


def test_classes_without_numbers_or_template_are_counted_in_natural_order(tmp_path):
    data = open_data(str(write_data(tmp_path / "d", ANIMALS)))
    assert list(form_of(data).words) == ["0", "1", "2"]
    assert "labels      written as integers 0 to 2" in "\n".join(describe_layout(data))
