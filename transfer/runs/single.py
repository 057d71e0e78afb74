"""The steps of one run, from the checks before it to the files that it leaves; finetune_vit.py has their order."""

import dataclasses
import itertools
import logging
import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from safetensors.torch import load_file

from transfer import terminal
from transfer.bundle import check_target, pack
from transfer.config import FinetuningArguments, RunArguments, describe_arguments, training_only_names
from transfer.data.images import read_image
from transfer.data.images.store import PixelDataset, PixelStore, open_pixel_store
from transfer.data.layouts import DatasetFiles
from transfer.data.splits import count_copies, describe_data, split_fingerprint
from transfer.errors import UserError
from transfer.evaluation.metrics import (
    ClassificationMetrics,
    LinearProbe,
    RunMetrics,
    Speed,
    TrainMetrics,
    TtaMetrics,
    ZeroEpoch,
    describe_metrics,
    measure,
)
from transfer.evaluation.predictions import Predictions, average_views, choose_views, measure_calibration
from transfer.export import CHECKED_IMAGES, check_export, export_onnx
from transfer.files import (
    anonymize_file,
    claim_output_dir,
    digest_of_folder,
    is_finished,
    lock_output_dir,
    read_json,
    write_atomically,
    write_folder_atomically,
)
from transfer.hub import check_push, push_model, push_space
from transfer.models.build import Classifier
from transfer.models.layers import holds_adapters
from transfer.models.load import fingerprint_of_weights
from transfer.reporting.card import keep_card, write_card
from transfer.reporting.page import draw_report
from transfer.runs import MEASURED_IMAGES, RunContext, list_parts, select_evenly
from transfer.runs.record import (
    compare_environment,
    describe_command,
    extend_record,
    find_run_of,
    make_record,
    read_record,
    write_record,
)
from transfer.runs.timing import limit_training
from transfer.runtime import count_cores, note, say
from transfer.submission import digest_of, fill_submission
from transfer.submission.checker import check_rows
from transfer.terminal import format_duration
from transfer.training.checkpoints import (
    RunProvenance,
    find_checkpoint,
    judge_changes,
    last_checkpoint,
    refuse_changes,
)
from transfer.training.linear_probe import fit_probe
from transfer.training.trainer import FinetuningTrainer, identity, run_training
from transfer.transforms.evaluation import TTA_TRANSFORMS, EvaluationTransform, check_transform
from transfer.transforms.training import enough_pixels

READ_BACK_IMAGES = 10
IGNORED_SHOWN = 3  # kinds of files
SHARED_MEMORY = Path("/dev/shm")  # through which data workers hand over their batches
TIMED_IMAGES = 32  # to foresee how fast images are decoded
SHOWN_IMAGES = 16  # training images on the report


def set_up_logging(args: FinetuningArguments) -> None:
    """Show progress bars and warnings of the main process only, and no messages about loaded files."""
    terminal.set_up_logging(logging.WARNING if args.process_index == 0 else logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()  # of loading weights


def shorten_ignored(layout: Sequence[str]) -> list[str]:
    """The first kinds of files that a dataset's layout, in lines, says are ignored; nothing if there are none."""
    [line] = [line for line in layout if line.startswith("ignored ")] or [""]
    kinds = line[12:].split(", ")
    if kinds[0] in ("", "nothing"):
        return []
    more = f" and {len(kinds) - IGNORED_SHOWN} more kinds, all in {terminal.LOG_NAME}"
    return [f"ignored     {', '.join(kinds[:IGNORED_SHOWN])}{more if len(kinds) > IGNORED_SHOWN else ''}"]


def say_data(run: RunArguments, data: DatasetFiles, dataset: datasets.DatasetDict, layout: Sequence[str]) -> None:
    """Print the dataset in one line, how its submission writes labels, and what of its files is not used.

    All lines of its layout go to run.log.
    """
    note(*layout)
    shown = [line for line in layout if line.startswith(("labels      written", "warning "))]
    say(describe_data(run, data, dataset), *shown, *shorten_ignored(layout))


def prepare_output(run: RunArguments, args: FinetuningArguments) -> str | None:
    """Claim the output folder; returns the checkpoint that a single training resumes from.

    Raises `UserError`, also if the results could not be exported, packed or pushed.
    """
    claim_output(run, args)  # comes first: a run that is alive writes the checkpoints
    parts, arguments = list_parts(run), describe_arguments(run, args)
    if parts and args.resume_from_checkpoint is not None:
        refuse_changed_parts(Path(args.output_dir), parts, arguments)
    if parts or run.search:  # each training has its own
        return None
    checkpoint = find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)
    if checkpoint:
        refuse_changes(Path(checkpoint), arguments)
    return checkpoint


def refuse_changed_parts(folder: Path, parts: Mapping[str, dict], arguments: dict) -> None:
    """Raise `UserError` if a seed or fold that was begun or finished cannot be resumed with these arguments."""
    for name, changes in parts.items():
        if is_finished(folder / name):
            judge_changes(folder / name, read_record(folder / name / "run.json")["arguments"], arguments | changes)
        elif checkpoint := last_checkpoint(folder / name):
            refuse_changes(checkpoint, arguments | changes)


def claim_output(run: RunArguments, args: FinetuningArguments) -> None:
    """Lock the output folder in the first process, open its run.log, and check where results are to go.

    Raises `UserError`.
    """
    if args.process_index != 0 or run.estimate:
        return
    if run.search:
        lock_output_dir(Path(args.output_dir))  # open_study says what it holds
    else:
        claim_output_dir(Path(args.output_dir), resuming=args.resume_from_checkpoint is not None)
        terminal.open_log(Path(args.output_dir))
    if run.export:
        check_export()
    if run.hand_in:
        check_target(Path(run.hand_in))
    if args.push_to_hub:
        check_push(args.hub_model_id or "", run.hub_space_id)


def decode_images(context: RunContext, args: FinetuningArguments, classifier: Classifier) -> PixelStore:
    """Decode every image, once per machine, into memory-mapped uint8 pixels.

    Where they are not kept, data workers will decode them, one on each core unless the arguments name a number.
    """
    run, data, geometry = context.run, context.data, classifier.geometry
    check_transform(classifier.processor, EvaluationTransform(geometry))
    # The arguments as given: a trial of a search has its own crops, and shares the cache of the others.
    given = {"train_image_size": run.train_image_size, "min_crop_scale": run.min_crop_scale} | context.arguments
    side = run.decoded_side or enough_pixels(given["train_image_size"] or [geometry.crop[0]], given["min_crop_scale"])
    why_uncached = None if run.cache_images else "--cache_images false"
    # --estimate trains a few steps.
    crops = run.estimate or (args.do_train and not run.linear_probe_only)
    with args.main_process_first(local=True, desc="decoding images"):
        store = open_pixel_store(
            data.root, data.files, geometry, None, data.test_files, data.train_files, side, why_uncached, crops
        )
    if store.why_uncached:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.dataloader_num_workers = args.dataloader_num_workers or choose_workers(
            args.per_device_train_batch_size * 3 * 2 * side * side, processes
        )
        workers = max(1, args.dataloader_num_workers) * processes
        speed = time_decoding(PixelDataset(store, context.dataset["train"], for_training=crops))
        say(
            f"images      are decoded whenever they are needed, about {min(workers, count_cores()) * speed:,.0f} a "
            f"second with {workers} data worker{'s' if workers > 1 else ''} ({store.why_uncached})"
        )
    return store


def choose_workers(batch_bytes: int, processes: int) -> int:
    """How many data workers each process may have: one on each core, and as many as shared memory has room for.

    Every worker keeps two batches there, and containers often have 64 MB of it.
    """
    workers = max(1, count_cores() // processes)
    if SHARED_MEMORY.is_dir():
        workers = min(workers, shutil.disk_usage(SHARED_MEMORY).free // (2 * batch_bytes * processes))
    return workers


def time_decoding(images: PixelDataset) -> float:
    """How many images a second one process decodes."""
    few = range(0, len(images), max(1, len(images) // TIMED_IMAGES))[:TIMED_IMAGES]
    start = time.perf_counter()
    images.__getitems__(few)
    return len(few) / (time.perf_counter() - start)


def start_record(context: RunContext, trainer: FinetuningTrainer, checkpoint: str | None = None) -> dict:
    """What a run starts from, for run.json; prints what differs from the run that is reproduced or resumed.

    Raises `UserError` if the data are not those of that run.
    """
    store = trainer.eval_dataset.store
    record = make_record(
        describe_command(context.words),
        context.arguments | {"seed": trainer.args.seed},
        context.precision,
        store.data_fingerprint,
        split_fingerprint(context.dataset),
        fingerprint_of_weights(trainer.model),
    )
    if unreadable := context.data.unreadable | store.unreadable:
        record["unreadable_images"] = unreadable
    if context.run.reproduce:
        parent = context.parent_split
        now = record if parent is None else record | {"split_fingerprint": split_fingerprint(parent)}
        changes = compare_environment(Path(context.run.reproduce), now, part=parent is not None)
        say(*(f"changed     {line}" for line in changes))
    provenance = RunProvenance(record["data_fingerprint"], record["split_fingerprint"], record["arguments"])
    if checkpoint:
        provenance.check(Path(checkpoint))
    trainer.add_callback(provenance)
    return record


# Training, evaluation, prediction


def labels_of(split: PixelDataset) -> np.ndarray:
    """(N,) labels of a split that has them: train or validation."""
    assert split.labels is not None
    return split.labels


def evaluate_split(trainer: FinetuningTrainer, split: PixelDataset, what: str = "evaluating") -> ClassificationMetrics:
    """Metrics of a labeled split under the evaluation transform, in fp32."""
    return measure(trainer.predict_logits(split, what=what), labels_of(split))


def measure_on_train(context: RunContext, trainer: FinetuningTrainer, speed: Speed) -> TrainMetrics:
    """Metrics of unaugmented training images, as many as there are validation images and at most 1,000."""
    count = min(MEASURED_IMAGES, len(context.dataset["validation"]))
    sample = select_evenly(context.dataset["train"], count)
    metrics = evaluate_split(trainer, PixelDataset(trainer.eval_dataset.store, sample), "train data")
    return TrainMetrics(**dataclasses.asdict(metrics), **dataclasses.asdict(speed))


def train_and_measure(context: RunContext, trainer: FinetuningTrainer, checkpoint: str | None) -> dict:
    """Train, keep the best epoch, and measure it on training images; returns the stages of `RunMetrics`."""
    run = context.run
    held_out = context.dataset["validation"]
    sample = PixelDataset(trainer.eval_dataset.store, select_evenly(held_out, MEASURED_IMAGES))
    few = range(min(len(sample), trainer.args.eval_batch_size))
    trainer.predict_logits(torch.utils.data.Subset(sample, few))  # the first batch is slower, and is not timed
    start = time.perf_counter()
    zero = ZeroEpoch(evaluate_split(trainer, sample, "untrained").accuracy)
    part = f", on {len(sample):,} images" if len(sample) < len(held_out) else ""
    say(f"untrained   validation accuracy {zero.accuracy:.4f} before training{part}")
    limit_training(context, trainer, (time.perf_counter() - start) / len(sample))
    stages: dict = {"zero_epoch": zero}
    if run.linear_probe or run.linear_probe_only:
        probe = stages["linear_probe"] = probe_and_measure(context, trainer)
    if run.linear_probe_only:
        assert probe.seconds is not None  # only the mean of several probes has none
        speed = Speed(len(context.dataset["train"]) / probe.seconds, probe.seconds)
    else:
        speed = Speed(**run_training(trainer, checkpoint))
    return stages | {"train": measure_on_train(context, trainer, speed)}


def probe_and_measure(context: RunContext, trainer: FinetuningTrainer) -> LinearProbe:
    """Put the head of a linear probe into the model and measure it."""
    start, store = time.perf_counter(), trainer.eval_dataset.store
    penalty = fit_probe(trainer, store, context.dataset["train"], trainer.eval_transform.geometry.rule)
    accuracy = evaluate_split(trainer, trainer.eval_dataset, "linear probe").accuracy
    say(f"probe       validation accuracy {accuracy:.4f} of a head on frozen features")
    return LinearProbe(accuracy, penalty, time.perf_counter() - start)


def predict_view(trainer: FinetuningTrainer, split: PixelDataset, name: str, what: str) -> np.ndarray:
    """Logits (N, classes) of the plain images, or the mean over the images of one kind of test-time augmentation."""
    return np.mean(
        [trainer.predict_logits(split, view, what) for view in TTA_TRANSFORMS.get(name, [identity])], axis=0
    )


def fill_unreadable(context: RunContext, store: PixelStore, logits: np.ndarray) -> np.ndarray:
    """The logits (M, classes) of the test images, where those that cannot be read have the training classes' shares.

    A warning names these files: the csv needs a row for each of them.
    """
    files = context.dataset["test"]["file"][:]
    rows = [row for row, file in enumerate(files) if file in store.unreadable]
    if not rows:
        return logits
    counts = np.bincount(context.dataset["train"]["label"][:], minlength=logits.shape[1]) + 1.0
    filled = logits.copy()
    filled[rows] = np.log(counts / counts.sum())
    shown = "; ".join(f"{context.data.root / files[row]}: {store.unreadable[files[row]]}" for row in rows[:5])
    say(
        f"warning     {len(rows)} of {len(files)} test images cannot be read; each gets the most frequent class of "
        f"train, {context.data.class_names[int(counts.argmax())]}: {shown}{'; ...' if len(rows) > 5 else ''}"
    )
    return filled


def predict_and_measure(context: RunContext, trainer: FinetuningTrainer) -> tuple[Predictions, dict]:
    """Logits of the validation and test images, and the stages of `RunMetrics` that are measured on them.

    Test-time augmentation is averaged in where it raises the accuracy on the validation images.
    """
    dataset, held_out = context.dataset, trainer.eval_dataset
    labels = labels_of(held_out)
    names = ["plain", *context.run.tta]
    tried = {name: predict_view(trainer, held_out, name, "validation") for name in names}
    kept = choose_views(tried, labels)
    logits = average_views([tried[name] for name in kept])
    stages: dict = {
        "validation": measure(logits, labels),
        "calibration": measure_calibration(logits, labels),
    }
    if context.run.tta:
        accuracies = {name: measure(tried[name], labels).accuracy for name in names}
        stages["tta"] = TtaMetrics(kept, accuracies)
    ids, tested = np.empty(0, dtype=np.str_), np.empty((0, logits.shape[-1]))
    if "test" in dataset:
        start = time.perf_counter()
        images = PixelDataset(held_out.store, dataset["test"])
        tested = average_views([predict_view(trainer, images, name, "test") for name in kept])
        tested = fill_unreadable(context, held_out.store, tested)
        if context.data.test_labels:
            stages["test"] = measure(tested, np.array(context.data.test_labels))
        ids, seconds = np.array(dataset["test"]["image_id"][:], dtype=np.str_), time.perf_counter() - start
        stages["prediction"] = Speed(len(ids) / seconds, seconds)
    files = np.array(dataset["validation"]["file"][:], dtype=np.str_)
    return Predictions(files, labels, logits, ids, tested), stages


# The results of a run


def check_same_weights(folder: Path, checkpoint: Path) -> None:
    """Refuse a saved model that differs from the chosen checkpoint, bit for bit, as both lie on the disk."""
    saved, chosen = (load_file(place / "model.safetensors") for place in (folder, checkpoint))
    differing = [name for name in chosen if name not in saved or not torch.equal(saved[name], chosen[name])]
    if differing or saved.keys() != chosen.keys():
        raise RuntimeError(f"{folder}: differs from {checkpoint}, which was chosen, in {differing or 'its names'}")


def save_model(trainer: FinetuningTrainer, place: Path) -> None:
    """Write model/: what from_pretrained and pipeline need and nothing else, checked against the chosen checkpoint."""

    def write(folder: Path) -> None:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        if trainer.chosen_weights and not holds_adapters(trainer.chosen_weights):  # checked when they were merged
            check_same_weights(folder, trainer.chosen_weights)

    write_folder_atomically(place, write)


def describe_training_images(context: RunContext) -> dict:
    """For run.json: how many training images each class has, and some of them with their labels for the report."""
    train = context.dataset["train"]
    counts = np.bincount(train["label"][:], minlength=len(context.data.class_ids))
    shown = select_evenly(train, SHOWN_IMAGES)
    return {
        "train_counts": counts.tolist(),
        "train_sample": dict(zip(shown["file"][:], shown["label"][:], strict=True)),
    }


def write_results(
    context: RunContext,
    trainer: FinetuningTrainer,
    record: dict,
    metrics: RunMetrics,
    predictions: Predictions,
    scores: np.ndarray | None = None,
    temperature: float | None = None,
) -> None:
    """Write all results, submission.csv last: with the labels that the model predicts, or those of `scores`.

    The probabilities of a submission are calibrated by the metrics' temperature, or that of `scores`.
    """
    out, arguments, data, run = Path(trainer.args.output_dir), record["arguments"], context.data, context.run
    copies = count_copies(data, run.validation_fraction, run.split_seed, is_split=not run.kfold)
    metrics = dataclasses.replace(metrics, copies=copies)
    save_model(trainer, out / "model")
    predictions.save(out)
    if metrics.train is not None:
        write_card(out / "model", metrics, record, data.class_names, data.class_ids, predictions)
    else:
        keep_card(Path(arguments["model_name_or_path"]).expanduser(), out / "model", arguments["hub_model_id"])
    anonymize_file(out / "model" / "README.md")  # it is what gets pushed
    metrics.write(out)
    record = record | {
        "optimizer_steps": trainer.state.global_step,
        "weights_sha256": digest_of_folder(out / "model", "*.safetensors"),
        "parameters": trainer.accelerator.unwrap_model(trainer.model).num_parameters(),
        "seconds": time.time() - context.started,
    }
    if metrics.train is not None and not metrics.folds:  # every image is in the training images of all folds but one
        record |= describe_training_images(context)
    submission = None
    if len(predictions.test_ids):
        scores = predictions.test_logits if scores is None else scores
        if temperature is None:
            temperature = metrics.calibration.temperature if metrics.calibration else 1.0
        submission = fill_submission(data, predictions.test_ids.tolist(), scores, temperature)
        record["submission_sha256"] = digest_of(submission)
    draw_report(out, record, data.root)
    write_record(out, record)
    if submission is not None:
        write_atomically(out / "submission.csv", submission)


def explain_difference(context: RunContext, metrics: RunMetrics, state: dict) -> list[str]:
    """The best epoch, and why the final accuracy differs from the one that was shown for it, as lines to print."""
    entries = [e for e in state.get("log_history", []) if e.get("step") == state.get("best_global_step")]
    measured = {name: value for entry in entries for name, value in entry.items()}
    if "eval_accuracy" not in measured:
        return []
    epoch, epochs = f"{measured['epoch']:.3g}", measured["epoch"] * state["max_steps"] / measured["step"]
    lines = [f"best epoch  {epoch} of {epochs:.3g}"]
    shown = {measured["eval_accuracy"], measured.get("eval_ema_accuracy", measured["eval_accuracy"])}
    if metrics.validation.accuracy not in shown:
        how = "in fp32" if "fp32" not in context.precision else "again"
        if metrics.tta and metrics.tta.kept != ["plain"]:
            how = "with test-time augmentation"
        precision = context.precision.removeprefix("precision: ").partition(" ")[0].rstrip(",")
        shown_then = f"epoch {epoch} showed {measured['eval_accuracy']:.4f} in {precision}"
        lines.insert(0, f"            measured {how}; {shown_then}")
    return lines


def describe_results(context: RunContext, args: FinetuningArguments, metrics: RunMetrics, started: float) -> list[str]:
    """The summary of a finished run, as lines to print: accuracy, time, the files that it left, what to do next."""
    out = Path(args.output_dir)
    if args.process_index != 0:
        return []
    lines = ["", *describe_metrics(metrics)]
    if args.do_train and (out / "trainer_state.json").is_file():
        lines += explain_difference(context, metrics, read_json(out / "trainer_state.json"))
    training = f", including {format_duration(metrics.train.seconds)} of training" if metrics.train else ""
    lines.append(f"time        {format_duration(time.time() - started)}{training}")
    csv = out / "submission.csv"
    if csv.is_file():
        lines.append(f"submission  {csv} ({check_rows(csv, context.data):,} rows, checked)")
    for name, path in (("report", out / "report.html"), ("model", out / "model"), ("log", out / terminal.LOG_NAME)):
        if path.exists():
            lines.append(f"{name:<11} {path}")
    return [*lines, f"next        python -m transfer.predict {out} PICTURES"]


def command_to_push(command: str, output_dir: Path) -> str:
    """A run's command, changed to push the model that the run saved."""
    words, kept = [], True
    for word in shlex.split(command):
        if word.startswith("--"):
            kept = word[2:].partition("=")[0].replace("-", "_") not in training_only_names()
        if kept:
            words.append(word)
    # The last of two equal flags counts.
    words += ["--do_train", "false", "--model_name_or_path", str(output_dir / "model")]
    return shlex.join([*words, "--output_dir", f"{output_dir}-pushed"])


def push_results(context: RunContext, args: FinetuningArguments, images: Sequence[Path]) -> None:
    """Push model/, check that the copy classifies images as it does, record its link, make its Space."""
    run, out = context.run, Path(args.output_dir)
    try:
        link = push_model(out / "model", args.hub_model_id or "", args.hub_private_repo, args.hub_revision, images)
        trained_in = find_run_of(Path(run.model_name_or_path)) if not args.do_train else None
        for folder in filter(None, [out, trained_in]):  # so that a bundle of either holds the link
            extend_record(folder, model_link=dataclasses.asdict(link))
        print(f"model link  {link.url}", flush=True)
        if run.hub_space_id:
            is_timm = read_json(out / "model" / "config.json").get("model_type") == "timm_wrapper"
            packages = ("timm", "torchvision") if is_timm else ()
            print(f"demo        {push_space(run.hub_space_id, link, packages=packages)}", flush=True)
    except (UserError, KeyboardInterrupt) as fault:
        advice = command_to_push(describe_command(context.words), out)
        raise UserError(
            f"{str(fault) or 'interrupted'}; the run is finished and complete, push it again with: {advice}"
        ) from None


def readable_images(data: DatasetFiles) -> list[Path]:
    """The first images to predict, or to train on, that can be read; at most as many as an export is checked on."""
    files = data.test_files or data.train_files
    readable = (data.root / file for file in files if read_image(data.root, file)[1] is not None)
    return list(itertools.islice(readable, CHECKED_IMAGES))


def share_results(context: RunContext, args: FinetuningArguments) -> None:
    """Push, pack and export, if asked for, in this order: the zip holds the link of the pushed model."""
    if args.process_index != 0:
        return
    run, data, out = context.run, context.data, Path(args.output_dir)
    images = readable_images(data) if args.push_to_hub or run.export else []  # to check copies of the model
    if args.push_to_hub:
        push_results(context, args, images[:READ_BACK_IMAGES])
    if run.hand_in:
        print(f"hand-in     {run.hand_in}: {pack(out, Path(run.hand_in))} files", flush=True)
    if run.export:
        print(f"export      {export_onnx(out / 'model', out / 'model.onnx', images)}", flush=True)
