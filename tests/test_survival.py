"""A run that is killed, stopped, or out of memory or disk goes on, and ends where it would have ended."""

import contextlib
import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import datasets
import pytest
import several
import torch
from conftest import WNIDS, draw_picture, write_data_set
from safetensors.torch import load_file
from transformers import TrainerCallback

import data_loading
from finetune_vit import main
from transfer import errors, files, runtime
from transfer.config import known_names
from transfer.data import images
from transfer.errors import UserError
from transfer.runs import single
from transfer.training import checkpoints as checkpoint_files
from transfer.training import memory
from transfer.training.checkpoints import last_checkpoint
from transfer.training.trainer import FinetuningTrainer
from transfer.transforms.evaluation import EvaluationTransform


class Killed(BaseException):
    """Stands for SIGKILL where what is on the disk at that moment is all that matters."""


@pytest.fixture
def when(monkeypatch):
    """when(event, action): a callback of that event in every Trainer; action(args, state, **kwargs)."""

    def add(event, action):
        def handle(self, args, state, control, **kwargs):
            action(args, state, **kwargs)

        callback = type("Watcher", (TrainerCallback,), {event: handle})
        original = FinetuningTrainer.__init__

        def with_callback(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.add_callback(callback())

        monkeypatch.setattr(FinetuningTrainer, "__init__", with_callback)

    return add


def kill_at(step):
    def kill(args, state, **kwargs):
        if state.global_step == step:
            raise Killed

    return kill


def same_results(one: Path, other: Path) -> bool:
    names = ("model/model.safetensors", "submission.csv")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.parametrize("kind", ["deit", "swin", "convnextv2"])
def test_a_run_killed_within_an_epoch_resumes_to_the_same_weights(
    kind, pristine_data, checkpoints, finetune, when, monkeypatch
):
    whole = finetune(pristine_data, checkpoints(kind), output_dir="whole", learning_rate="3e-3")
    with monkeypatch.context():
        when("on_step_end", kill_at(8))  # of 5 steps an epoch
        with pytest.raises(Killed):
            finetune(pristine_data, checkpoints(kind), output_dir="killed", learning_rate="3e-3")
        monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    resumed = finetune(
        pristine_data, checkpoints(kind), output_dir="killed", learning_rate="3e-3", resume_from_checkpoint="true"
    )
    assert same_results(resumed, whole)


def test_resuming_in_mid_epoch_is_exact_too_with_dropout(
    pristine_data, checkpoints, finetune, when, monkeypatch, tmp_path
):
    model = shutil.copytree(checkpoints("vit"), tmp_path / "dropping")
    config = json.loads((model / "config.json").read_text()) | {"hidden_dropout_prob": 0.3}
    (model / "config.json").write_text(json.dumps(config))
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 3, "eval_steps": 3}
    whole = finetune(pristine_data, model, output_dir="whole", learning_rate="3e-3", **steps)
    with monkeypatch.context():
        when("on_step_end", kill_at(7))
        with pytest.raises(Killed):
            finetune(pristine_data, model, output_dir="killed", learning_rate="3e-3", **steps)
        monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    steps |= {"resume_from_checkpoint": "true", "dataloader_num_workers": 2}
    assert same_results(finetune(pristine_data, model, output_dir="killed", learning_rate="3e-3", **steps), whole)


def train_and_be_killed_in_a_checkpoint(words: list[str], cache: str) -> None:
    saved, save = [], torch.save

    def save_and_be_killed(content, path, *args, **kwargs):
        save(content, path, *args, **kwargs)
        saved.append(str(path))
        if sum(name.endswith("optimizer.pt") for name in saved) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_and_be_killed
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    main(words)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_last_one_usable(
    pristine_data, checkpoints, finetune, tmp_path
):
    whole = finetune(pristine_data, checkpoints("convnext"), output_dir="whole")
    words = [str(tmp_path / "tiny.yaml"), "--data_dir", str(pristine_data), "--output_dir", str(tmp_path / "killed")]
    words += ["--model_name_or_path", str(checkpoints("convnext"))]
    process = several.CONTEXT.Process(
        target=train_and_be_killed_in_a_checkpoint, args=(words, str(tmp_path / "cache"))
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert {path.name for path in (tmp_path / "killed").glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-10"}
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-5"
    resumed = finetune(pristine_data, checkpoints("convnext"), output_dir="killed", resume_from_checkpoint="true")
    assert same_results(resumed, whole)


def make_checkpoint(folder: Path, step: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).write_bytes(b"x")
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


@pytest.mark.parametrize("missing", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_half_deleted_checkpoint_is_passed_over(missing, tmp_path):
    make_checkpoint(tmp_path, 9)
    (make_checkpoint(tmp_path, 10) / missing).unlink()
    assert last_checkpoint(tmp_path).name == "checkpoint-9"


def test_a_finished_training_evaluates_again_from_its_last_checkpoint_in_a_moved_folder(
    pristine_data, checkpoints, finetune, tmp_path
):
    out = finetune(pristine_data, checkpoints("vit"), learning_rate="5e-3", save_total_limit=3)
    moved = tmp_path / "moved"
    out.rename(moved)
    before = (moved / "model" / "model.safetensors").read_bytes()
    (moved / "submission.csv").unlink()  # as after a kill just before it
    again = finetune(
        pristine_data,
        checkpoints("vit"),
        output_dir="moved",
        learning_rate="5e-3",
        save_total_limit=3,
        resume_from_checkpoint="true",
    )
    assert (again / "model" / "model.safetensors").read_bytes() == before and (again / "submission.csv").is_file()


@pytest.mark.parametrize("file", ["submission.csv", "model/model.safetensors"])
def test_a_run_without_its_csv_or_its_weights_is_not_called_finished(
    file, pristine_data, checkpoints, finetune, capsys
):
    out = finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    (out / file).unlink()
    with pytest.raises(SystemExit):
        finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    assert "holds an unfinished run; resume it with --resume_from_checkpoint true" in capsys.readouterr().err


def test_data_that_changed_since_a_checkpoint_are_noticed(data, checkpoints, finetune, capsys):
    finetune(data, checkpoints("convnext"))
    draw_picture(WNIDS[0], 77).save(data / "train" / WNIDS[0] / "images" / f"{WNIDS[0]}_5.JPEG")
    with pytest.raises(SystemExit) as stop:
        finetune(data, checkpoints("convnext"), resume_from_checkpoint="true")
    assert stop.value.code == 2
    assert "was made with other images; restore the data and the split" in capsys.readouterr().err


def test_weights_that_another_run_wrote_are_not_taken_for_this_runs(
    pristine_data, checkpoints, finetune, when, capsys, tmp_path
):
    def replace(args, state, **kwargs):
        for path in (tmp_path / "out").glob("checkpoint-*/trainer_state.json"):
            content = json.loads(path.read_text())
            content["stateful_callbacks"]["RunProvenance"]["args"]["runs"] = ["another"]
            path.write_text(json.dumps(content))

    when("on_save", replace)
    with pytest.raises(SystemExit):
        finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    assert "checkpoint-5: was written by another run" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model").exists()


KINDS = ["", "--seeds 1 2", "--kfold 2", "--kfold 2 --fold 1", "--search 2"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_in_a_folder_names_the_first_before_it_reads_data(kind, tmp_path, capsys):
    out, recipe = tmp_path / "out", tmp_path / "tiny.yaml"
    recipe.write_text(f"data_dir: missing\noutput_dir: {out}\n")
    out.mkdir()
    first = files.FolderLock(out)
    first.acquire()
    for words in (kind.split(), [*kind.split(), "--resume_from_checkpoint", "true"]):
        with pytest.raises(SystemExit):
            main([str(recipe), *words])
        assert f"out: is in use by another run, process {os.getpid()} on" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [files.LOCK]
    first.release()


def test_arguments_that_changed_since_a_checkpoint_are_said(pristine_data, checkpoints, finetune, caplog):
    finetune(pristine_data, checkpoints("convnext"))
    finetune(
        pristine_data, checkpoints("convnext"), resume_from_checkpoint="true", num_train_epochs=3, logging_steps=2
    )
    [line] = [r.getMessage() for r in caplog.records if "arguments have changed since" in r.getMessage()]
    assert line.endswith(": num_train_epochs 2.0 -> 3.0")


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
    pristine_data, checkpoints, finetune, monkeypatch, tmp_path, capsys
):
    save = torch.save

    def fill_up(content, path, *args, **kwargs):
        if "checkpoint-10/scheduler" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", fill_up)
    with pytest.raises(SystemExit) as stop:
        finetune(pristine_data, checkpoints("convnext"))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in message
    assert "checkpoint-10: cannot be written" in message and "No space left on device" in message
    assert "resume with --resume_from_checkpoint true, from checkpoint-5" in message
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-5"]


def test_a_checkpoint_folder_that_cannot_be_made_stops_the_run_with_advice(
    pristine_data, checkpoints, finetune, monkeypatch, capsys
):
    make = os.makedirs

    def refuse(path, *args, **kwargs):
        if "checkpoint-10" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        make(path, *args, **kwargs)

    monkeypatch.setattr(os, "makedirs", refuse)
    with pytest.raises(SystemExit) as stop:
        finetune(pristine_data, checkpoints("convnext"))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "checkpoint-10: cannot be written" in message
    assert "resume with --resume_from_checkpoint true, from checkpoint-5" in message


def test_old_checkpoints_make_room_and_the_best_and_the_last_stay(tmp_path, monkeypatch):
    made = [make_checkpoint(tmp_path, step) for step in (1, 2, 3)]
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"next checkpoint needs .* free some space, then resume .* from checkpoint-3"):
        checkpoint_files.make_room(tmp_path, needed=100, best=str(made[0]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]


def test_lost_permission_while_results_are_written_is_one_line(
    pristine_data, checkpoints, finetune, monkeypatch, capsys
):
    def refuse(path, content):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(single, "write_atomically", refuse)
    with pytest.raises(SystemExit) as stop:
        finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in message
    assert "submission.csv: cannot be written (Permission denied); fix this and run the same command again" in message


def test_ctrl_c_outside_of_training_is_one_line(pristine_data, checkpoints, finetune, monkeypatch, capsys):

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(single, "predict_and_measure", interrupt)
    with pytest.raises(SystemExit) as stop:
        finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1)
    assert stop.value.code == 130
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: interrupted; run the same command again")


@pytest.fixture(scope="module")
def undisturbed(checkpoints):
    """Results of a run that nothing stopped, made by the first test that asks for them."""
    return {}


def send_at(step, number):
    def send(args, state, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), number)

    return send


@pytest.mark.parametrize(
    ("step", "event", "number", "saved"),
    [
        (7, "on_step_begin", signal.SIGTERM, 8),  # of 5 steps an epoch
        (3, "on_step_end", signal.SIGHUP, 4),  # the step is over when it comes, so one more is done
        (4, "on_step_begin", signal.SIGTERM, 5),  # the last one of its epoch
        (9, "on_step_begin", signal.SIGTERM, 10),  # the last one
    ],
)
def test_a_run_that_is_told_to_end_writes_a_checkpoint_and_resumes_to_the_same_weights(
    step, event, number, saved, pristine_data, checkpoints, finetune, when, monkeypatch, capsys, tmp_path, undisturbed
):
    recipe = {"learning_rate": "3e-3", "dataloader_num_workers": int(step == 7)}
    if not undisturbed:
        out = finetune(pristine_data, checkpoints("convnext"), output_dir="whole", learning_rate="3e-3")
        undisturbed |= {name: (out / name).read_bytes() for name in ("model/model.safetensors", "submission.csv")}
    with monkeypatch.context() as patch:
        when(event, send_at(step, number))
        with pytest.raises(SystemExit) as stop:
            finetune(pristine_data, checkpoints("convnext"), **recipe)
        patch.undo()
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert stop.value.code == 128 + number and signal.getsignal(number) == signal.SIG_DFL
    done = f"stopped by {number.name} after {saved / 5:.2f} epochs"
    assert capsys.readouterr().err.strip().splitlines()[-1] == (
        f"error: {done}; resume with --resume_from_checkpoint true, from checkpoint-{saved}"
    )
    assert not (tmp_path / "out" / files.LOCK).exists()
    out = finetune(pristine_data, checkpoints("convnext"), resume_from_checkpoint="true", **recipe)
    assert {name: (out / name).read_bytes() for name in undisturbed} == undisturbed


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_outside_of_training_is_one_line(number, code, monkeypatch, capsys, tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(f"data_dir: missing\noutput_dir: {tmp_path / 'out'}\n")
    monkeypatch.setattr(data_loading, "find_data", lambda run: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as stop:
        main([str(recipe)])
    assert stop.value.code == code and not (tmp_path / "out" / files.LOCK).exists()
    assert capsys.readouterr().err == f"error: stopped by {number.name}; {errors.START_AGAIN}\n"


def test_a_signal_that_is_ignored_or_handled_stays_so(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        errors.exits_cleanly(runtime.handle_end_signals)()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def launched(place: Path) -> None:
    """What a launcher starts: a run that waits, and writes down how it ends."""
    os.environ[runtime.LAUNCHER_VARIABLES[0]] = "NO"

    @errors.exits_cleanly
    def run():
        runtime.handle_end_signals()
        runtime.end_with_launcher()
        (place / "started").touch()
        time.sleep(60)

    try:
        run()
    except SystemExit as end:
        (place / f"ended-{end.code}").touch()
    os._exit(0)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"there is no {path.name}"
        time.sleep(0.02)


def launch_and_wait(place: Path) -> None:
    child = os.fork()
    if not child:
        launched(place)
    os.waitpid(child, 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_run_ends_with_its_launcher(number, tmp_path):
    launcher = several.CONTEXT.Process(target=launch_and_wait, args=(tmp_path,))
    launcher.start()
    wait_for(tmp_path / "started")
    os.kill(launcher.pid, number)
    wait_for(tmp_path / "ended-143")
    launcher.join()


def test_a_run_whose_launcher_ended_while_it_was_being_imported_does_not_start(monkeypatch, tmp_path):
    monkeypatch.setenv(runtime.LAUNCHER_VARIABLES[0], "NO")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"/sbin/init")
    with pytest.raises(errors.Terminated, match="because its launcher has ended"):
        runtime.end_with_launcher()


def print_without_a_reader() -> None:
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)
    runtime._silence_lost_outputs()
    os.write(1, b"said")


def test_what_is_printed_after_the_terminal_has_gone_does_no_harm():
    process = several.CONTEXT.Process(target=print_without_a_reader)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.fixture
def small_memory(monkeypatch):
    """small_memory(limit): batches of more images do not fit, in the forward or, by turns, the backward pass."""
    forward, turns = FinetuningTrainer.compute_loss, [0]

    def shrink(training=None, evaluation=None):
        def compute(self, model, inputs, *args, **kwargs):
            limit = training if model.training else evaluation
            too_many = limit is not None and len(inputs["pixel_values"]) > limit
            if too_many and turns[0] % 2 == 0:
                turns[0] += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            loss = forward(self, model, inputs, *args, **kwargs)
            if too_many:
                turns[0] += 1
                if model.training:
                    loss.backward()  # gradients of half a step are left behind
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
            return loss

        monkeypatch.setattr(FinetuningTrainer, "compute_loss", compute)

    return shrink


def logged(out, name):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry[name] for entry in history if name in entry}


@pytest.mark.parametrize(("batch", "fits", "accumulation"), [(16, 4, 1), (16, 4, 2), (64, 32, 1)])
def test_out_of_memory_in_training_goes_on_as_half_the_batch_twice_accumulated(
    batch, fits, accumulation, tmp_path, checkpoints, finetune, small_memory, caplog
):
    data = write_data_set(tmp_path, per_class=batch)  # three batches an epoch
    model, settings = checkpoints("vit"), {"learning_rate": "3e-3", "logging_steps": 1}
    by_hand = finetune(
        data,
        model,
        output_dir="by_hand",
        per_device_train_batch_size=fits,
        gradient_accumulation_steps=batch // fits * accumulation,
        **settings,
    )
    small_memory(training=fits)
    adapted = finetune(
        data,
        model,
        output_dir="adapted",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **settings,
    )
    steps = [json.loads((out / "run.json").read_text())["optimizer_steps"] for out in (adapted, by_hand)]
    assert steps[0] == steps[1] == len(logged(adapted, "learning_rate")) == 2 * math.ceil(3 / accumulation)
    assert logged(adapted, "learning_rate") == logged(by_hand, "learning_rate")
    assert logged(adapted, "loss") == pytest.approx(logged(by_hand, "loss"))
    ours, theirs = (load_file(out / "model" / "model.safetensors") for out in (adapted, by_hand))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    halves = {16: ["8 images at once instead of 16", "4 images at once instead of 8"]}
    expected = halves.get(batch, ["32 images at once instead of 64"])
    assert [line.split("with ")[1].split(";")[0] for line in said] == expected


def test_out_of_memory_in_evaluation_gives_the_same_figures(pristine_data, checkpoints, finetune, small_memory):
    model = checkpoints("convnext")
    roomy = finetune(pristine_data, model, output_dir="roomy", per_device_eval_batch_size=2)
    small_memory(evaluation=2)
    small = finetune(pristine_data, model, output_dir="small", per_device_eval_batch_size=8)
    assert same_results(small, roomy)
    first, second = (json.loads((out / "metrics.json").read_text())["validation"] for out in (roomy, small))
    assert second["loss"] == pytest.approx(first["loss"]) and second["accuracy"] == first["accuracy"]


def test_one_image_that_does_not_fit_is_an_error_that_says_what_to_do(
    pristine_data, checkpoints, finetune, small_memory, capsys
):
    small_memory(training=0)
    with pytest.raises(SystemExit) as stop:
        finetune(pristine_data, checkpoints("vit"))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "out of memory in a training step" in message
    assert "1 images do not fit" in message and "--image_size" in message


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    assert not memory.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_memory_does_not_grow_with_epochs(pristine_data, checkpoints, finetune, when):
    import gc

    alive = []

    def count(args, state, **kwargs):
        gc.collect()
        alive.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))

    when("on_epoch_end", count)
    finetune(pristine_data, checkpoints("convnext"), num_train_epochs=6)
    assert len(alive) == 6 and alive[1] == alive[-1]


def test_memory_does_not_grow_with_test_images(pristine_data, checkpoints, finetune, monkeypatch):
    seen, alive, forward = [], [], EvaluationTransform.forward

    def watch(self, images):
        pixel_values = forward(self, images)
        seen.extend([weakref.ref(images), weakref.ref(pixel_values)])
        alive.append(sum(reference() is not None for reference in seen))
        return pixel_values

    monkeypatch.setattr(EvaluationTransform, "forward", watch)
    settings = {"linear_probe_only": "true", "tta": "flip", "per_device_eval_batch_size": 1}
    finetune(pristine_data, checkpoints("convnext"), num_train_epochs=1, **settings)
    assert len(seen) > 100 and max(alive) <= 4  # this batch and the one before


def worker(ready) -> None:
    runtime.shield_worker(os.getpid())
    ready.set()
    time.sleep(60)


@pytest.mark.parametrize("context", [several.CONTEXT, multiprocessing.get_context("fork")], ids=["forkserver", "fork"])
def test_a_data_worker_ends_when_its_run_says_so_and_not_by_itself(context):
    ready = context.Event()
    process = context.Process(target=worker, args=(ready,), daemon=True)
    process.start()
    assert ready.wait(30)
    for number in (signal.SIGTERM, signal.SIGHUP):
        subprocess.run(["sh", "-c", f"kill -{number:d} {process.pid}"], check=True)  # not the run, but another process
    process.join(0.3)
    assert process.is_alive()
    process.terminate()
    process.join(10)
    ended = process.exitcode
    process.kill()
    assert ended == 0


@pytest.mark.parametrize(
    "ends",
    [
        pytest.param("by the system", marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux alone does")),
        "by watching",
    ],
)
def test_processes_that_decode_end_with_a_run_that_is_killed(ends):
    end, other_end = os.pipe()
    child = os.fork()
    if not child:
        with runtime.forks_end_with_this_process() if ends == "by the system" else contextlib.nullcontext():
            if not os.fork():
                if ends == "by watching":
                    images._start_reader(os.getpid())
                time.sleep(60)  # as a process that waits for images to read; nobody stops it
        os.write(other_end, b"forked")
        time.sleep(60)
    os.close(other_end)
    assert os.read(end, 6) == b"forked"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.read(end, 1) == b""  # every process that could write into the pipe has ended
    os.close(end)


BEFORE = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 4.0,
    "max_steps": -1,
    "processes": 2,
}


def changes_on_resume():
    """(argument, earlier value, other changes): the outcome, an error's words or a line's meaning."""
    for name, reason in checkpoint_files.FIXED.items():
        yield {name: 1}, {name: 2}, f"--{name} was 1 and is now 2, but {reason}"
    special = BEFORE.keys()
    for name, meaning in checkpoint_files.CONTINUES.items():
        if name not in special:
            yield {name: 1}, {name: 2}, [f"{name} 1 -> 2: {meaning}"]
    longer = "the learning rate goes on as in a training of that length"
    yield {}, {"num_train_epochs": 6.0}, [f"num_train_epochs 4.0 -> 6.0: {longer}"]
    yield {}, {"num_train_epochs": 3.0}, [f"num_train_epochs 4.0 -> 3.0: {longer}"]
    yield {}, {"num_train_epochs": 2.0}, "--num_train_epochs 2: 2.50 epochs are done already; give more"
    yield {}, {"max_steps": 20}, [f"max_steps -1 -> 20: {longer}"]
    yield {}, {"max_steps": 9}, "--max_steps 9: 10 steps are done already; give more"
    yield {}, {"per_device_train_batch_size": 4}, "16 images .* would be 8; --gradient_accumulation_steps 4 keeps the"
    yield {}, {"gradient_accumulation_steps": 1}, "16 images .* would be 8; --gradient_accumulation_steps 2 keeps the"
    yield {}, {"per_device_train_batch_size": 5}, "would be 10; --per_device_train_batch_size 8 keeps the step"
    both = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3}
    yield {}, both, "would be 15; --per_device_train_batch_size 8 --gradient_accumulation_steps 2 keeps the step"
    same = "an optimizer step has as many images as before, with other random views"
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    yield {}, halves, [f"{name} {BEFORE[name]} -> 4: {same}" for name in halves]
    yield {}, {"processes": 1}, [f"processes 2 -> 1: {same}"]
    yield {}, {}, []


@pytest.mark.parametrize(("then", "changes", "outcome"), list(changes_on_resume()), ids=lambda value: str(value)[:60])
def test_a_change_on_resume_goes_on_with_a_meaning_or_is_refused_by_name(then, changes, outcome, tmp_path):
    checkpoint = make_checkpoint(tmp_path, 10)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 10, "epoch": 2.5}))
    before = BEFORE | then
    if isinstance(outcome, str):
        with pytest.raises(UserError, match=f"checkpoint-10: .*{outcome}"):
            checkpoint_files.judge_changes(checkpoint, before, before | changes)
    else:
        assert checkpoint_files.judge_changes(checkpoint, before, before | changes) == outcome


def test_every_argument_that_decides_weights_has_a_meaning_on_resume():
    judged = [*checkpoint_files.FIXED, *checkpoint_files.CONTINUES]
    assert len(judged) == len(set(judged))
    later = {"activation_checkpointing", "activation_checkpointing_kwargs"} - set(known_names())  # transformers 5.23
    assert set(judged) - {"processes"} - later == set(filter(checkpoint_files.decides_weights, known_names()))


def test_a_change_that_cannot_be_resumed_is_refused_before_data_are_read(
    pristine_data, checkpoints, finetune, stops_at_a_checkpoint, capsys, caplog
):
    with stops_at_a_checkpoint(), pytest.raises(SystemExit):
        finetune(pristine_data, checkpoints("convnext"))
    for flags, message in (
        ({"optim": "sgd"}, "checkpoint-5: --optim was adamw_torch_fused and is now sgd"),
        ({"per_device_train_batch_size": 4}, "--gradient_accumulation_steps 2 keeps the step"),
    ):
        with pytest.raises(SystemExit):
            finetune("missing", checkpoints("convnext"), resume_from_checkpoint="true", **flags)
        assert message in capsys.readouterr().err
    halves = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    out = finetune(pristine_data, checkpoints("convnext"), resume_from_checkpoint="true", mixup_alpha=0.2, **halves)
    assert json.loads((out / "run.json").read_text())["optimizer_steps"] == 10
    said = capsys.readouterr().out
    assert "resume      mixup_alpha 0.0 -> 0.2: it applies to the steps from here on\n" in said
    assert "resume      per_device_train_batch_size 8 -> 4: an optimizer step has as many images as before" in said


def test_a_folder_with_parts_of_checkpoints_alone_gets_advice_that_works(tmp_path):
    (make_checkpoint(tmp_path, 5) / "optimizer.pt").unlink()
    with pytest.raises(UserError, match="holds no complete checkpoint, only parts; remove the folder to start again"):
        checkpoint_files.find_checkpoint(tmp_path, "true")
    assert checkpoint_files.describe_resume(tmp_path) == "no checkpoint is complete; remove the folder to start again"
