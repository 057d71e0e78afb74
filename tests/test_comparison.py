"""Two runs on the same images: the paired test, its words, and what cannot be compared."""

import json
import re
from itertools import product

import numpy as np
import pytest
from conftest import WNIDS
from fabricated import write_history, write_run
from test_reporting import Page

from transfer.reporting import __main__ as command
from transfer.reporting import compare_hits, describe_comparison

FILES = [f"train/c/{i}.JPEG" for i in range(100)]
LABELS = np.arange(100) % 4
NAMES = ["a", "b", "c", "d"]


def run_with_mistakes(folder, wrong, files=FILES, labels=LABELS):
    logits = np.eye(4)[labels] * 5
    logits[list(wrong)] = np.roll(logits[list(wrong)], 1, axis=1)
    return write_run(folder, "nowhere", files, labels, NAMES, logits)


def say(first, second, capsys) -> list[str]:
    command.main([str(first), str(second)])
    return capsys.readouterr().out.splitlines()


def test_the_p_value_is_the_exact_binomial_on_images_that_one_run_alone_gets_right():
    first, second = np.ones(20, dtype=bool), np.ones(20, dtype=bool)
    first[:8], second[8] = False, False
    found = compare_hits(first, second)
    assert (found.first_only, found.second_only) == (1, 8)
    # Two-sided: of the 2^9 ways in which nine coins fall, those at least as uneven as 1 to 8.
    uneven = sum(sum(coins) in (0, 1, 8, 9) for coins in product((0, 1), repeat=9)) / 2**9
    assert found.p_value == pytest.approx(uneven)
    low, high = found.interval
    assert low < found.difference == 7 / 20 < high


def test_runs_that_agree_on_every_image_do_not_differ():
    hits = np.array([True, False, True])
    found = compare_hits(hits, hits)
    assert found.p_value == 1 and found.difference == 0 and found.interval == (0, 0)
    assert "within noise" in describe_comparison(found, "a", "b")[-1]


def test_a_small_difference_is_called_noise_and_a_large_one_names_the_better_run(tmp_path, capsys):
    base = run_with_mistakes(tmp_path / "base", range(20))
    similar = run_with_mistakes(tmp_path / "similar", range(2, 23))
    better = run_with_mistakes(tmp_path / "better", range(5))
    assert say(base, similar, capsys)[-1].startswith("The difference is within noise")
    lines = say(base, better, capsys)
    assert "0.8000  80 of 100 correct, 0 of them only by this run" in lines[0]
    assert "0.9500  95 of 100 correct, 15 of them only by this run" in lines[1]
    assert lines[2].startswith("difference +15.00 points") and "15 images: p = 6.1e-05" in lines[3]
    assert lines[-1].startswith(f"{better} is better")
    assert say(better, base, capsys)[-1].startswith(f"{better} is better")


def test_the_order_of_the_images_does_not_matter(tmp_path, capsys):
    first = run_with_mistakes(tmp_path / "first", [0, 1, 2])
    turned = run_with_mistakes(tmp_path / "turned", [99, 98, 97], FILES[::-1], LABELS[::-1])
    lines = say(first, turned, capsys)
    assert (
        all(line.endswith("97 of 100 correct, 0 of them only by this run") for line in lines[:2])
        and "p = 1" in lines[3]
    )


@pytest.mark.parametrize(
    ("files", "labels", "message"),
    [
        (["train/c/other.JPEG", *FILES[1:]], LABELS, "have different validation images (2 are in only one of them"),
        (FILES[:50], LABELS[:50], "have different validation images (50 are in only one of them"),
        (FILES, np.roll(LABELS, 1), "have different labels for train/c/0.JPEG"),
    ],
)
def test_runs_on_other_images_or_labels_are_refused(files, labels, message, tmp_path, capsys):
    first, second = run_with_mistakes(tmp_path / "a", [0]), run_with_mistakes(tmp_path / "b", [0], files, labels)
    with pytest.raises(SystemExit) as stop:
        command.main([str(first), str(second)])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def compare_on_page(first, second, page, *flags) -> Page:
    command.main([str(first), str(second), "--html", str(page), *map(str, flags)])
    return Page(page)


def test_the_page_has_the_verdict_the_ensemble_and_what_differs(tmp_path, capsys):
    base, better = (
        run_with_mistakes(tmp_path / "base", range(20)),
        run_with_mistakes(tmp_path / "better", range(18, 23)),
    )
    record = json.loads((better / "run.json").read_text())
    record["arguments"]["learning_rate"] = 0.0123
    (better / "run.json").write_text(json.dumps(record))
    for run in (base, better):
        write_history(run)
    page = compare_on_page(base, better, tmp_path / "page.html")
    assert "+15.0 percentage points from base to better; 95% interval +5.7 to +19.7" in page.words
    assert "better is better: chance rarely makes such a difference" in page.words
    assert "ensemble of both" in page.words and "2 images are wrong in both runs" in page.words
    assert "Correct only by better: 18" in page.words and "Correct only by base: 3" in page.words
    assert "learning_rate 0.002 0.0123" in page.words and "num_train_epochs" not in page.words
    assert "Validation accuracy over time" in page.words and "Without pictures: nowhere" in page.words
    assert f"{tmp_path / 'page.html'}  0." in capsys.readouterr().out
    rows = page.source.partition('<table class="sortable">')[2]
    gains = [int(gain) for gain in re.findall(r'data-value="(-?\d+)">[+−]?\d+</td>', rows)]
    assert sum(gains) == 15 and [abs(gain) for gain in gains] == sorted(map(abs, gains), reverse=True)


def test_the_page_shows_the_images_that_one_run_alone_gets_right_and_fetches_nothing(pristine_data, tmp_path):
    files = sorted(path.relative_to(pristine_data).as_posix() for path in (pristine_data / "train").rglob("*.JPEG"))
    labels = np.array([WNIDS.index(file.split("/")[1]) for file in files])
    first = run_with_mistakes(tmp_path / "first", [0, 1, 2], files, labels)
    second = run_with_mistakes(tmp_path / "second", [2, 3], files, labels)
    page = compare_on_page(first, second, tmp_path / "page.html", "--data_dir", pristine_data)
    assert len(page.pictures()) == 3 and all(place.startswith("data:image/jpeg") for place in page.pictures())
    assert "url(" not in page.source and "default-src 'none'" in page.source
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "form", "base")]


def test_the_ensemble_on_the_page_averages_probabilities_of_the_same_images(tmp_path):
    logits = np.zeros((4, 4)), np.zeros((4, 4))
    logits[0][:, 1], logits[1][:, 0] = 1, 2  # the second run is surer, and right
    files = FILES[:4]
    first = write_run(tmp_path / "first", "nowhere", files, np.zeros(4, int), NAMES, logits[0])
    second = write_run(tmp_path / "second", "nowhere", files[::-1], np.zeros(4, int), NAMES, logits[1])
    words = compare_on_page(first, second, tmp_path / "page.html").words
    assert "ensemble of both 100.0%" in words


def test_a_page_is_for_two_runs_and_needs_a_folder(tmp_path, capsys):
    run = run_with_mistakes(tmp_path / "a", [0])
    for words, message in [
        ([run, "--html", "x.html"], "--html is for two runs"),
        ([run, run, "--html", tmp_path / "no" / "x.html"], "x.html: cannot be written (No such file or directory)"),
    ]:
        with pytest.raises(SystemExit) as stop:
            command.main(list(map(str, words)))
        assert stop.value.code == 2 and message in capsys.readouterr().err
