"""`--max_minutes`: training takes the steps that fit, and its schedule with it."""

import itertools
import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerControl, TrainerState, TrainingArguments, get_scheduler

from data_loading import load_dataset, open_data
from transfer.data.labels import read_template
from transfer.data.splits import split_fingerprint
from transfer.evaluation.predictions import Predictions
from transfer.runs import single, timing
from transfer.runs.timing import Deadline, TimeBudget, steps_that_fit
from transfer.submission.checker import find_faults
from transfer.training.trainer import FinetuningTrainer
from transfer.transforms.training import TrainTransform


def test_steps_that_fit_leave_time_for_every_pause_on_the_way():
    # 10 s: 6 steps of a second, a pause of a second after the fourth, and one in the end
    assert steps_that_fit(10, 100, step=1, pause=1, until_pause=4, interval=4) == 8
    assert steps_that_fit(10, 100, step=1, pause=2, until_pause=4, interval=4) == 6
    assert steps_that_fit(10, 5, step=1, pause=1, until_pause=100, interval=100) == 5
    assert steps_that_fit(0.5, 100, step=1, pause=1, until_pause=4, interval=4) == 0
    assert steps_that_fit(-3, 100, step=1, pause=1, until_pause=4, interval=4) == 0


def test_held_out_images_that_fit_leave_time_to_train():
    # 2/3 of 69 s, at 1.15 s an image with slack, seen 4 times
    assert timing.images_that_fit(69, 1.0, passes=4) == 10
    assert timing.images_that_fit(-5, 1.0, passes=4) == 0


class Stop(Exception):
    """Ends a run where the test has seen enough."""


def test_an_evaluation_is_timed_after_a_first_batch_which_is_slower(pristine_data, checkpoints, finetune, monkeypatch):
    calls, foreseen = [], []

    def predict_logits(self, split, view=None, what=""):
        calls.append(len(split))
        time.sleep(0.5 if len(calls) == 1 else 0.01)
        return np.zeros((len(split), 4))

    def limit_training(context, trainer, seconds):
        foreseen.append(seconds)
        raise Stop

    monkeypatch.setattr(FinetuningTrainer, "predict_logits", predict_logits)
    monkeypatch.setattr(single, "limit_training", limit_training)
    with pytest.raises(Stop):
        finetune(pristine_data, checkpoints("convnext"), per_device_eval_batch_size=4)
    assert calls == [4, 12] and foreseen[0] < 0.5 / 12


class Machine:
    """A loop like the Trainer's, over a clock that the test turns."""

    def __init__(self, monkeypatch, tmp_path, seconds: float, steps: int = 100):
        self.now, self.rates = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        self.args = TrainingArguments(str(tmp_path), eval_strategy="epoch", save_strategy="epoch", use_cpu=True)
        self.state, self.control = TrainerState(max_steps=steps), TrainerControl()
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        self.schedule = get_scheduler("cosine", self.optimizer, num_warmup_steps=10, num_training_steps=steps)
        self.budget = TimeBudget(lambda: seconds - self.now, pause=1.0)

    def train(self, step_seconds) -> list[float]:
        while self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.now += step_seconds(self.now)
            self.optimizer.step()
            self.schedule.step()
            self.state.global_step += 1
            self.budget.on_step_end(
                self.args, self.state, self.control, lr_scheduler=self.schedule, train_dataloader=[0] * 1000
            )
        return [*self.rates, self.optimizer.param_groups[0]["lr"]]


def test_a_run_that_fits_keeps_its_schedule_bit_for_bit(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, seconds=1000)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    plain = get_scheduler("cosine", optimizer, num_warmup_steps=10, num_training_steps=100)
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        plain.step()
    assert machine.train(lambda now: 1.0)[:-1] == expected


@pytest.mark.parametrize("pace", [lambda now: 1.0, lambda now: 1.0 if now < 20 else 2.0, lambda now: 3.0 - now / 20])
def test_a_run_that_does_not_fit_ends_in_time_with_the_rate_at_its_end(pace, monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, seconds=40)
    rates = machine.train(pace)
    assert machine.control.should_training_stop and 33 <= machine.now <= 39.5
    assert rates[-1] == pytest.approx(0, abs=1e-6)
    peak = rates.index(max(rates))
    assert max(rates) > 0.95 and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(abs(a - b) for a, b in itertools.pairwise(rates[peak:])) < 0.35  # no jumps


def test_it_is_said_once_how_many_steps_fit(monkeypatch, tmp_path, caplog):
    Machine(monkeypatch, tmp_path, seconds=40).train(lambda now: 1.0)
    [line] = [record.getMessage() for record in caplog.records]
    assert (
        line.startswith("--max_minutes: about 3")
        and "of 100 steps fit; the learning-rate schedule is shortened" in line
    )


def test_two_slow_steps_do_not_shorten_a_run_that_fits(monkeypatch, tmp_path, caplog):
    machine = Machine(monkeypatch, tmp_path, seconds=150)
    rates = machine.train(lambda now: 20.0 if now < 40 else 1.0)
    assert machine.state.global_step == 100 and rates[60] > 0.3  # the schedule has not run ahead
    assert not caplog.records


def test_the_number_of_steps_that_fit_is_corrected_upwards(monkeypatch, tmp_path, caplog):
    machine = Machine(monkeypatch, tmp_path, seconds=100)
    machine.train(lambda now: 4.0 if now < 40 else 0.7)
    first, second, *_ = (record.getMessage() for record in caplog.records)
    assert "about 2" in first and f", not {re.findall('about ([0-9]+)', first)[0]};" in second
    assert machine.state.global_step > 70


def test_a_run_whose_images_grow_leaves_time_for_the_large_ones(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, seconds=100)  # of 140 that all steps would take
    transform, sizes = TrainTransform(torch.nn.Identity(), [10, 20], min_crop_scale=0.5), []

    def done() -> float:
        return min(1.0, machine.schedule.last_epoch / 100)

    machine.budget.step_costs = lambda: (transform.size_at(done()) ** 2, transform.pixels_ahead(done()))

    def step_seconds(now: float) -> float:
        sizes.append(transform.size_at(done()))
        return sizes[-1] ** 2 / 180

    rates = machine.train(step_seconds)
    assert 93 <= machine.now <= 99.5 and rates[-1] == pytest.approx(0, abs=1e-6)
    small = sum(size == 10 for size in sizes)
    assert abs(small - len(sizes) / 2) < 4  # the schedule never has to make up for lost time


def test_a_schedule_that_cannot_be_moved_is_left_alone_and_training_still_ends(monkeypatch, tmp_path):
    machine = Machine(monkeypatch, tmp_path, seconds=40)
    machine.schedule = torch.optim.lr_scheduler.StepLR(machine.optimizer, 10)
    machine.train(lambda now: 1.0)
    assert machine.now <= 39.5 and not isinstance(machine.schedule, LambdaLR)


def test_time_for_the_final_figures_is_put_aside():
    deadline = Deadline(time.time() + 100, images_afterwards=1000)
    assert deadline.seconds_to_train(0.01) == pytest.approx(100 - timing.SLACK * 10 - timing.FIXED_SECONDS, abs=0.5)


def test_the_process_started_before_now():
    assert 0 < time.time() - timing.process_start() < 24 * 3600


def test_an_estimate_times_as_many_steps_as_it_has_time_for(monkeypatch, tmp_path):
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now))
    timer, control, state = timing.StepTimer(most_seconds=20.0, least=2), TrainerControl(), TrainerState(max_steps=20)
    while not control.should_training_stop:
        timer.on_step_begin(None, state, control)
        state.global_step += 1
        timer.on_step_end(None, state, control)
    assert state.global_step == 4 and len(timer.seconds()) == 2  # the first ones are slower


def test_evaluation_is_timed_on_as_many_images_as_there_is_time_for(monkeypatch):
    seen, clock = [], [0.0]

    def predict(split):
        seen.append(len(split))
        clock[0] += 0.5 * len(split)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    trainer = SimpleNamespace(predict_logits=predict)
    assert timing.time_evaluation(trainer, range(5000), 1536) == 0.5
    assert seen == [1, 16, 10, 10]


@pytest.mark.parametrize(("seconds", "late"), [(0.4, False), (9.0, True)])
def test_where_evaluation_takes_too_long_fewer_held_out_images_are_evaluated(
    seconds, late, pristine_data, checkpoints, finetune, monkeypatch, capsys
):
    monkeypatch.setattr(timing, "time_evaluation", lambda *args: seconds)
    out = finetune(pristine_data, checkpoints("vit"), num_train_epochs=1, max_minutes=0.5)
    said, metrics = capsys.readouterr().out, json.loads((out / "metrics.json").read_text())
    [images] = re.findall(r"validation  on (\d+) of 12 images: --max_minutes leaves no time for more", said)
    assert late == ("late: predicting takes longer than --max_minutes" in said)
    assert metrics["validation"]["n"] == metrics["train"]["n"] == int(images) < 12
    counts = np.bincount(Predictions.load(out).validation_labels, minlength=4)
    assert counts.min() >= 1 and counts.max() - counts.min() <= 1
    assert find_faults(out / "submission.csv", read_template(pristine_data / "submission_sample.csv"), 4) == []
    assert json.loads((out / "run.json").read_text())["split_fingerprint"] == split_fingerprint(
        load_dataset(open_data(str(pristine_data)), 0.25)
    )


def test_a_run_ends_in_time_with_a_valid_csv(pristine_data, checkpoints, finetune, monkeypatch):
    monkeypatch.setattr(timing, "FIXED_SECONDS", 1.0)
    start = time.time()
    out = finetune(pristine_data, checkpoints("vit"), num_train_epochs=100000, max_minutes=0.08, logging_steps=50)
    assert time.time() - start < 30  # 5 on a machine that does nothing else
    assert find_faults(out / "submission.csv", read_template(pristine_data / "submission_sample.csv"), 4) == []
    state = json.loads((out / "trainer_state.json").read_text())
    assert 0 < state["global_step"] < state["max_steps"]
    [schedule] = sorted(out.glob(f"checkpoint-{state['global_step']}/scheduler.pt"))
    assert torch.load(schedule, weights_only=True)["_last_lr"][0] == pytest.approx(0, abs=1e-9)
