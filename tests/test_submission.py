"""A submission is joined to its template by id, and every fault of a csv is found."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from transfer.data.labels import check_template, make_template, read_template, render_submission
from transfer.errors import UserError
from transfer.evaluation.predictions import balance_warning
from transfer.submission import digest_of
from transfer.submission.__main__ import main
from transfer.submission.checker import find_faults

ROOT = Path(__file__).parent.parent
IDS = ["zk3", "NaN", "007", "1e5", "null", "a b"]  # each one text, in no order


@pytest.fixture
def write(tmp_path):
    """write(text) is a file with these bytes."""

    def to_file(text: str | bytes, name: str = "a.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return to_file


def csv_of(ids, labels=None, header="image_id,label") -> str:
    labels = [0] * len(ids) if labels is None else labels
    return "\n".join([header, *(f"{i},{label}" for i, label in zip(ids, labels, strict=True))]) + "\n"


def template_of(ids=IDS) -> pd.DataFrame:
    return pd.DataFrame({"image_id": list(ids), "label": "0"}, dtype=str)


@pytest.mark.parametrize("header", ["image_id,label", "ID,Label"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_template_is_read_as_text_with_its_own_header(write, header, mark, end):
    table = read_template(write((mark + csv_of(IDS, header=header)).replace("\n", end)))
    assert list(table.columns) == header.split(",")
    assert table.iloc[:, 0].tolist() == IDS
    assert table.iloc[:, 1].tolist() == ["0"] * len(IDS)


@pytest.mark.parametrize(
    "text, fault",
    [
        ("", "is empty"),
        (b"\xff\xfe\0", "is not a text file"),
        (b"\x89PNG\r\n\x1a\n", "is not a text file"),
        ("image_id,label\na,\u4e02\n".encode("gbk"), "or its encoding is unknown; save it as UTF-8"),
        ("image_id,label\n", "has no rows"),
        ("image_id\na\n", "line 1 has 1 columns"),
        ("image_id,label,usage\na,0,x\n", "line 1 has 3 columns"),
        ("image_id,label\na,0\n,0\n", "without an id"),
        ("image_id,label\na,0\n  ,0\n", "without an id"),
        ("image_id,label\nb,0\na,0\na,0\n", "id 'a' appears twice"),
        ("image_id,label\na,0\nb,0,1\n", "line 3 has 3 columns"),
        ("image_id,label\na,0,1\nb,0,1\n", "line 2 has 3 columns"),
        ("image_id,label\na\nb,0\n", "line 2 has 1 columns"),
        ('image_id,label\n"a,0\nb,0\n', "line 3 has 1 columns"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_by_name(write, text, fault):
    path = write(text)
    with pytest.raises(UserError) as refusal:
        read_template(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and fault in message and "\n" not in message


def test_a_missing_template_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv: cannot be read"):
        read_template(tmp_path / "none.csv")


def test_a_template_must_list_exactly_the_test_images():
    path, template = Path("t.csv"), template_of("abcde")
    check_template(template, list("edcba"), path)
    with pytest.raises(UserError, match=r"t\.csv: .*4 ids have no test image \('b', 'c', 'd', \.\.\.\)$"):
        check_template(template, ["a"], path)
    with pytest.raises(UserError, match=r"2 test images have no row \('x', 'y'\)$"):
        check_template(template, list("yabcdex"), path)
    both = r"1 ids have no test image \('e'\) and 1 test images have no row \('x'\)"
    with pytest.raises(UserError, match=both):
        check_template(template, list("abcdx"), path)


def test_test_images_without_a_template_get_one_in_their_order():
    table = make_template(IDS)
    assert table.columns.tolist() == ["image_id", "label"]
    assert table["image_id"].tolist() == IDS
    check_template(table, IDS, Path("none"))


def test_labels_are_joined_by_id_and_never_by_position():
    label_of_id = {image_id: i for i, image_id in enumerate(sorted(IDS))}
    lines = render_submission(template_of(), label_of_id).decode().splitlines()
    assert lines == ["image_id,label", *(f"{i},{label_of_id[i]}" for i in IDS)]


def test_the_header_is_the_templates(write):
    template = read_template(write(csv_of(["7"], header="ID,Label")))
    assert render_submission(template, {"7": 3}) == b"ID,Label\n7,3\n"


def test_the_bytes_are_the_same_whatever_the_order_and_integer_type():
    label_of_id = {image_id: i for i, image_id in enumerate(IDS)}
    other = {image_id: np.int64(i) for image_id, i in reversed(label_of_id.items())}
    content = render_submission(template_of(), label_of_id)
    assert render_submission(template_of(), other) == content
    assert b"\r" not in content and content.endswith(b"\n")
    assert digest_of(content) == hashlib.sha256(content).hexdigest()


def test_labels_of_other_images_are_left_out():
    assert render_submission(template_of(["a"]), {"a": 1, "other": 2}) == b"image_id,label\na,1\n"


def test_a_label_that_is_a_fraction_is_not_cut_off():
    with pytest.raises(TypeError):
        render_submission(template_of(["a"]), {"a": 3.7})


def test_ids_without_a_label_are_refused_with_their_number():
    with pytest.raises(UserError, match=r"5 ids .* have no prediction \('zk3', 'NaN', '1e5', \.\.\.\)"):
        render_submission(template_of(), {"007": 1})


def test_what_is_written_has_no_fault_even_where_ids_need_quotes(write):
    ids = ["a,b", 'say "x"', "two\nlines", *IDS]
    content = render_submission(template_of(ids), dict.fromkeys(ids, 3))
    assert find_faults(write(content), template_of(ids), 4) == []


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_correct_csv_has_no_faults_in_any_row_order(write, end):
    assert find_faults(write(csv_of(IDS[::-1], range(6)).replace("\n", end)), template_of(), 6) == []


def test_quotes_a_mark_and_blank_lines_are_not_faults(write):
    assert find_faults(write('\ufeffimage_id,label\n"a","1"\n\nb,2\n\n'), template_of("ab"), 3) == []


@pytest.mark.parametrize(
    "body, faults",
    [
        ("a,1\nb,1\nc,1\n", ["1 ids are missing ('d')"]),
        ("d,1\n", ["3 ids are missing ('a', 'b', 'c')"]),
        ("", ["4 ids are missing ('a', 'b', 'c', ...)"]),
        ("a,1\nb,1\nc,1\nd,1\ny,1\nx,1\n", ["2 ids are not in the template ('x', 'y')"]),
        ("a,1\nb,1\nc,1\nd,1\na,1\n", ["1 ids are repeated ('a')"]),
        ("a,1\nb,1\nc,1\n d,1\n", ["1 ids have spaces or quotes around them (' d' for 'd')"]),
        ("a,1\nb,1,\nc,1\nd,1\n", ["line 3: has 3 columns, not 2"]),
        ("a,1\nb\nc,1\nd,1\n", ["line 3: has 1 columns, not 2"]),
        ("a,1\nb,4\nc,0\nd,3\n", ["line 3: label 4 is out of range 0 to 3"]),
        ("a,1\nb,0\nc,-1\nd,3\n", ["line 4: label -1 is out of range 0 to 3"]),
    ],
)
def test_each_fault_of_a_row_is_found(write, body, faults):
    assert find_faults(write("image_id,label\n" + body), template_of("abcd"), 4) == faults


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (
            ["3.0", "1e0", "2.", "1,0"],
            " is not an integer, but a float; with pandas, convert the column with astype(int)",
        ),
        (["03", "+3", "+0", "-0"], " is not an integer; it has a sign or leading zeros"),
        (["", "nan", "None", " "], " is blank or a missing value"),
        ([" 1", "1 ", "'1'"], " has spaces or quotes around it"),
        (["x", "1_0", "True", "١"], " is not an integer"),
    ],
)
def test_a_label_that_is_not_an_integer_is_a_fault_of_its_line(write, labels, kind):
    for label in labels:
        cell = f'"{label}"' if "," in label else label
        faults = find_faults(write(f"image_id,label\na,1\nb,{cell}\n"), template_of("ab"), 100)
        assert faults == [f"line 3: label {label!r}{kind}"]


def test_a_long_label_is_cut(write):
    faults = find_faults(write(f"image_id,label\na,1\nb,{'9' * 5000}\n"), template_of("ab"), 100)
    assert faults[0].endswith("999...' is not an integer") and len(faults[0]) < 100


def test_lines_are_counted_as_an_editor_counts_them(write):
    text = 'image_id,label\n\na,1\n"two\nlines",1\nb,x\n'  # lines 1 to 6
    assert find_faults(write(text), template_of(["a", "two\nlines", "b"]), 4) == [
        "line 6: label 'x' is not an integer"
    ]


@pytest.mark.parametrize(
    ("image_id", "changed"),
    [("NaN", ""), ("1e5", "100000.0"), ("007", "7"), ("null", ""), ("None", "nan"), ("True", "TRUE"), ("1E2", "100")],
)
def test_ids_that_look_like_values_stay_text(write, image_id, changed):
    template = read_template(write(csv_of([image_id, "b"]), "t.csv"))
    assert find_faults(write(csv_of(["b", image_id])), template, 1) == []
    (fault,) = find_faults(write(csv_of([changed, "b"])), template, 1)
    assert fault.startswith("1 ids ") and fault.endswith(f"({changed!r} for {image_id!r})")


def test_two_ids_that_a_spreadsheet_makes_one_are_not_guessed(write):
    template = read_template(write(csv_of(["1234567", "1234568", "5"]), "t.csv"))
    assert find_faults(write(csv_of(["1.23457E+06", "1.23457E+06", "5"])), template, 1) == [
        "1 ids have lost digits, as in a spreadsheet ('1.23457E+06')",
        "1 ids are repeated ('1.23457E+06')",
    ]
    assert find_faults(write(csv_of(["1234567", "1234569", "5"])), template, 1) == [
        "1 ids are missing ('1234568')",
        "1 ids are not in the template ('1234569')",
    ]


@pytest.mark.parametrize("header", ["ID,Label", "label,image_id", "image_id;label", "image_id,label,"])
def test_a_wrong_header_is_named_with_the_right_one(write, header):
    faults = find_faults(write(csv_of("ab", header=header)), template_of("ab"), 1)
    assert faults == [f"line 1: the header is {header!r}, not 'image_id,label'"]


def test_a_missing_header_does_not_hide_the_first_row(write):
    faults = find_faults(write("a,9\nb,0\n"), template_of("ab"), 1)
    assert faults == [
        "line 1: the header is missing: it must be 'image_id,label'",
        "line 1: label 9 is out of range 0 to 0",
    ]


def test_all_faults_are_found_at_once(write):
    text = "ID,label\na,1.5\nb\nx,1\nc,9\nc,1\n"
    assert find_faults(write(text), template_of("abcd"), 4) == [
        "line 1: the header is 'ID,label', not 'image_id,label'",
        "line 3: has 1 columns, not 2",
        "1 ids are missing ('d')",
        "1 ids are not in the template ('x')",
        "1 ids are repeated ('c')",
        "line 2: label '1.5' is not an integer, but a fraction; the template does not show probabilities",
        "line 5: label 9 is out of range 0 to 3",
    ]


def test_an_empty_csv_says_so(write):
    assert find_faults(write(""), template_of("ab"), 4) == ["is empty"]
    assert find_faults(write("\n\n"), template_of("ab"), 4) == ["is empty"]


@pytest.mark.parametrize(
    "content, fault",
    [
        (b"\x89PNG\r\n\x1a\n\xff", "is not a text file"),
        (b'image_id,label\n"' + bytes(200_000), "is not a text file"),
        (b'image_id,label\n"' + b"x" * 200_000, "is not a csv file"),
    ],
)
def test_a_file_that_is_not_a_csv_is_refused(write, content, fault):
    with pytest.raises(UserError, match=fault):
        find_faults(write(content), template_of("ab"), 4)


def predict(accuracy: float, num_classes: int, per_class: int, seed: int = 0) -> np.ndarray:
    """Labels as a classifier gives them: some classes are easier, and each is mistaken for a few others."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(num_classes), per_class)
    accuracies = rng.normal(accuracy, 0.1, num_classes).clip(0.05, 1)
    mistaken_for = rng.integers(0, num_classes, (num_classes, 5))
    wrong = rng.random(len(truth)) > accuracies[truth]
    return np.where(wrong, mistaken_for[truth, rng.integers(0, 5, len(truth))], truth)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_classes, per_class", [(100, 50), (100, 10), (10, 100)])
def test_a_usual_classifier_is_not_warned_of(num_classes, per_class, seed):
    for accuracy in (0.8, 0.95):
        assert balance_warning(predict(accuracy, num_classes, per_class, seed), num_classes) is None


def test_the_untouched_template_is_warned_of_in_numbers():
    warning = balance_warning([0] * 5000, 100)
    assert "label 0 occurs 5000 times" in warning
    assert "expected about 50" in warning and "99 of 100 labels never" in warning


def test_classes_that_are_never_predicted_are_warned_of():
    labels = np.repeat(np.arange(100), 50)
    assert "40 of 100 labels never" in balance_warning(np.where(labels < 40, 99, labels), 100)
    assert balance_warning(labels, 100) is None


def test_few_images_that_cannot_hit_every_class_are_not_warned_of():
    assert balance_warning(range(10), 100) is None


def test_no_predictions_are_not_warned_of():
    assert balance_warning([], 100) is None


@pytest.fixture
def good(write):
    """A csv and its template, without a fault."""
    template = write(csv_of(IDS), "template.csv")
    return write(csv_of(IDS, range(6))), template


def run(*arguments) -> int:
    """Exit code of the command, run in process."""
    try:
        main([str(a) for a in arguments])
    except SystemExit as end:
        return end.code or 0
    return 0


def test_a_good_csv_is_ok(good, capsys):
    csv, template = good
    assert run(csv, "--template", template, "--num_classes", 6) == 0
    out, err = capsys.readouterr()
    assert out.startswith("ok: 6 rows") and err == ""


def test_every_fault_is_a_line_of_its_own_and_the_exit_code_is_2(good, write, capsys):
    csv, template = write(csv_of(["zk3", "x"], ["1.5", 7])), good[1]
    assert run(csv, "--template", template, "--num_classes", 6) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 4
    assert all(line.startswith(f"error: {csv}: ") for line in lines)


def test_a_warning_does_not_change_the_exit_code(tmp_path, write, capsys):
    ids = [f"i{n}" for n in range(500)]
    template = write(csv_of(ids), "template.csv")
    write("".join(f"n{n}\n" for n in range(100)), "wnids.txt")
    assert run(template, "--template", template) == 0
    out, err = capsys.readouterr()
    assert out.startswith("ok: 500 rows")
    assert err.startswith("warning: ") and len(err.splitlines()) == 1


def test_the_number_of_classes_comes_from_the_wnids_beside_the_template(good, write, capsys):
    csv, template = good
    assert run(csv, "--template", template) == 2
    assert "the classes are unknown" in capsys.readouterr().err
    write("n01\r\nn02\r\nn03", "wnids.txt")
    assert run(csv, "--template", template) == 2
    assert "label 3 is out of range 0 to 2" in capsys.readouterr().err
    assert run(csv, "--template", template, "--num_classes", 6) == 0


def test_wnids_that_are_not_text_are_one_line_without_a_traceback(good, write, capsys):
    write(b"\xff\xfe\0", "wnids.txt")
    assert run(good[0], "--template", good[1]) == 2
    assert capsys.readouterr().err.endswith("wnids.txt: is not a text file\n")


@pytest.mark.parametrize("number", [0, -1])
def test_a_number_of_classes_below_one_is_refused(good, number, capsys):
    assert run(good[0], "--template", good[1], "--num_classes", number) == 2
    assert capsys.readouterr().err.startswith(f"error: --num_classes {number}: must be at least 1")


@pytest.mark.parametrize("absent", [0, 1])
def test_a_missing_file_is_one_line_without_a_traceback(good, absent, capsys):
    good[absent].unlink()
    assert run(good[0], "--template", good[1]) == 2
    assert capsys.readouterr().err == f"error: {good[absent]}: cannot be read (No such file or directory)\n"


def test_help_teaches_by_an_example(capsys):
    assert run("--help") == 0
    assert "example: python -m transfer.submission" in capsys.readouterr().out


def test_the_command_runs_as_a_module(good, tmp_path):
    command = [sys.executable, "-m", "transfer.submission", good[0], "--template", good[1]]
    command += ["--num_classes", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout[:10]) == (0, "ok: 6 rows")
    good[0].write_text("image_id,label\nzk3,1.5\n")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
