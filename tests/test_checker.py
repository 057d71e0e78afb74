"""The check of a csv decides from the template and the class list how labels are written, and judges by it."""

from pathlib import Path

import pytest

from transfer import submission

IDS = "abcdef"
DATA = {  # template's rows after the header, header, folders of the classes, other files
    "index": ("0", "id,label", ["n03", "n01", "n02"], {"wnids.txt": "n03\nn01\nn02\n"}),
    "wnids": ("n01", "id,label", ["n03", "n01", "n02"], {"wnids.txt": "n03\nn01\nn02\n"}),
    "words": (
        "a bee",
        "id,label",
        ["n03", "n01", "n02"],
        {"wnids.txt": "n03\nn01\nn02\n", "words.txt": "n03\ta bee, bee\nn01\ta lion\nn02\ta wolf\n"},
    ),
    "names": ("bee", "file,species", ["bee", "lion", "wolf"], {}),
    "semicolons": ("bee", "file;species", ["bee", "lion", "wolf"], {}),
    "zero_based": ("0", "id,label", ["0", "1", "2"], {}),
    "one_based": ("1", "id,label", ["1", "2", "3"], {}),
    "zeros": ("0", "id,label", ["1", "2", "3"], {}),
    "gaps": ("0", "id,label", ["2", "5", "11"], {}),
    "columns": ("0.33,0.33,0.33", "id,lion,bee,wolf", ["bee", "lion", "wolf"], {}),
    "one": ("0.5", "id,label", ["0", "1"], {}),
    "alone": ("0", "id,label", [], {}),
    "columns alone": ("0.5,0.5", "id,cat,dog", [], {}),
    "one alone": ("0.5", "id,label", [], {}),
}


def write_case(root: Path, case: str) -> Path:
    """The template of a case beside its data, of which only names are read."""
    root.mkdir(parents=True)
    cells, header, folders, files = DATA[case]
    for folder in folders:
        (root / "train" / folder).mkdir(parents=True)
    for name, text in files.items():
        (root / name).write_text(text)
    if folders:
        (root / "test").mkdir()
        for image_id in IDS:
            (root / "test" / f"{image_id}.jpg").touch()
    separator = ";" if ";" in header else ","
    template = root / "sample_submission.csv"
    template.write_text("\n".join([header, *(f"{i}{separator}{cells}" for i in IDS)]) + "\n")
    return template


def judge(tmp_path, capsys, case: str, text: str) -> str:
    """What the command prints about a csv: "" if it is right."""
    template = write_case(tmp_path / "data", case)
    path = tmp_path / "submission.csv"
    path.write_text(text)
    try:
        submission.main([str(path), "--template", str(template)])
    except SystemExit as end:
        assert end.code == 2
        err = capsys.readouterr().err
        assert err and all(line.startswith("error: ") for line in err.splitlines())
        return err
    assert capsys.readouterr().out.startswith("ok: 6 rows")
    return ""


# case, cells after the id (of every row, or of each), and a part of every fault that is expected
TABLE = [
    ("index", "0", None),
    ("index", "0 1 2 2 1 0", None),
    ("index", "3", "label 3 is out of range 0 to 2"),
    ("index", "-1", "label -1 is out of range 0 to 2"),
    ("index", "1.0", "label '1.0' is not an integer"),
    ("index", "01", "label '01' is not an integer"),
    ("index", "n01", "label 'n01' is not an integer"),
    ("index", "", "label '' is not an integer"),
    ("wnids", "n03", None),
    ("wnids", "n03 n01 n02 n02 n01 n03", None),
    ("wnids", "0", "label '0' is not one of the wnids ('n03', 'n01', 'n02')"),
    ("wnids", "n04", "label 'n04' is not one of the wnids"),
    ("wnids", "N01", "label 'N01' is not one of the wnids"),
    ("words", "a_bee", "label 'a_bee' is not one of the class names ('a bee', 'a lion', 'a wolf')"),
    ("words", "n01", "label 'n01' is not one of the class names"),
    ("words", "0", "label '0' is not one of the class names"),
    ("names", "bee", None),
    ("names", "bee wolf lion lion wolf bee", None),
    ("names", "0", "label '0' is not one of the class names ('bee', 'lion', 'wolf')"),
    ("names", "Bee", "label 'Bee' is not one of the class names"),
    ("names", "tiger", "label 'tiger' is not one of the class names"),
    ("names", "", "label '' is not one of the class names"),
    ("semicolons", "wolf", None),
    ("semicolons", "1", "label '1' is not one of the class names"),
    ("zero_based", "2", None),
    ("zero_based", "3", "label 3 is out of range 0 to 2"),
    ("one_based", "1", None),
    ("one_based", "1 2 3 3 2 1", None),
    ("one_based", "0", "label 0 is out of range 1 to 3"),
    ("one_based", "4", "label 4 is out of range 1 to 3"),
    ("one_based", "2.0", "label '2.0' is not an integer"),
    ("zeros", "3", None),
    ("zeros", "0", "label 0 is out of range 1 to 3"),
    ("gaps", "11", None),
    ("gaps", "2 5 11 2 5 11", None),
    ("gaps", "0", "label 0 is not one of the folder numbers ('2', '5', '11')"),
    ("gaps", "3", "label 3 is not one of the folder numbers"),
    ("columns", "0.2,0.3,0.5", None),
    ("columns", "1,0,0", None),
    ("columns", "1e-12,0.9999,1e-4", None),
    ("columns", "0.3334,0.3333,0.3334", None),
    ("columns", "0.33,0.33,0.33", "the sum 0.99 of the probabilities is not 1"),
    ("columns", "0.5,0.3,0.3", "the sum 1.1 of the probabilities is not 1"),
    ("columns", "-0.1,0.6,0.5", "value '-0.1' is not a probability from 0 to 1"),
    ("columns", "2.1,-4,3", "value '2.1' is not a probability from 0 to 1"),
    ("columns", "nan,0.5,0.5", "value 'nan' is not a probability from 0 to 1"),
    ("columns", "bee,0,0", "value 'bee' is not a probability from 0 to 1"),
    ("columns", "0.5,0.5", "has 3 columns, not 4"),
    ("columns", "bee", "has 2 columns, not 4"),
    ("one", "0.7", None),
    ("one", "1", None),
    ("one", "1.5", "value '1.5' is not a probability from 0 to 1"),
    ("one", "inf", "value 'inf' is not a probability from 0 to 1"),
    ("one", "0.5,0.5", "has 3 columns, not 2"),
    ("alone", "99", None),
    ("alone", "100", "label 100 is out of range 0 to 99"),
    ("columns alone", "0.4,0.6", None),
    ("columns alone", "0.4,0.5", "the sum 0.9 of the probabilities is not 1"),
    ("one alone", "0.25", None),
    ("one alone", "-1", "value '-1' is not a probability from 0 to 1"),
]


@pytest.mark.parametrize(("case", "cells", "fault"), TABLE)
def test_each_csv_is_judged_by_the_words_of_its_template(case, cells, fault, tmp_path, capsys):
    header = DATA[case][1]
    separator = ";" if ";" in header else ","
    each = cells.split(" ") if " " in cells else [cells] * len(IDS)
    lines = [header, *(f"{i}{separator}{cell}" for i, cell in zip(IDS, each, strict=True))]
    said = judge(tmp_path, capsys, case, "\n".join(lines) + "\n")
    assert (fault in said) if fault else said == ""
    if fault and "columns" not in fault:
        assert len(said.splitlines()) == 1 and "6 in all" in said


WHOLE = [  # case, the csv, what is said
    ("names", "file,species\n" + "".join(f"{i},bee\n" for i in reversed(IDS)), None),
    ("names", "file;species\n" + "".join(f"{i};bee\n" for i in IDS), "columns are separated by ';', not by ','"),
    ("semicolons", "file,species\n" + "".join(f"{i},bee\n" for i in IDS), "columns are separated by ',', not by ';'"),
    ("names", "id,label\n" + "".join(f"{i},bee\n" for i in IDS), "the header is 'id,label', not 'file,species'"),
    ("names", ",file,species\n" + "".join(f"0,{i},bee\n" for i in IDS), "save with index=False"),
    ("names", "file,species\n" + "".join(f"{i}.jpg,bee\n" for i in IDS), "6 ids are not in the template"),
    ("names", "file,species\na,bee\n", "5 ids are missing ('b', 'c', 'd', ...)"),
    ("columns", "id,bee,lion,wolf\n" + "".join(f"{i},1,0,0\n" for i in IDS), "not 'id,lion,bee,wolf'"),
]


@pytest.mark.parametrize(("case", "text", "fault"), WHOLE)
def test_faults_of_a_whole_csv_are_named(case, text, fault, tmp_path, capsys):
    said = judge(tmp_path, capsys, case, text)
    assert (fault in said) if fault else said == ""
    assert len(said.splitlines()) <= 3


def test_5000_wrong_rows_are_a_few_lines_with_counts_and_examples(tmp_path, capsys):
    ids = [f"i{n}" for n in range(5000)]
    template = tmp_path / "sample_submission.csv"
    template.write_text("id,label\n" + "".join(f"{i},0\n" for i in ids))
    wrong = ["1.0", "200", "x", "-3", "7,7", ""]
    rows = [f"{i},{wrong[n % len(wrong)]}" for n, i in enumerate(ids[:4000])]
    rows += [f"other{n},{n}" for n in range(500)] + [f"i{n},1" for n in range(500)]
    (tmp_path / "a.csv").write_text("ID,label\n" + "\n".join(rows) + "\n")
    with pytest.raises(SystemExit):
        submission.main([str(tmp_path / "a.csv"), "--template", str(template)])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 25
    said = "\n".join(lines)
    assert "line 2: label '1.0' is not an integer (2000 in all; line 4: label 'x'; line 7: label ''; ...)" in said
    assert "line 6: has 3 columns, not 2 (666 in all; line 12: has 3 columns; line 18: has 3 columns; ...)" in said


def test_the_classes_can_be_given_where_no_data_lie_beside(tmp_path, capsys):
    template = tmp_path / "t.csv"
    template.write_text("id,label\na,bee\n")
    (tmp_path / "classes.txt").write_text("bee\nlion\n")
    arguments = [str(template), "--template", str(template)]
    with pytest.raises(SystemExit):
        submission.main(arguments)
    assert "list them with --classes_file, or give --num_classes" in capsys.readouterr().err
    submission.main([*arguments, "--classes_file", str(tmp_path / "classes.txt")])
    assert "ok: 1 rows" in capsys.readouterr().out


def test_the_way_labels_are_written_can_be_given(tmp_path, capsys):
    write_case(tmp_path / "data", "names")
    template = tmp_path / "data" / "sample_submission.csv"
    (tmp_path / "a.csv").write_text("file,species\n" + "".join(f"{i},2\n" for i in IDS))
    submission.main([str(tmp_path / "a.csv"), "--template", str(template), "--submission_labels", "index"])
    assert "labels written as integers 0 to 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--submission_labels", "name"], "list them with --classes_file"),
        (["--submission_labels", "name", "--num_classes", "3"], "cannot be combined"),
    ],
)
def test_the_way_labels_are_written_is_never_ignored(flags, message, tmp_path, capsys):
    template = write_case(tmp_path / "data", "alone")
    with pytest.raises(SystemExit) as end:
        submission.main([str(template), "--template", str(template), *flags])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_classes_of_the_data_below_a_template_are_known(tmp_path, capsys):
    template = write_case(tmp_path / "up" / "dataset", "one_based")
    template = template.rename(tmp_path / "up" / template.name)
    for label, code in (("3", 0), ("0", 2)):
        (tmp_path / "a.csv").write_text("id,label\n" + "".join(f"{i},{label}\n" for i in IDS))
        try:
            submission.main([str(tmp_path / "a.csv"), "--template", str(template)])
            assert code == 0
        except SystemExit as end:
            assert end.code == code


def test_only_the_competitions_balance_is_spoken_of(tmp_path, capsys):
    ids = [f"i{n}" for n in range(500)]
    for order, warned in (("", False), ("n03\nn01\nn02\n", True)):
        root = tmp_path / f"data{warned}"
        for name in ("n03", "n01", "n02") if warned else ("0", "1", "2"):
            (root / "train" / name).mkdir(parents=True)
        if order:
            (root / "wnids.txt").write_text(order)
        (root / "sample.csv").write_text("id,label\n" + "".join(f"{i},0\n" for i in ids))
        submission.main([str(root / "sample.csv"), "--template", str(root / "sample.csv")])
        assert ("warning" in capsys.readouterr().err) == warned
