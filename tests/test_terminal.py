"""What a person sees: bars on a terminal, plain lines in a pipe, a table in a notebook, and run.log beside it."""

import io
import itertools
import logging
import os
import re
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

import pytest
from conftest import ROOT, WNIDS
from PIL import Image
from transformers import TrainerControl, TrainerState

import data_loading
from transfer import runtime, terminal
from transfer.config import FinetuningArguments
from transfer.data.images import ImageReader, MixedSizes, read_all
from transfer.errors import UserError, exits_cleanly
from transfer.runs.single import shorten_ignored

ESCAPE = "\x1b"


class Screen(io.StringIO):
    """A terminal that keeps what was drawn on it."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError


@pytest.fixture
def on_screen(monkeypatch):
    """on_screen() puts a terminal of 80 columns in place of standard output and standard error, and returns it."""
    for name in ("NO_COLOR", "CI", "TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")

    def put() -> Screen:  # in the test itself: pytest has its own standard output for each phase
        drawn = Screen()
        monkeypatch.setattr(sys, "stdout", drawn)
        monkeypatch.setattr(sys, "stderr", drawn)
        return drawn

    return put


def without_codes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n")


def train(args, epochs=2, steps=4, accuracies=(0.5, 0.75), between=lambda: None, progress=None) -> None:
    """The events of a training, as the Trainer sends them."""
    progress, control = progress or terminal.TrainingProgress(), TrainerControl()
    state = TrainerState(max_steps=epochs * steps, is_world_process_zero=True)
    loader = type("Loader", (), {"dataset": range(24), "__len__": lambda self: steps})()
    progress.on_train_begin(args, state, control, train_dataloader=loader)
    for epoch in range(epochs):
        progress.on_epoch_begin(args, state, control)
        for _ in range(steps):
            progress.on_step_begin(args, state, control)
            state.global_step += 1
            state.epoch = state.global_step / steps
            progress.on_step_end(args, state, control)
            progress.on_log(args, state, control, logs={"loss": 2.0 / state.global_step})
            between()
        for _ in range(2):
            progress.on_prediction_step(args, state, control, eval_dataloader=loader)
        progress.on_evaluate(args, state, control, metrics={"eval_accuracy": accuracies[epoch]})
        if state.best_metric is None or accuracies[epoch] > state.best_metric:
            state.best_metric = accuracies[epoch]
        progress.on_save(args, state, control)
    progress.on_train_end(args, state, control)


@pytest.fixture
def args(tmp_path):
    return FinetuningArguments(
        str(tmp_path), eval_strategy="epoch", metric_for_best_model="accuracy", per_device_eval_batch_size=16
    )


def test_a_training_is_a_bar_and_then_a_line_for_each_epoch_and_the_best_is_marked(on_screen, args):
    screen = on_screen()
    train(args, accuracies=(0.75, 0.5), between=lambda: time.sleep(0.1))
    drawn = without_codes(screen.getvalue())
    first, second = re.findall(r"^epoch \d/2   validation accuracy .*$", drawn, re.M)
    assert first.startswith("epoch 1/2   validation accuracy 0.7500 (best)  loss ") and "images/s" in first
    assert second.startswith("epoch 2/2   validation accuracy 0.5000  loss ")
    assert re.search(r"epoch 1/2   .* \d+%  loss .* images/s  \S+ s left", drawn)
    assert "validating" in drawn and max(map(len, drawn.splitlines())) <= 80
    assert f"{ESCAPE}[36m" in screen.getvalue()  # colors


def test_no_color_is_respected(on_screen, args, monkeypatch):
    screen = on_screen()
    monkeypatch.setenv("NO_COLOR", "1")
    train(args)
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", screen.getvalue())


def test_warnings_do_not_break_a_bar(on_screen, args):
    screen = on_screen()
    terminal.set_up_logging(logging.WARNING)

    def warn():
        sys.stderr.write(warnings.formatwarning("python warns", UserWarning, "somewhere.py", 1, "code"))
        logging.getLogger("transfer.something").warning("the log warns")

    train(args, between=warn)
    lines = without_codes(screen.getvalue()).split("\n")
    for text in ("somewhere.py:1: UserWarning: python warns", "warning     the log warns"):
        assert sum(line.rstrip() == text for line in lines) == 8, lines


def test_in_a_pipe_there_are_plain_lines_one_per_epoch_and_a_few_per_hour(args, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", -1)
    train(args)
    often = capsys.readouterr().out
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 600)
    train(args)
    lines = capsys.readouterr().out.splitlines()
    assert ESCAPE not in often + "".join(lines) and "\r" not in often
    assert len(lines) == 2 and lines[0].startswith("epoch 1/2   validation accuracy 0.5000 (best)")
    assert len(often.splitlines()) > 8 and "epoch 2/2    50%  loss" in often


def test_ci_gets_plain_lines_on_a_terminal_too(on_screen, args, monkeypatch):
    screen = on_screen()
    monkeypatch.setenv("CI", "true")
    train(args)
    assert ESCAPE not in screen.getvalue() and screen.getvalue().count("\n") == 2


def test_disabled_bars_leave_the_lines(on_screen, args):
    screen = on_screen()
    args.disable_tqdm = True
    train(args)
    assert len(re.findall("^epoch", without_codes(screen.getvalue()), re.M)) == 2 and "━" not in screen.getvalue()


def test_the_expected_time_counts_evaluations_and_the_prediction(capsys, args, monkeypatch):
    monkeypatch.setattr(terminal, "FORESEEN_AFTER", (3, 0.0))
    progress = terminal.TrainingProgress()
    progress.foresee(30.0, 65.0, None)
    train(args, progress=progress)
    said = capsys.readouterr().out
    assert said.count("time   ") == 1
    assert "time        about 2 min 5 s, including 1 min 5 s to evaluate and predict at the end\n" in said


def test_the_expected_time_counts_the_larger_images_to_come(capsys, args, monkeypatch):
    monkeypatch.setattr(terminal, "FORESEEN_AFTER", (3, 0.0))
    expected = []
    for cost_ahead in (1.0, 3.0):  # of a step, now 1
        clock = itertools.count(0, 0.25)
        monkeypatch.setattr(terminal.time, "perf_counter", lambda clock=clock: next(clock))
        train(args, progress=terminal.TrainingProgress(lambda cost_ahead=cost_ahead: (1.0, cost_ahead)))
        expected.append(int(re.findall("time        about (\\d+) s\n", capsys.readouterr().out)[0]))
    assert expected[1] > 1.5 * expected[0]


def test_a_named_bar_shows_its_speed_and_leaves_its_time_in_run_log(on_screen, tmp_path):
    screen = on_screen()
    terminal.open_log(tmp_path)
    with terminal.Bar("validation", 1500) as bar:
        bar.advance(1000)
        time.sleep(0.3)
        bar.advance(500)
    drawn = without_codes(screen.getvalue())
    assert "validation  ━" in drawn and "1,000/1,500 images" in drawn
    assert "validation  1,500 images in 0 s\n" in (tmp_path / "run.log").read_text()
    terminal.close_log()


def test_a_long_message_is_wrapped_beside_its_label_and_a_short_one_stays(on_screen):
    screen = on_screen()
    terminal.show(f"warning     {'twelve words ' * 12}end", "no label in this line")
    lines = without_codes(screen.getvalue()).splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= 80
    assert all(line.startswith(" " * 12 + "t") for line in lines[1:3]) and lines[3] == "no label in this line"


def test_a_number_stays_on_the_line_of_its_unit(on_screen):
    screen = on_screen()
    start = "epoch 1/2   validation accuracy 0.1000, of averaged weights 0.2000 (best)"
    terminal.show(f"{start}  loss 4.736  22 images/s  1 min 5 s")
    assert without_codes(screen.getvalue()) == f"{start}\n{' ' * 12}loss 4.736  22 images/s  1 min 5 s\n"


def test_a_bar_of_decoding_that_begins_again_does_not_stay(on_screen, tmp_path):
    for side in (8, 9):
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}.png")
    screen = on_screen()
    with pytest.raises(MixedSizes):
        reader = ImageReader(tmp_path, keeps="same", size=(8, 8), mixed=tmp_path / "mixed")
        read_all(["8.png", "9.png"], reader, "decoding")
    assert "decoding:   0%" in screen.getvalue() and screen.getvalue().endswith("\n\x1b[A\x1b[2K")


def test_an_error_comes_below_a_bar_that_it_ends(on_screen):
    screen = on_screen()

    @exits_cleanly
    def main():
        bar = terminal.Bar("test", 10)  # as in a generator that nobody has closed yet
        bar.advance(5)
        raise UserError("the disk is full")

    with pytest.raises(SystemExit):
        main()
    assert without_codes(screen.getvalue()).rstrip().splitlines()[-1].endswith("error: the disk is full")
    assert screen.getvalue().rstrip().endswith("error: the disk is full")


class Cell:
    """What IPython shows: every display, and its updates in place."""

    def __init__(self):
        self.shown: list[str] = []

    def display(self, page, display_id):
        self.shown.append(page)
        position = len(self.shown) - 1
        return types.SimpleNamespace(update=lambda page: self.shown.__setitem__(position, page))


def test_a_notebook_gets_one_table_for_each_time_that_the_cell_runs(args, capsys, monkeypatch):
    cell = Cell()
    shell = types.SimpleNamespace(kernel=None)
    ipython = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(HTML=str, display=cell.display))
    train(args)
    train(args, accuracies=(0.25, 0.25))
    first, second = cell.shown
    assert first.count("<tr>") == second.count("<tr>") == 3
    assert "0.7500 (best)" in first and "0.7500" not in second
    assert capsys.readouterr().out == ""


@exits_cleanly
def fail_with_log(folder):
    terminal.open_log(folder)
    terminal.show("data        shown")
    terminal.log_only("rates       logged")
    logging.getLogger("transfer.x").warning("warned")
    raise UserError("failed")


def test_run_log_has_what_the_screen_has_and_more_until_the_run_ends(tmp_path, capsys):
    with pytest.raises(SystemExit):
        fail_with_log(tmp_path)
    terminal.show("after")
    with pytest.raises(SystemExit):
        data_loading.main([str(tmp_path / "missing")])
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [re.sub(r"^[\d-]+ [\d:]+  ", "", line) for line in lines] == [
        "data        shown",
        "rates       logged",
        "warned",
        "error: failed",
    ]
    assert "rates" not in capsys.readouterr().out


def test_of_many_ignored_kinds_of_files_the_first_are_shown():
    assert shorten_ignored(["ignored     nothing"]) == []
    assert shorten_ignored(["x", "ignored     1 a, 2 b"]) == ["ignored     1 a, 2 b"]
    assert shorten_ignored(["ignored     1 a, 2 b, 3 c, 4 d, 5 e"]) == [
        "ignored     1 a, 2 b, 3 c and 2 more kinds, all in run.log"
    ]


def test_a_run_says_one_line_each_and_its_summary_names_files_that_exist(pristine_data, checkpoints, finetune, capsys):
    out = finetune(pristine_data, checkpoints("vit"))
    said = capsys.readouterr().out
    before, _, summary = said.partition("\n\n")
    labels = [line[:12].strip() for line in before.splitlines()]
    assert [label for label in labels if label not in ("warning", "ignored", "time")] == [
        "precision",
        "data",
        "labels",
        "model",
        "untrained",
        "epoch 1/2",
        "epoch 2/2",
    ]
    lines = {line[:12].strip(): line[12:] for line in summary.splitlines()}
    assert list(lines) == ["accuracy", "best epoch", "time", "submission", "report", "model", "log", "next"]
    assert lines["submission"] == f"{out / 'submission.csv'} (10 rows, checked)"
    assert all(Path(lines[name]).exists() for name in ("report", "model", "log"))
    assert "95% interval" in lines["accuracy"] and re.fullmatch(r"[12] of 2", lines["best epoch"])
    log = (out / "run.log").read_text()
    assert "rates       0.0005 for the head" in log and all(line in log for line in said.splitlines() if line)


def test_an_accuracy_that_differs_from_the_epochs_is_explained(tmp_path):
    from transfer.evaluation.metrics import ClassificationMetrics, RunMetrics, TtaMetrics
    from transfer.runs.single import explain_difference

    context = types.SimpleNamespace(precision="precision: bf16 (mixed_precision in the accelerate config)")
    state = {
        "best_global_step": 4,
        "max_steps": 7,
        "log_history": [{"step": 4, "epoch": 2.0, "loss": 1}, {"step": 4, "epoch": 2.0, "eval_accuracy": 0.815}],
    }
    metrics = RunMetrics(ClassificationMetrics(0.81, [0.7, 0.9], 1.0, 0.8, 0.5, 400))
    said = explain_difference(context, metrics, state)
    assert said == [
        "            measured in fp32; epoch 2 showed 0.8150 in bf16",
        "best epoch  2 of 3.5",
    ]
    metrics = RunMetrics(metrics.validation, tta=TtaMetrics(["plain", "flip"], {}))
    assert "measured with test-time augmentation" in explain_difference(context, metrics, state)[0]
    state["log_history"][1]["eval_accuracy"] = 0.81
    assert explain_difference(context, metrics, state) == ["best epoch  2 of 3.5"]


# How a run starts and ends


def start(*words: str, before: str = "", **environment: str) -> subprocess.Popen:
    """The program as its own process group, as from a shell."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return subprocess.Popen(
        [*before.split(), *([] if before else [sys.executable]), "finetune_vit.py", *words],
        cwd=ROOT,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )


def test_plain_python_shows_a_line_before_its_imports_and_trains_in_the_configs_precision(data, checkpoints, tmp_path):
    """With the locale of a bare container, and a class whose name ASCII does not have."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("per_device_train_batch_size: 8\nnum_train_epochs: 1\nvalidation_fraction: 0.25\n")
    for name in ("wnids.txt", "words.txt", "submission_sample.csv"):
        (data / name).unlink()
    odd = (data / "train" / WNIDS[0]).rename(data / "train" / "Größe 猫")
    for path in sorted((odd / "images").iterdir())[3:]:
        path.unlink()
    words = ["--data_dir", data, "--model_name_or_path", checkpoints("vit"), "--output_dir", tmp_path / "out"]
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": ""}
    began = time.perf_counter()
    with start(str(recipe), *map(str, words), **environment) as run:
        first = run.stdout.readline()
        seconds = time.perf_counter() - began
        rest = run.stdout.read()
    assert run.returncode == 0, rest
    assert first == "starting    loading PyTorch and Transformers\n"
    assert seconds < 2 or os.getloadavg()[0] > (os.cpu_count() or 1)
    stated = "bf16" if runtime._has_bf16_units() else "not the accelerate config's bf16"
    assert stated in rest.splitlines()[0] and ESCAPE not in rest
    assert re.search(r"1 class has 3 images or fewer.*Größe 猫 \(3\)", rest)


def test_ctrl_c_under_quiet_accelerate_launch_ends_with_our_line(tmp_path):
    launch = f"{sys.executable} -m accelerate.commands.launch --quiet --config_file accelerate_config.yaml"
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("data_dir: sample\nimage_size: 64\n")
    with start(str(recipe), "--output_dir", str(tmp_path / "out"), before=launch) as run:
        for line in run.stdout:
            if line.startswith("precision"):
                break
        time.sleep(0.2)
        os.killpg(run.pid, signal.SIGINT)
        rest = run.stdout.read()
    assert rest.rstrip().splitlines()[-1].startswith("error: interrupted"), rest


def test_ctrl_c_while_the_libraries_load_is_one_line_too():
    with start("recipes/sample.yaml") as run:
        first = run.stdout.readline()
        run.send_signal(signal.SIGINT)
        rest = run.stdout.read()
    assert first.startswith("starting") and rest == "error: interrupted\n" and run.returncode == 130


@pytest.fixture
def no_launcher(monkeypatch, tmp_path):
    """No launcher has set anything, and the accelerate config asks for bf16."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(runtime.PRECISION_VARIABLE, "")  # so that it is put back afterwards
    monkeypatch.delenv(runtime.PRECISION_VARIABLE)
    config = tmp_path / "accelerate_config.yaml"
    config.write_text("mixed_precision: bf16\n")
    monkeypatch.setattr(runtime, "ACCELERATE_CONFIG", config)


def test_a_second_run_in_a_process_starts_as_the_first_did(monkeypatch, no_launcher):
    monkeypatch.setattr(runtime, "_has_bf16_units", lambda: False)

    @exits_cleanly
    def run():
        precision = runtime.set_up_runtime()
        os.environ[runtime.LAUNCHER_VARIABLES[0]] = "INDUCTOR"  # as TrainingArguments do for --torch_compile
        return precision

    first = run()
    assert first == run() and "not the accelerate config's bf16" in first
    assert not any(name.startswith("ACCELERATE_") for name in os.environ)


def test_without_a_launcher_the_precision_is_the_configs(monkeypatch, no_launcher):
    monkeypatch.setattr(runtime, "_has_bf16_units", lambda: True)
    assert runtime.resolve_mixed_precision() == "precision: bf16 (mixed_precision in the accelerate config)"
    assert os.environ[runtime.PRECISION_VARIABLE] == "bf16"
    monkeypatch.setenv(runtime.PRECISION_VARIABLE, "no")  # as a launcher with another config sets it
    assert runtime.resolve_mixed_precision() == "precision: fp32 (mixed_precision in the accelerate config)"
