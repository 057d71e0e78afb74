"""The check of a csv decides from the template and the class list how labels are written, and judges by it."""

import gzip
import io
import os
import zipfile
from pathlib import Path

import pytest

from transfer.data import labels
from transfer.data.labels import read_template
from transfer.submission import checker
from transfer.submission.__main__ import main
from transfer.submission.checker import find_faults

IDS = "abcdef"
WNIDS = ["n03", "n01", "n02"]
NAMES = {"wnids.txt": "n03\nn01\nn02\n", "words.txt": "n03\ta bee, bee\nn01\ta lion\nn02\ta wolf\n"}
WORDS = ("id,label", WNIDS, NAMES)
DATA = {  # template's rows after the header, header, folders of the classes, other files
    "index": ("0", "id,label", ["n03", "n01", "n02"], {"wnids.txt": "n03\nn01\nn02\n"}),
    "wnids": ("n01", "id,label", ["n03", "n01", "n02"], {"wnids.txt": "n03\nn01\nn02\n"}),
    "words": ("a bee", *WORDS),
    "words by index": ("0", *WORDS),
    "words by wnid": ("n01", *WORDS),
    "accents": ("caf\u00e9", "id,label", ["caf\u00e9", "th\u00e9"], {}),
    "commas": ('"bee, wild"', "id,label", ["bee, wild", "lion"], {}),
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


def write_case(root: Path, case: str, ids=IDS) -> Path:
    """The template of a case beside its data, of which only names are read."""
    root.mkdir(parents=True)
    cells, header, folders, files = DATA[case]
    for folder in folders:
        (root / "train" / folder).mkdir(parents=True)
    for name, text in files.items():
        (root / name).write_text(text)
    if folders:
        (root / "test").mkdir()
        for image_id in ids:
            (root / "test" / f"{image_id.removesuffix('.jpg')}.jpg").touch()
    separator = ";" if ";" in header else ","
    template = root / "sample_submission.csv"
    template.write_text("\n".join([header, *(f"{i}{separator}{cells}" for i in ids)]) + "\n")
    return template


def judge(tmp_path, capsys, case: str, content: str | bytes, ids=IDS) -> str:
    """What the command prints about a csv: "" if it is right."""
    template = write_case(tmp_path / "data", case, ids)
    path = tmp_path / "submission.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    try:
        main([str(path), "--template", str(template)])
    except SystemExit as end:
        assert end.code == 2
        err = capsys.readouterr().err
        assert err and all(line.startswith("error: ") for line in err.splitlines())
        return err
    assert capsys.readouterr().out.startswith(f"ok: {len(ids)} rows")
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
    ("index", "", "label '' is blank or a missing value"),
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
    ("names", "", "label '' is blank or a missing value"),
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
    ("columns", "nan,0.5,0.5", "value 'nan' is blank or a missing value"),
    ("columns", "bee,0,0", "value 'bee' is not a probability from 0 to 1"),
    ("columns", "0.5,0.5", "has 3 columns, not 4"),
    ("columns", "bee", "has 2 columns, not 4"),
    ("one", "0.7", None),
    ("one", "1", None),
    ("one", "1.5", "value '1.5' is not a probability from 0 to 1"),
    ("one", "inf", "value 'inf' is not a probability from 0 to 1"),
    ("one", "0.5,0.5", "has 3 columns, not 2"),
    ("alone", "99", "the classes are unknown, since no dataset lies beside"),
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
    if fault and "columns" not in fault and case != "alone":
        assert len(said.splitlines()) == 1 and "6 in all" in said


# Whole files, as programs and people leave them


def rows(cells: str | list[str], ids=IDS, header: str = "id,label", separator: str = ",") -> str:
    """A csv with these cells after each id, or with the same in every row."""
    each = [cells] * len(ids) if isinstance(cells, str) else cells
    return "\n".join([header, *(f"{i}{separator}{cell}" for i, cell in zip(ids, each, strict=True))]) + "\n"


def packed(**files: str) -> bytes:
    """A zip of files, whose names end in .csv unless they have an ending."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(name + ".csv" * ("." not in name), text)
    return content.getvalue()


CYCLE = ["0", "1", "2", "2", "1", "0"]
GOOD = rows(CYCLE)
LINES = GOOD.split()
NAMED = rows("bee", header="file,species")
COLUMNS = "id,lion,bee,wolf"
PROBABLE = rows("0.2,0.3,0.5", header=COLUMNS)
JPG = [f"{i}.jpg" for i in IDS]
ENDINGS = ("index", JPG)
ZEROS = ("index", ["007", "008", "010", "100"])
EXPONENTS = ("index", ["1e5", "2e5", "17"])
LONG = ("index", ["123456789012345678", "223456789012345678", "5"])
DATES = ("index", ["1-2", "MAR3", "a"])
LOOKS = ("index", ["NaN", "1e5", "007"])
ACCENTS = ("accents", IDS)
COMMAS = ("commas", IDS)
PACKED_BY_A_MAC = {"out/a": GOOD, "__MACOSX/out/._a.csv": "\0", "out/notes.txt": "mine"}
WORKBOOK = {"[Content_Types].xml": "", "xl/a.xml": ""}
EUROPEAN = rows("0,2;0,3;0,5", header="id;lion;bee;wolf", separator=";")

FILES = [  # what it is, the template and its data, the file, a part of each line that is expected
    # right
    ("as a run writes it", "index", GOOD),
    ("rows in another order", "index", rows(CYCLE, IDS[::-1])),
    ("a byte-order mark", "index", "\ufeff" + GOOD),
    ("Windows line ends", "index", GOOD.replace("\n", "\r\n")),
    ("line ends of an old Mac", "index", GOOD.replace("\n", "\r")),
    ("blank lines at the end", "index", GOOD + "\n\n"),
    ("no line end at the end", "index", GOOD.strip()),
    ("every cell in quotes", "index", "\n".join('"{}","{}"'.format(*line.split(",")) for line in LINES)),
    ("a zip", "index", packed(submission=GOOD)),
    ("a zip by a Mac", "index", packed(**PACKED_BY_A_MAC)),
    ("a gz", "index", gzip.compress(GOOD.encode())),
    ("UTF-16", "names", NAMED.encode("utf-16")),
    ("UTF-16, the other way", "index", b"\xfe\xff" + GOOD.encode("utf-16-be")),
    ("UTF-16 without a mark", "index", GOOD.encode("utf-16-le")),
    ("class names", "names", NAMED),
    ("class names that contain commas", COMMAS, rows('"bee, wild"')),
    ("wnids", "wnids", rows("n02")),
    ("numbers from 1", "one_based", rows(["1", "2", "3"] * 2)),
    ("probabilities", "columns", PROBABLE),
    ("probabilities with exponents", "columns", rows("1E-05,9.9998e-01,1e-5", header=COLUMNS)),
    ("the probability of one class", "one", rows("0.97")),
    ("semicolons, as the template has", "semicolons", rows("bee", header="file;species", separator=";")),
    ("ids that look like other things", LOOKS, rows("0", LOOKS[1])),
    # the file
    ("nothing", "index", "", "is empty"),
    ("a header alone", "index", "id,label\n", "6 ids are missing"),
    ("a picture", "index", b"\x89PNG\r\n\x1a\n\0\0", "is not a text file"),
    ("a workbook", "index", packed(**WORKBOOK), "is an Excel workbook; save it as CSV (UTF-8)"),
    ("a zip of two", "index", packed(a=GOOD, b=GOOD), "has 2 csv files in it ('a.csv', 'b.csv'); pack exactly one"),
    ("a zip without a csv", "index", packed(**{"a.json": "{}"}), "has 0 csv files in it ('a.json'); pack exactly one"),
    ("a gz cut short", "index", gzip.compress(GOOD.encode())[:-9], "cannot be unpacked"),
    ("a zip cut short", "index", packed(a=GOOD)[:40], "cannot be unpacked"),
    ("Latin-1", ACCENTS, rows("caf\u00e9").encode("latin-1"), "is not UTF-8 text, but Windows-1252, Latin-1 or"),
    # separators and columns
    ("semicolons", "index", GOOD.replace(",", ";"), "columns are separated by ';', not by ','"),
    ("tabs", "index", GOOD.replace(",", "\t"), "columns are separated by '\\t', not by ','"),
    ("spaces", "index", GOOD.replace(",", " "), "columns are separated by ' ', not by ','"),
    ("commas", "semicolons", NAMED, "columns are separated by ',', not by ';'"),
    (
        "a European spreadsheet",
        "columns",
        EUROPEAN,
        "separated by ';', not by ','",
        "'0,2' has a decimal comma; write",
    ),
    ("decimal commas", "columns", rows("0,2,0,3,0,5", header=COLUMNS), "has 7 columns, not 4; is the comma a decimal"),
    ("lines in quotes", "index", "".join(f'"{line}"\n' for line in LINES), "every line as a whole is in quotes"),
    ("a pandas index", "index", "\n,".join(["," + LINES[0], *LINES[1:]]), "index=False"),
    ("a saved index", "index", "\n7,".join(["Unnamed: 0," + LINES[0], *LINES[1:]]), "the first column is extra"),
    ("row names of R", "index", "\n7,".join(LINES), "the first column is extra, probably row numbers"),
    ("one more column", "index", rows("0,9", header="id,label,x"), "columns that the template has not ('x'); remove"),
    ("separators at the ends", "index", GOOD.replace("\n", ",\n"), "rows end with ',', which makes an extra column"),
    ("rows of empty cells", "index", GOOD + ",\n,\n", "line 8: is a row of empty cells; remove it (2 in all"),
    ("names with commas", COMMAS, rows("bee, wild"), "has 3 columns, not 2; put names that contain ',' in quotes"),
    # the header
    ("no header", "index", "\n".join(LINES[1:]), "line 1: the header is missing: it must be 'id,label'"),
    ("a comment above the header", "index", "# mine\n\n" + GOOD, "the header is in line 3; remove what is above it"),
    (
        "a spreadsheet's first line",
        "semicolons",
        "sep=;\n" + NAMED.replace(",", ";"),
        "the header is in line 2; remove",
    ),
    ("a table of a run", "index", "epoch,loss\n1,2\n2,1\n", "the header is", "6 ids are missing", "2 ids are not in"),
    ("other case", "index", rows("0", header="ID,Label"), "'ID,Label', not 'id,label'; it differs in case, spaces or"),
    ("other words", "index", rows("0", header="file,class"), "line 1: the header is 'file,class', not 'id,label'"),
    ("swapped", "index", rows(list(IDS), "000000", "label,id"), "has another order: it is 'label,id', not 'id,label'"),
    ("classes in order", "columns", rows("1,0,0", header="id,bee,lion,wolf"), "not 'id,lion,bee,wolf'"),
    ("a label for probabilities", "columns", rows("bee"), "is 'id,label', not 'id,lion", "has 2 columns, not 4 (6 in"),
    # ids
    ("with an ending", "index", rows("0", JPG), "6 ids differ in folder or extension ('a.jpg' for 'a', "),
    ("without their ending", ENDINGS, GOOD, "6 ids differ in folder or extension ('a' for 'a.jpg', "),
    ("with a folder", "names", rows("bee", [f"test/{i}" for i in JPG], "file,species"), "('test/a.jpg' for 'a', "),
    ("capitals", "index", rows("0", list("ABCDEF")), "6 ids differ in case or Unicode form ('A' for 'a'"),
    ("spaces around ids", "index", rows("0", [f" {i} " for i in IDS]), "6 ids have spaces or quotes around them"),
    ("quotes around ids", "index", rows("0", [f"'{i}'" for i in IDS]), "6 ids have spaces or quotes around them"),
    ("zeros lost", ZEROS, rows("0", ["7", "8", "10", "100"]), "3 ids have lost or gained leading zeros, as in a spre"),
    ("ids as floats", ("index", ["1", "2"]), rows("0", ["1.0", "2.0"]), "2 ids are written as other numbers, as in"),
    ("exponents lost", EXPONENTS, rows("0", ["100000", "2E+05", "17"]), "('100000' for '1e5', '2E+05' for '2e5')"),
    (
        "exponents",
        ("index", ["100000", "17"]),
        rows("0", ["1.0E+05", "17"]),
        "numbers, as in a spreadsheet ('1.0E+05'",
    ),
    ("digits lost", LONG, rows("0", ["1.23457E+17", "2.23457E+17", "5"]), "('1.23457E+17' for '123456789012345678', "),
    ("digits made zeros", LONG, rows("0", [f"{n}23456789012345000" for n in "12"] + ["5"]), "2 ids have lost digits"),
    ("dates", DATES, rows("0", ["2-Jan", "3-Mar", "a"]), "2 ids have become dates, as in a spreadsheet ('2-Jan', "),
    ("a missing value", LOOKS, rows("0", ["", "1e5", "007"]), "1 ids are blank or missing values; with pandas, read"),
    ("row numbers", "index", rows("0", list("012345")), "the ids are row numbers ('0', '1', '2', ...), not ids ('a'"),
    ("ids of other data", "index", rows("0", list("uvwxyz")), "6 ids are missing", "6 ids are not in the template"),
    ("half of the rows", "index", rows("0", IDS[:3]), "3 ids are missing ('d', 'e', 'f')"),
    ("too many rows", "index", rows("0", IDS + "xy"), "2 ids are not in the template ('x', 'y')"),
    ("twice", "index", GOOD + GOOD, "1 ids are not in the template ('id')", "6 ids are repeated ('a', 'b'", "'label'"),
    # labels
    ("blank labels", "index", rows(["0", "", "", "1", "2", ""]), "line 3: label '' is blank or a missing value (3 in"),
    ("missing labels", "names", rows("NaN", header="file,species"), "label 'NaN' is blank or a missing value"),
    ("floats", "index", rows(["0.0", "1.0", "2.0"] * 2), "line 2: label '0.0' is not an integer, but a float; with"),
    ("floats with commas", "index", rows('"1,0"'), "label '1,0' is not an integer, but a float"),
    ("zeros before labels", "index", rows("02"), "label '02' is not an integer; it has a sign or leading zeros"),
    ("spaces before labels", "index", rows(" 2"), "label ' 2' has spaces or quotes around it (6 in all"),
    ("a probability for labels", "index", rows("0.93"), "label '0.93' is not an integer, but a fraction"),
    (
        "tensors",
        "index",
        rows("tensor(2)"),
        "label 'tensor(2)' is not an integer, but an array or a tensor; write its",
    ),
    ("class names for integers", "words by index", rows("a bee"), "is not an integer, but one of the class names"),
    ("wnids for integers", "index", rows("n01"), "label 'n01' is not an integer, but one of the wnids"),
    ("wnids for names", "words", rows("n01"), "the class names ('a bee', 'a lion', 'a wolf'), but one of the wnids"),
    ("names for wnids", "words by wnid", rows("a bee"), "the wnids ('n03', 'n01', 'n02'), but one of the class names"),
    ("integers for names", "names", rows("2", header="file,species"), "but one of the integers 0 to 2"),
    ("integers for wnids", "wnids", rows("2"), "label '2' is not one of the wnids ('n03', 'n01', 'n02'), but one of"),
    ("names in other case", "names", rows("Bee", header="file,species"), "it differs in case, spaces or signs only"),
    ("names of other classes", "names", rows("tiger", header="file,species"), "label 'tiger' is not one of the class"),
    ("out of range", "index", rows(["0", "7", "-1", "1", "2", "9"]), "label 7 is out of range 0 to 2 (3 in all; line"),
    ("from 1 for 0", "index", rows(["1", "2", "3"] * 2), "range 0 to 2, but all labels fit 1 to 3: they may be shift"),
    ("from 0 for 1", "one_based", rows(CYCLE), "label 0 is out of range 1 to 3, but all labels fit 0 to 2: they"),
    # probabilities
    ("sums below one", "columns", rows("0.3,0.3,0.3", header=COLUMNS), "the sum 0.9 of the probabilities is not 1 (6"),
    (
        "percent",
        "columns",
        rows("20,30,50", header=COLUMNS),
        "may be a percentage: the sums are 100, so divide by 100",
    ),
    ("percent signs", "one", rows("97%"), "value '97%' is not a probability from 0 to 1, but may be a percentage"),
    ("a decimal comma", "one", rows('"0,97"'), "value '0,97' has a decimal comma; write a point"),
    ("logits", "columns", rows("2.5,-1,-200", header=COLUMNS), "value '2.5' is not a probability from 0 to 1"),
    ("missing probabilities", "columns", rows(",,", header=COLUMNS), "value '' is blank or a missing value"),
]


@pytest.mark.parametrize(
    ("case", "content", "faults"), [(c, f, e) for _, c, f, *e in FILES], ids=[r[0] for r in FILES]
)
def test_each_kind_of_file_is_judged_and_each_fault_is_named_once(case, content, faults, tmp_path, capsys):
    case, ids = (case, IDS) if isinstance(case, str) else case
    said = judge(tmp_path, capsys, case, content, ids).splitlines()
    assert len(said) == len(faults), said
    assert all(fault in line for fault, line in zip(faults, said, strict=True)), said


def test_there_are_many_kinds_of_files():
    assert len({name for name, *_ in FILES}) == len(FILES) >= 58


def test_text_that_is_read_but_is_not_utf_8_is_warned_of(tmp_path, capsys):
    template = write_case(tmp_path / "data", "index")
    (tmp_path / "a.csv").write_bytes(GOOD.encode("utf-16"))
    main([str(tmp_path / "a.csv"), "--template", str(template)])
    out, err = capsys.readouterr()
    assert out.startswith("ok: 6 rows") and "is UTF-16 text; save it as UTF-8 if" in err


def test_a_template_may_be_packed_and_a_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch, capsys):
    template, csv = tmp_path / "sample_submission.csv.zip", tmp_path / "a.csv.gz"
    template.write_bytes(packed(sample_submission=GOOD))
    csv.write_bytes(gzip.compress(GOOD.encode()))
    arguments = [str(csv), "--template", str(template), "--num_classes", "3"]
    main(arguments)
    assert "ok: 6 rows" in capsys.readouterr().out
    monkeypatch.setattr(labels, "MOST_CSV_BYTES", len(GOOD) - 1)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "give the csv itself" in capsys.readouterr().err


@pytest.mark.parametrize("number", [2, 4])
def test_a_number_of_classes_that_contradicts_the_columns_of_the_template_is_refused(number, tmp_path, capsys):
    template = write_case(tmp_path / "data", "columns")
    with pytest.raises(SystemExit):
        main([str(template), "--template", str(template), "--num_classes", str(number)])
    assert "has 3 label columns; leave it out" in capsys.readouterr().err


def test_5000_wrong_rows_are_a_few_lines_with_counts_and_examples(tmp_path, capsys):
    ids = [f"i{n}" for n in range(5000)]
    template = tmp_path / "sample_submission.csv"
    template.write_text("id,label\n" + "".join(f"{i},0\n" for i in ids))
    wrong = ["1.0", "200", "x", "-3", "7,7", "", "0.3", "01", " 4", "n01443537"]
    cells = [f"{i},{wrong[n % len(wrong)]}" for n, i in enumerate(ids[:4000])]
    cells += [f"other{n},{n}" for n in range(500)] + [f"i{n},1" for n in range(500)]
    (tmp_path / "a.csv").write_text("Id,label\n" + "\n".join(cells) + "\n")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "a.csv"), "--template", str(template), "--num_classes", "100"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 13 and all(len(line) < 300 for line in lines)
    said = "\n".join(lines)
    for fault in (
        "line 6: has 3 columns, not 2 (400 in all; line 16: has 3 columns; line 26: has 3 columns; ...)",
        "1000 ids are missing ('i4000', 'i4001', 'i4002', ...)",
        "500 ids are not in the template ('other0', 'other1', 'other10', ...)",
        "500 ids are repeated ('i0', 'i1', 'i2', ...)",
        "line 2: label '1.0' is not an integer, but a float; with pandas, convert the column with astype(int) "
        "(400 in all; line 12: label '1.0'; line 22: label '1.0'; ...)",
        "line 4: label 'x' is not an integer (400 in all",
    ):
        assert fault in said


def test_many_kinds_of_faults_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(checker, "MOST_LINES", 5)
    template = write_case(tmp_path / "data", "index")
    (tmp_path / "a.csv").write_text(
        "file,label\n" + rows(["x", "9", "1.0", "", "0.5", "01"], "abcdxy", "file,label")[11:]
    )
    faults = find_faults(tmp_path / "a.csv", read_template(template), 3)
    assert len(faults) == 5 and faults[-1] == "has 5 more kinds of faults"


def test_long_values_are_cut(tmp_path, capsys):
    names = [f"class {n}" for n in range(200)]
    template = write_case(tmp_path / "data", "alone")
    template.write_text(rows("0," * 199 + "0", header=f"id,{','.join(names)}"))
    (tmp_path / "a.csv").write_text(
        rows("9" * 5000 + ",0" * 199, header=f"id,{','.join(names[:150] + names[151:])},x")
    )
    with pytest.raises(SystemExit):
        main([str(tmp_path / "a.csv"), "--template", str(template)])
    lines = capsys.readouterr().err.splitlines()
    assert "the header is of 201 columns, not 201, and column 152 is 'class 151', not 'class 150'" in lines[0]
    assert len(lines) == 2 and max(len(line.replace(str(tmp_path), "")) for line in lines) < 300


def test_a_template_alone_leaves_labels_unchecked_and_asks_for_the_classes(tmp_path, capsys):
    template = write_case(tmp_path / "data", "alone")
    (tmp_path / "a.csv").write_text(GOOD.replace("f,", "g,"))
    arguments = [str(tmp_path / "a.csv"), "--template", str(template)]
    with pytest.raises(SystemExit) as end:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 3 and "1 ids are missing ('f')" in lines[0]
    assert "labels are not checked: the classes are unknown" in lines[2]
    assert "list them with --classes_file, or give --num_classes N" in lines[2]
    (tmp_path / "a.csv").write_text(GOOD)
    main([*arguments, "--num_classes", "3"])
    assert "ok: 6 rows" in capsys.readouterr().out


def test_folders_of_pictures_beside_a_template_are_not_taken_for_its_data(tmp_path, capsys):
    template = write_case(tmp_path / "downloads", "alone")
    for folder in ("holiday", "cats"):
        (tmp_path / "downloads" / folder).mkdir()
        (tmp_path / "downloads" / folder / "1.jpg").touch()
    main([str(template), "--template", str(template), "--num_classes", "10"])
    assert "ok: 6 rows" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(template), "--template", str(template)])
    assert "the classes are unknown" in capsys.readouterr().err


def test_a_template_in_a_folder_of_many_folders_is_checked_without_searching_each(tmp_path, monkeypatch, capsys):
    template = write_case(tmp_path / "downloads", "alone")
    for number in range(120):
        (tmp_path / "downloads" / f"project{number // 3}" / f"{number}" / "src").mkdir(parents=True)
    listed, scan = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or scan(folder))
    main([str(template), "--template", str(template), "--num_classes", "10"])
    assert "ok: 6 rows" in capsys.readouterr().out and len(listed) < 4 * 280  # folders


def test_classes_of_a_csv_beside_the_template_are_known(tmp_path, capsys):
    root = tmp_path / "data"
    for name in ("train_images/1.jpg", "train_images/2.jpg", *(f"test_images/{i}.jpg" for i in IDS)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "train.csv").write_text("image,label\n1.jpg,bee\n2.jpg,lion\n")
    (root / "sample_submission.csv").write_text(rows("bee"))
    for label, code in (("lion", 0), ("1", 2)):
        (tmp_path / "a.csv").write_text(rows(label))
        try:
            main([str(tmp_path / "a.csv"), "--template", str(root / "sample_submission.csv")])
            assert code == 0
        except SystemExit as end:
            assert end.code == code and "is not one of the class names ('bee', 'lion')" in capsys.readouterr().err


def test_the_classes_can_be_given_where_no_data_lie_beside(tmp_path, capsys):
    template = tmp_path / "t.csv"
    template.write_text("id,label\na,bee\n")
    (tmp_path / "classes.txt").write_text("bee\nlion\n")
    arguments = [str(template), "--template", str(template)]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "list them with --classes_file, or give --num_classes" in capsys.readouterr().err
    main([*arguments, "--classes_file", str(tmp_path / "classes.txt")])
    assert "ok: 1 rows" in capsys.readouterr().out


def test_the_way_labels_are_written_can_be_given(tmp_path, capsys):
    write_case(tmp_path / "data", "names")
    template = tmp_path / "data" / "sample_submission.csv"
    (tmp_path / "a.csv").write_text("file,species\n" + "".join(f"{i},2\n" for i in IDS))
    main([str(tmp_path / "a.csv"), "--template", str(template), "--submission_labels", "index"])
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
        main([str(template), "--template", str(template), *flags])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_classes_of_the_data_below_a_template_are_known(tmp_path, capsys):
    template = write_case(tmp_path / "up" / "dataset", "one_based")
    template = template.rename(tmp_path / "up" / template.name)
    for label, code in (("3", 0), ("0", 2)):
        (tmp_path / "a.csv").write_text("id,label\n" + "".join(f"{i},{label}\n" for i in IDS))
        try:
            main([str(tmp_path / "a.csv"), "--template", str(template)])
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
        main([str(root / "sample.csv"), "--template", str(root / "sample.csv")])
        assert ("warning" in capsys.readouterr().err) == warned
