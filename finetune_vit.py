"""Fine-tune a pretrained ViT or ConvNeXt on folders of images and write a Kaggle submission.

    accelerate launch --config_file accelerate_config.yaml finetune_vit.py recipes/sample.yaml
    accelerate launch --config_file accelerate_config.yaml finetune_vit.py recipes/offline.yaml --data_dir DATA.zip

The first needs no data and no hub and ends in under five minutes on two CPU cores. Every run leaves submission.csv,
metrics.json, run.json and model/ in outputs/<recipe name>; `--help` lists what a recipe may say.
"""

import functools
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import transformers
from accelerate.utils import broadcast_object_list, set_seed

from data_loading import (
    ImageFolder,
    describe_layout,
    load_dataset,
    open_data,
    split_fingerprint,
)
from transfer import UserError, exits_cleanly
from transfer.arguments import FinetuningArguments, RunArguments
from transfer.augmentation import TEST_TIME_VIEWS, EvaluationView, TrainingView, check_view
from transfer.backbones.geometry import ViewGeometry, read_geometry
from transfer.backbones.layers import freeze_levels, hold_batch_norms, trained_share
from transfer.backbones.lora import add_adapters
from transfer.command_line import chosen_arguments, known_names, parse_command_line
from transfer.data.hub_data import open_hub_data
from transfer.data.pixels import PixelDataset, PixelStore, open_pixel_store
from transfer.data.splits import take_evenly
from transfer.estimate import describe_estimate, estimate, leave_no_traces, time_evaluation
from transfer.evaluation import evaluate_split, predict_and_measure, sample_of_train
from transfer.experiment import fold_arguments, seed_arguments, trial_arguments
from transfer.mixing import Mixing
from transfer.modeling import Classifier, build_classifier, load_trained
from transfer.probe import fit_probe
from transfer.publishing import check_wishes, publish
from transfer.record import (
    claim_output_dir,
    describe_arguments,
    fingerprint_of_weights,
    is_finished,
    make_record,
)
from transfer.repeats import best_of, combine_folds, combine_seeds, start_of
from transfer.reproduction import compare_results, compare_surroundings, read_record
from transfer.results import describe_results, write_results
from transfer.search import BEST_FILE, SearchSpace, hold_out_of_train, open_study, search, write_best
from transfer.training.budget import Deadline, TimeBudget, images_that_fit, process_start, share_of_time
from transfer.training.checkpoints import Origin, find_checkpoint, last_checkpoint
from transfer.training.processes import share_steps
from transfer.training.trainer import (
    FinetuningTrainer,
    keep_freed_memory,
    logits_to_metrics,
    settle_precision,
    start_training,
    use_all_cores,
)

IMAGES_TIMED = 128  # to foresee how long evaluations take


@dataclass(frozen=True)
class Task:
    """What all trainings of a run share."""

    run: RunArguments
    arguments: dict  # as they were given, for run.json
    precision: str
    folder: ImageFolder
    dataset: datasets.DatasetDict
    ends_by: float | None = None  # `--max_minutes`, in seconds since the epoch
    whole: datasets.DatasetDict | None = None  # of one of several trainings: the split that all of them start from


def say(args: FinetuningArguments, *lines: str) -> None:
    """Print from the main process alone."""
    if args.process_index == 0:
        print(*lines, sep="\n", flush=True)


def set_up_logging(args: FinetuningArguments) -> None:
    """Progress bars and warnings from the main process; nobody needs a line for each file that is loaded."""
    logging.basicConfig(level=logging.WARNING if args.process_index == 0 else logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()  # the one for loading weights; the Trainer keeps its own


def find_data(run: RunArguments) -> ImageFolder:
    """The data set that `--data_dir` or `--dataset_name` means, its layout understood."""
    if run.dataset_name:
        return open_hub_data(run.dataset_name, run.dataset_config_name, run.label_column_name)
    return open_data(run.data_dir, run.classes_file)


def split_data(run: RunArguments, folder: ImageFolder) -> datasets.DatasetDict:
    """Train, validation and test images of a run, or of one fold of it."""
    fold = (run.fold, run.kfold) if run.fold else None
    return load_dataset(folder, run.validation_fraction, run.split_seed, run.max_train_samples, fold)


def describe_splits(dataset: datasets.DatasetDict) -> str:
    """How many images each split has."""
    return ", ".join(f"{name} {len(split)}" for name, split in dataset.items())


def prepare_model(task: Task, args: FinetuningArguments) -> Classifier:
    """The checkpoint with a head for our classes, or an already fine-tuned model where nothing is trained."""
    run, folder = task.run, task.folder
    if not args.do_train:
        return load_trained(run.model_name_or_path, folder.wnids, run.model_revision, run.trust_remote_code)
    set_seed(args.seed)  # before the head is drawn
    classifier = build_classifier(
        run.model_name_or_path,
        folder.wnids,
        folder.class_names,
        folder.glosses,
        run.image_size,
        run.model_revision,
        run.head_warm_start,
        run.trust_remote_code,
        run.drop_path_rate,
    )
    kind, parameters = type(classifier.model).__name__, sum(p.numel() for p in classifier.model.parameters())
    if run.hold_batch_norms:
        hold_batch_norms(classifier.model)
    if run.freeze_levels:
        freeze_levels(classifier.model, run.freeze_levels)
    if run.lora_r:
        classifier = replace(classifier, model=add_adapters(classifier.model, run.lora_r))
    say(
        args,
        f"model       {kind}, {parameters / 1e6:.1f} M parameters, {trained_share(classifier.model):.2%} trained; "
        f"the head starts from the checkpoint's for {classifier.warm_classes} of {len(folder.wnids)} classes",
    )
    if args.gradient_checkpointing and not classifier.model.supports_gradient_checkpointing:
        raise UserError(f"--gradient_checkpointing: {type(classifier.model).__name__} does not support it")
    return classifier


def prepare_pixels(args: FinetuningArguments, folder: ImageFolder, geometry: ViewGeometry) -> PixelStore:
    """Every image decoded, once a machine."""
    with args.main_process_first(local=True, desc="decoding images"):
        return open_pixel_store(folder.root, folder.files, geometry.apply, geometry.crop, geometry.rule)


def make_trainer(
    task: Task, args: FinetuningArguments, classifier: Classifier
) -> tuple[FinetuningTrainer, PixelStore]:
    """The Trainer of one model and the pixels that it looks at."""
    run, dataset = task.run, task.dataset
    geometry = read_geometry(classifier.processor)
    check_view(classifier.processor, EvaluationView(geometry))
    store = prepare_pixels(args, task.folder, geometry)
    view = EvaluationView(geometry, store.cropped)
    training_view = TrainingView(
        view,
        run.train_image_size or [geometry.crop[0]],
        run.min_crop_area,
        run.trivial_augment,
        run.erasing_probability,
        run.strong_until,
    )
    mixed = run.mixup_alpha > 0 or run.cutmix_alpha > 0
    trainer = FinetuningTrainer(
        classifier,
        args,
        evaluation_view=view,
        training_view=training_view,
        layer_decay=run.layer_decay,
        mixing=Mixing(classifier.model.num_labels, run.mixup_alpha, run.cutmix_alpha) if mixed else None,
        ema_decay=run.ema_decay,
        train_dataset=PixelDataset(store, dataset["train"]),
        eval_dataset=PixelDataset(store, dataset["validation"]),
        compute_metrics=logits_to_metrics,
    )
    return trainer, store


def count_views(task: Task) -> int:
    """How often the final prediction shows each image to the model, at most."""
    return 1 + sum(len(TEST_TIME_VIEWS[name]) for name in task.run.test_time_views)


def limit_time(task: Task, trainer: FinetuningTrainer, seconds: float) -> None:
    """Let training end in time for the csv; evaluating the validation images once takes so many seconds."""
    tested = len(task.dataset["test"]) if "test" in task.dataset else 0
    held_out = len(task.dataset["validation"])
    afterwards = held_out + count_views(task) * (held_out + tested)  # as many training images, once
    deadline = Deadline(task.ends_by, afterwards)
    left = functools.partial(deadline.seconds_to_train, seconds / held_out)
    trainer.add_callback(TimeBudget(left, pause=seconds if trainer.average is None else 2 * seconds))


def limit_evaluation(task: Task, trainer: FinetuningTrainer, store: PixelStore) -> Task:
    """Where `--max_minutes` is too short to evaluate all held-out images, hold out some, evenly over the classes."""
    run, held_out, views = task.run, task.dataset["validation"], count_views(task)
    tested = len(task.dataset["test"]) if "test" in task.dataset else 0
    seconds = time_evaluation(trainer, trainer.eval_dataset, IMAGES_TIMED)
    passes = 3 + views + (run.ema_decay > 0) + (run.probe or run.probe_only)  # before, after an epoch, in the end
    left = Deadline(task.ends_by, views * tested).seconds_to_train(seconds)
    if left < 0:
        late = f"about {-left:.0f} s late: predicting takes longer than --max_minutes"
        say(trainer.args, f"time        the csv comes {late}")
    count = max(trainer.model.num_labels, images_that_fit(left, seconds, passes))
    if trainer.args.world_size > 1:
        [count] = broadcast_object_list([count])
    if count >= len(held_out):
        return task
    taken = take_evenly(range(len(held_out)), held_out["file"][:], held_out["label"][:], count)
    dataset = datasets.DatasetDict(task.dataset | {"validation": held_out.select(taken)})
    trainer.eval_dataset = PixelDataset(store, dataset["validation"])
    say(trainer.args, f"validation  on {count} of {len(held_out)} images: --max_minutes leaves no time for more")
    return replace(task, dataset=dataset)


def train_and_measure(task: Task, trainer: FinetuningTrainer, store: PixelStore, checkpoint: str | None) -> dict:
    """Train, keep the best epoch and measure it on unaugmented training images."""
    args, dataset = trainer.args, task.dataset
    start = time.perf_counter()
    metrics = {"zero_epoch": {"accuracy": evaluate_split(trainer, trainer.eval_dataset)["accuracy"]}}
    say(args, f"zero epoch  validation accuracy {metrics['zero_epoch']['accuracy']:.4f} before any training")
    if task.ends_by:
        limit_time(task, trainer, time.perf_counter() - start)
    start = time.perf_counter()
    if task.run.probe or task.run.probe_only:
        penalty = fit_probe(trainer, store, dataset["train"], trainer.evaluation_view.geometry.rule)
        metrics["probe"] = {
            "accuracy": evaluate_split(trainer, trainer.eval_dataset)["accuracy"],
            "penalty": penalty,
            "seconds": time.perf_counter() - start,
        }
        say(args, f"probe       validation accuracy {metrics['probe']['accuracy']:.4f} of a head on frozen features")
    if task.run.probe_only:
        seconds = metrics["probe"]["seconds"]
        speed = {"seconds": seconds, "samples_per_second": len(trainer.train_dataset) / seconds}
    else:
        speed = start_training(trainer, checkpoint)
    return metrics | {"train": evaluate_split(trainer, sample_of_train(dataset, store)) | speed}


def start_record(task: Task, trainer: FinetuningTrainer, store: PixelStore) -> dict:
    """What run.json holds of what a run starts from."""
    return make_record(
        task.arguments | {"seed": trainer.args.seed},
        task.precision,
        store.data_fingerprint,
        split_fingerprint(task.dataset),
        fingerprint_of_weights(trainer.model),
    )


def estimate_run(task: Task, args: FinetuningArguments) -> None:
    """Say what the run would take."""
    trainer, _ = make_trainer(task, args, prepare_model(task, args))
    tested = len(task.dataset["test"]) if "test" in task.dataset else 0
    found = estimate(trainer, args.num_train_epochs, tested, count_views(task))
    say(args, *describe_estimate(found, args.per_device_train_batch_size, len(task.dataset["train"]), tested))


def check_origin(task: Task, trainer: FinetuningTrainer, record: dict, checkpoint: str | None) -> None:
    """Refuse other data than those of the run that is reproduced, or resumed; say what else differs."""
    if task.run.reproduce:
        now = record if task.whole is None else record | {"split_fingerprint": split_fingerprint(task.whole)}
        changes = compare_surroundings(Path(task.run.reproduce), now, part=task.whole is not None)
        say(trainer.args, *(f"changed     {line}" for line in changes or ["nothing: the same bits must come out"]))
    origin = Origin(record["data_fingerprint"], record["split_fingerprint"], record["arguments"])
    if checkpoint:
        origin.check(Path(checkpoint))
    trainer.add_callback(origin)


def check_finished(task: Task, args: FinetuningArguments, folder: Path) -> None:
    """Refuse to go on beside a finished training of other data; warn of arguments that differ."""
    _, store = make_trainer(task, args, load_trained(str(folder / "model"), task.folder.wnids))
    origin = Origin(store.data_fingerprint, split_fingerprint(task.dataset), task.arguments | {"seed": args.seed})
    origin.compare(folder, read_record(folder / "run.json"))


def run_once(task: Task, args: FinetuningArguments, checkpoint: str | None) -> dict:
    """Train one model, or take a trained one, measure it and write its results; returns its metrics."""
    trainer, store = make_trainer(task, args, prepare_model(task, args))
    record = start_record(task, trainer, store)
    check_origin(task, trainer, record, checkpoint)
    if task.ends_by and task.whole is None:  # the trainings of a repeated run are judged by the same images
        task = limit_evaluation(task, trainer, store)
    training = train_and_measure(task, trainer, store, checkpoint) if args.do_train else {}
    predictions, metrics = predict_and_measure(trainer, task.dataset, store, task.run.test_time_views)
    metrics |= training
    if args.process_index == 0:
        write_results(trainer, task.folder, record, metrics, predictions)
    trainer.accelerator.wait_for_everyone()  # what follows may read them
    return metrics


def run_repeats(task: Task, args: FinetuningArguments) -> dict:
    """Train with every seed, or on every fold, each in its own folder, and put them together; returns the metrics."""
    resuming = args.resume_from_checkpoint is not None
    repeats = list_folds(task, args) if task.run.kfold else list_seeds(task, args)
    folders = [Path(one.output_dir) for _, one in repeats]
    reproduce = task.run.reproduce
    for number, (folder, (share, one)) in enumerate(zip(folders, repeats, strict=True), 1):
        if resuming and is_finished(folder):
            check_finished(share, one, folder)
            continue
        say(args, f"{folder.name:<11} training {number} of {len(repeats)}: {describe_splits(share.dataset)}")
        checkpoint = last_checkpoint(folder) if resuming else None
        ends_by = share_of_time(task.ends_by, len(repeats) - number + 1)
        share = replace(share, run=replace(share.run, reproduce=reproduce), ends_by=ends_by)
        run_once(share, one, str(checkpoint) if checkpoint else None)
        reproduce = None  # the first one says what differs
    return combine(task, args, folders)


def list_seeds(task: Task, args: FinetuningArguments) -> list[tuple[Task, FinetuningArguments]]:
    """A training for every seed."""
    repeats = []
    for seed in task.run.seeds:
        one = seed_arguments(args, seed)
        arguments = task.arguments | {"seeds": None, "output_dir": one.output_dir}
        repeats.append((replace(task, arguments=arguments, whole=task.dataset), one))
    return repeats


def list_folds(task: Task, args: FinetuningArguments) -> list[tuple[Task, FinetuningArguments]]:
    """A training for every fold, on its own split."""
    repeats = []
    for fold in range(1, task.run.kfold + 1):
        one, run = fold_arguments(args, fold), replace(task.run, fold=fold)
        arguments = task.arguments | {"fold": fold, "output_dir": one.output_dir}
        dataset = split_data(run, task.folder)
        repeats.append((replace(task, run=run, arguments=arguments, dataset=dataset, whole=task.dataset), one))
    return repeats


def combine(task: Task, args: FinetuningArguments, folders: Sequence[Path]) -> dict:
    """Write what the finished trainings come to; the model is the soup of the seeds, or the best fold's."""
    trainer, store = make_trainer(task, args, load_trained(str(best_of(folders) / "model"), task.folder.wnids))
    record = start_record(task, trainer, store) | {"start_fingerprint": start_of(folders)}
    if task.run.kfold:
        whole = combine_folds(folders)
    else:
        views = task.run.test_time_views
        whole = combine_seeds(folders, task.run.seeds, trainer, task.dataset, store, views)
    if args.process_index == 0:
        write_results(trainer, task.folder, record, whole.metrics, whole.predictions, whole.test_scores)
    return whole.metrics


def search_settings(task: Task, args: FinetuningArguments) -> None:
    """Try settings on a slice of the training images and write the best ones as a recipe."""
    run, out = task.run, Path(args.output_dir)
    space = SearchSpace.read(run.search_space, known_names())
    dataset = hold_out_of_train(task.dataset, run.validation_fraction, run.split_seed)
    identity = chosen_arguments(task.arguments) | {"ranges": space.ranges, "split": split_fingerprint(dataset)}
    study = open_study(out, identity, args.resume_from_checkpoint is not None, args.seed)

    def build(settings: dict) -> FinetuningTrainer:
        tried, once = trial_arguments(run, args, settings)
        trial = replace(task, run=tried, dataset=dataset)
        return make_trainer(trial, once, prepare_model(trial, once))[0]

    trainer = build({})
    say(args, f"search      {run.search} trials of training images alone: {describe_splits(dataset)}")
    best, accuracy = search(trainer, build, space, run.search, study, functools.partial(say, args))
    recipe = {"model_name_or_path": run.model_name_or_path} | chosen_arguments(task.arguments) | best
    say(args, write_best(out, recipe, accuracy), f"best settings in {out / BEST_FILE}")


@exits_cleanly
def main(argv: list[str] | None = None, started: float | None = None) -> None:
    """Run one recipe from data to submission; `--max_minutes` counts from `started` [now]."""
    started = time.time() if started is None else started
    precision = settle_precision()
    use_all_cores()
    keep_freed_memory()
    run, args, _ = parse_command_line(sys.argv[1:] if argv is None else argv)
    out = Path(args.output_dir)
    repeated = run.search or run.seeds or (run.kfold and not run.fold)
    checkpoint = None if repeated else find_checkpoint(out, args.resume_from_checkpoint)
    if run.estimate:
        leave_no_traces(args)
    elif args.process_index == 0 and not run.search:
        claim_output_dir(out, resuming=args.resume_from_checkpoint is not None)
    set_up_logging(args)
    if args.process_index == 0 and not run.estimate:
        check_wishes(run, args)
    arguments = describe_arguments(run, args)
    push, args.push_to_hub = args.push_to_hub, False  # the Trainer would upload the whole output folder
    say(args, precision, *share_steps(args))

    folder = find_data(run)
    say(args, *describe_layout(folder))
    dataset = split_data(run, folder)
    if not run.kfold or run.fold:  # else each fold has its own
        say(args, f"splits      {describe_splits(dataset)}")
    ends_by = started + 60 * run.max_minutes if run.max_minutes else None
    task = Task(run, arguments, precision, folder, dataset, ends_by)

    if run.estimate or run.search:
        (estimate_run if run.estimate else search_settings)(task, args)
        return
    metrics = run_repeats(task, args) if repeated else run_once(task, args, checkpoint)
    say(args, *describe_results(metrics), f"results in {out}")
    if args.process_index == 0:
        publish(run, args, push, [folder.root / file for file in folder.test_files or folder.train_files])
    if run.reproduce and args.process_index == 0:
        lines, reproduced = compare_results(Path(run.reproduce), out / "run.json")
        say(args, *lines)
        sys.exit(0 if reproduced else 1)


if __name__ == "__main__":
    main(started=process_start())
