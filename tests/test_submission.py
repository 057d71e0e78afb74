"""The csv: joined by id, written whole, and every fault of a foreign one found."""

import random

import pytest

from transfer import UserError
from transfer.submission import balance_warning, find_faults, main, read_template, render_submission

IDS = ["b1", "007", "NaN", "1e5", "a,comma"]


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "submission_sample.csv"
    path.write_text('image_id,label\nb1,0\n007,0\nNaN,0\n1e5,0\n"a,comma",0\n')
    return path


def test_labels_are_joined_by_id_not_by_position(template):
    labels = {image_id: position for position, image_id in enumerate(reversed(IDS))}
    content = render_submission(read_template(template), labels).decode()
    assert content == 'image_id,label\nb1,4\n007,3\nNaN,2\n1e5,1\n"a,comma",0\n'


def test_the_header_is_the_templates_own(tmp_path):
    path = tmp_path / "template.csv"
    path.write_text("ID,Label\n10,0\n9,0\n")
    assert render_submission(read_template(path), {"9": 1, "10": 2}) == b"ID,Label\n10,2\n9,1\n"


def test_an_id_without_a_prediction_is_refused(template):
    with pytest.raises(UserError, match="1 ids of the template have no prediction \\('NaN'\\)"):
        render_submission(read_template(template), {i: 0 for i in IDS if i != "NaN"})


def check(tmp_path, template, text, classes=10):
    path = tmp_path / "mine.csv"
    path.write_text(text)
    return find_faults(path, read_template(template), classes)


def test_a_correct_file_has_no_fault_in_any_row_order(tmp_path, template):
    rows = ["b1,3", "007,0", "NaN,9", "1e5,2", '"a,comma",1']
    random.Random(0).shuffle(rows)
    assert check(tmp_path, template, "image_id,label\n" + "\n".join(rows)) == []


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("b1,3.0", "line 2: label '3.0' is not an integer"),
        ("b1,", "line 2: label '' is not an integer"),
        ("b1,1_0", "line 2: label '1_0' is not an integer"),
        ("b1, 1", "line 2: label ' 1' is not an integer"),
        ("b1,10", "line 2: label 10 is out of range 0 to 9"),
        ("b1,-1", "line 2: label -1 is out of range 0 to 9"),
        ("b1,1,1", "line 2: has 3 columns, not 2"),
        ("zz,1", "1 ids are not in the template ('zz')"),
        ("007,1", "1 ids are there more than once ('007')"),
    ],
)
def test_each_fault_of_a_row_is_named_with_its_line(row, fault, tmp_path, template):
    faults = check(tmp_path, template, f'image_id,label\n{row}\n007,0\nNaN,0\n1e5,0\n"a,comma",0\n')
    assert fault in faults


def test_every_fault_is_listed_not_only_the_first(tmp_path, template):
    faults = check(tmp_path, template, "id,label\n007,x\n007,99\nzz,0\n")
    assert faults == [
        "line 1: the header is 'id,label', not 'image_id,label'",
        "4 ids are missing ('b1', 'NaN', '1e5', ...)",
        "1 ids are not in the template ('zz')",
        "1 ids are there more than once ('007')",
        "line 2: label 'x' is not an integer",
        "line 3: label 99 is out of range 0 to 9",
    ]


def test_the_command_exits_with_2_and_a_line_a_fault(tmp_path, template, capsys):
    path = tmp_path / "mine.csv"
    path.write_text("image_id,label\nb1,0\n")
    with pytest.raises(SystemExit) as stop:
        main([str(path), "--template", str(template)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {path}: 4 ids are missing ('007', 'NaN', '1e5', ...)\n"


@pytest.mark.parametrize("missing", ["csv", "template"])
def test_the_command_names_a_file_that_is_not_there(missing, tmp_path, template, capsys):
    paths = {"csv": template, "template": template} | {missing: tmp_path / "absent.csv"}
    with pytest.raises(SystemExit) as stop:
        main([str(paths["csv"]), "--template", str(paths["template"])])
    assert stop.value.code == 2
    assert "absent.csv: cannot be read (No such file or directory)" in capsys.readouterr().err


def test_the_untouched_template_is_accepted_with_a_warning(tmp_path, capsys):
    path = tmp_path / "submission_sample.csv"
    path.write_text("image_id,label\n" + "".join(f"i{n},0\n" for n in range(500)))
    main([str(path), "--template", str(path)])
    out = capsys.readouterr()
    assert out.out.startswith("ok: 500 rows")
    assert out.err.startswith("warning: ") and "label 0 stands 500 times (equal classes: 5)" in out.err


@pytest.mark.parametrize("images", [500, 5000])
@pytest.mark.parametrize("accuracy", [0.6, 0.8, 1.0])
def test_an_imperfect_classifier_raises_no_warning(images, accuracy):
    draw = random.Random(0)
    # Mistakes prefer some classes, as they do in practice.
    labels = [i % 100 if draw.random() < accuracy else int(draw.betavariate(1, 2) * 100) for i in range(images)]
    assert balance_warning(labels, 100) is None
