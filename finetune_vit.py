"""Fine-tune a pretrained ViT or ConvNeXt on folders of images and write a Kaggle submission.

    accelerate launch --config_file accelerate_config.yaml finetune_vit.py recipes/sample.yaml
    accelerate launch --config_file accelerate_config.yaml finetune_vit.py recipes/offline.yaml --data_dir DATA.zip

The first needs no data and no hub and ends in under five minutes on two CPU cores. Every run leaves submission.csv,
metrics.json, run.json and model/ in outputs/<recipe name>; `--help` lists what a recipe may say.
"""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import transformers

from data_loading import describe_layout, load_dataset, open_data, split_fingerprint
from transfer.cli import chosen_arguments, known_names, parse_command_line
from transfer.config import FinetuningArguments, RunArguments, describe_arguments
from transfer.data.images import PixelStore
from transfer.data.layouts import DatasetFiles
from transfer.data.sources import open_hub_data
from transfer.errors import exits_cleanly
from transfer.files import claim_output_dir, is_finished
from transfer.models.build import load_trained
from transfer.models.load import fingerprint_of_weights
from transfer.runs.record import compare_results, compare_surroundings, make_record, read_record
from transfer.runs.repeats import best_of, combine_folds, combine_seeds, list_folds, list_seeds, start_of
from transfer.runs.search import (
    BEST_FILE,
    SearchSpace,
    hold_out_of_train,
    open_study,
    search,
    trial_arguments,
    write_best,
)
from transfer.runs.single import (
    RunContext,
    check_outputs,
    describe_results,
    evaluate_split,
    make_trainer,
    predict_and_measure,
    prepare_model,
    publish,
    sample_of_train,
    write_results,
)
from transfer.runs.timing import (
    describe_estimate,
    estimate,
    leave_no_traces,
    limit_evaluation,
    limit_training,
    process_start,
    share_of_time,
)
from transfer.runtime import resolve_mixed_precision, say, share_steps, tune_malloc, use_all_cores
from transfer.training.checkpoints import RunProvenance, find_checkpoint, last_checkpoint
from transfer.training.linear_probe import fit_probe
from transfer.training.trainer import FinetuningTrainer, start_training


def set_up_logging(args: FinetuningArguments) -> None:
    """Progress bars and warnings from the main process; nobody needs a line for each file that is loaded."""
    logging.basicConfig(level=logging.WARNING if args.process_index == 0 else logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()  # the one for loading weights; the Trainer keeps its own


def find_data(run: RunArguments) -> DatasetFiles:
    """The data set that `--data_dir` or `--dataset_name` means, its layout understood."""
    if run.dataset_name:
        return open_hub_data(run.dataset_name, run.dataset_config_name, run.label_column_name)
    return open_data(run.data_dir, run.classes_file)


def split_data(run: RunArguments, folder: DatasetFiles) -> datasets.DatasetDict:
    """Train, validation and test images of a run, or of one fold of it."""
    fold = (run.fold, run.kfold) if run.fold else None
    return load_dataset(folder, run.validation_fraction, run.split_seed, run.max_train_samples, fold)


def describe_splits(dataset: datasets.DatasetDict) -> str:
    """How many images each split has."""
    return ", ".join(f"{name} {len(split)}" for name, split in dataset.items())


def train_and_measure(
    context: RunContext, trainer: FinetuningTrainer, store: PixelStore, checkpoint: str | None
) -> dict:
    """Train, keep the best epoch and measure it on unaugmented training images."""
    dataset = context.dataset
    start = time.perf_counter()
    metrics = {"zero_epoch": {"accuracy": evaluate_split(trainer, trainer.eval_dataset)["accuracy"]}}
    say(f"zero epoch  validation accuracy {metrics['zero_epoch']['accuracy']:.4f} before any training")
    if context.ends_by:
        limit_training(context, trainer, time.perf_counter() - start)
    start = time.perf_counter()
    if context.run.linear_probe or context.run.linear_probe_only:
        penalty = fit_probe(trainer, store, dataset["train"], trainer.eval_transform.geometry.rule)
        metrics["linear_probe"] = {
            "accuracy": evaluate_split(trainer, trainer.eval_dataset)["accuracy"],
            "penalty": penalty,
            "seconds": time.perf_counter() - start,
        }
        say(f"probe       validation accuracy {metrics['linear_probe']['accuracy']:.4f} of a head on frozen features")
    if context.run.linear_probe_only:
        seconds = metrics["linear_probe"]["seconds"]
        speed = {"seconds": seconds, "samples_per_second": len(trainer.train_dataset) / seconds}
    else:
        speed = start_training(trainer, checkpoint)
    return metrics | {"train": evaluate_split(trainer, sample_of_train(dataset, store)) | speed}


def start_record(context: RunContext, trainer: FinetuningTrainer, store: PixelStore) -> dict:
    """What run.json holds of what a run starts from."""
    return make_record(
        context.arguments | {"seed": trainer.args.seed},
        context.precision,
        store.data_fingerprint,
        split_fingerprint(context.dataset),
        fingerprint_of_weights(trainer.model),
    )


def estimate_run(context: RunContext, args: FinetuningArguments) -> None:
    """Say what the run would take."""
    trainer, _ = make_trainer(context, args, prepare_model(context, args))
    found = estimate(trainer, args.num_train_epochs, context.test_images, context.views)
    images, tested = len(context.dataset["train"]), context.test_images
    say(*describe_estimate(found, args.per_device_train_batch_size, images, tested))


def check_origin(context: RunContext, trainer: FinetuningTrainer, record: dict, checkpoint: str | None) -> None:
    """Refuse other data than those of the run that is reproduced, or resumed; say what else differs."""
    if context.run.reproduce:
        now = (
            record
            if context.parent_split is None
            else record | {"split_fingerprint": split_fingerprint(context.parent_split)}
        )
        changes = compare_surroundings(Path(context.run.reproduce), now, part=context.parent_split is not None)
        say(*(f"changed     {line}" for line in changes or ["nothing: the same bits must come out"]))
    origin = RunProvenance(record["data_fingerprint"], record["split_fingerprint"], record["arguments"])
    if checkpoint:
        origin.check(Path(checkpoint))
    trainer.add_callback(origin)


def check_finished(context: RunContext, args: FinetuningArguments, folder: Path) -> None:
    """Refuse to go on beside a finished training of other data; warn of arguments that differ."""
    _, store = make_trainer(context, args, load_trained(str(folder / "model"), context.folder.class_ids))
    origin = RunProvenance(
        store.data_fingerprint, split_fingerprint(context.dataset), context.arguments | {"seed": args.seed}
    )
    origin.compare(folder, read_record(folder / "run.json"))


def run_once(context: RunContext, args: FinetuningArguments, checkpoint: str | None) -> dict:
    """Train one model, or take a trained one, measure it and write its results; returns its metrics."""
    trainer, store = make_trainer(context, args, prepare_model(context, args))
    record = start_record(context, trainer, store)
    check_origin(context, trainer, record, checkpoint)
    if (
        context.ends_by and context.parent_split is None
    ):  # the trainings of a repeated run are judged by the same images
        context = limit_evaluation(context, trainer, store)
    training = train_and_measure(context, trainer, store, checkpoint) if args.do_train else {}
    predictions, metrics = predict_and_measure(trainer, context.dataset, store, context.run.tta)
    metrics |= training
    if args.process_index == 0:
        write_results(trainer, context.folder, record, metrics, predictions)
    trainer.accelerator.wait_for_everyone()  # what follows may read them
    return metrics


def run_repeats(context: RunContext, args: FinetuningArguments) -> dict:
    """Train with every seed, or on every fold, each in its own folder, and put them together; returns the metrics."""
    resuming = args.resume_from_checkpoint is not None
    repeats = list_folds(context, args, split_data) if context.run.kfold else list_seeds(context, args)
    folders = [Path(one.output_dir) for _, one in repeats]
    reproduce = context.run.reproduce
    for number, (folder, (share, one)) in enumerate(zip(folders, repeats, strict=True), 1):
        if resuming and is_finished(folder):
            check_finished(share, one, folder)
            continue
        say(f"{folder.name:<11} training {number} of {len(repeats)}: {describe_splits(share.dataset)}")
        checkpoint = last_checkpoint(folder) if resuming else None
        ends_by = share_of_time(context.ends_by, len(repeats) - number + 1)
        share = replace(share, run=replace(share.run, reproduce=reproduce), ends_by=ends_by)
        run_once(share, one, str(checkpoint) if checkpoint else None)
        reproduce = None  # the first one says what differs
    return combine(context, args, folders)


def combine(context: RunContext, args: FinetuningArguments, folders: Sequence[Path]) -> dict:
    """Write what the finished trainings come to; the model is the soup of the seeds, or the best fold's."""
    trainer, store = make_trainer(
        context, args, load_trained(str(best_of(folders) / "model"), context.folder.class_ids)
    )
    record = start_record(context, trainer, store) | {"start_fingerprint": start_of(folders)}
    if context.run.kfold:
        whole = combine_folds(folders)
    else:
        views = context.run.tta
        whole = combine_seeds(folders, context.run.seeds, trainer, context.dataset, store, views)
    if args.process_index == 0:
        write_results(trainer, context.folder, record, whole.metrics, whole.predictions, whole.test_scores)
    return whole.metrics


def search_settings(context: RunContext, args: FinetuningArguments) -> None:
    """Try settings on a slice of the training images and write the best ones as a recipe."""
    run, out = context.run, Path(args.output_dir)
    space = SearchSpace.read(run.search_space, known_names())
    dataset = hold_out_of_train(context.dataset, run.validation_fraction, run.split_seed)
    identity = chosen_arguments(context.arguments) | {"ranges": space.ranges, "split": split_fingerprint(dataset)}
    study = open_study(out, identity, args.resume_from_checkpoint is not None, args.seed)

    def build(settings: dict) -> FinetuningTrainer:
        tried, once = trial_arguments(run, args, settings)
        trial = replace(context, run=tried, dataset=dataset)
        return make_trainer(trial, once, prepare_model(trial, once))[0]

    trainer = build({})
    say(f"search      {run.search} trials of training images alone: {describe_splits(dataset)}")
    best, accuracy = search(trainer, build, space, run.search, study, say)
    recipe = {"model_name_or_path": run.model_name_or_path} | chosen_arguments(context.arguments) | best
    say(write_best(out, recipe, accuracy), f"best settings in {out / BEST_FILE}")


@exits_cleanly
def main(argv: list[str] | None = None, started: float | None = None) -> None:
    """Run one recipe from data to submission; `--max_minutes` counts from `started` [now]."""
    started = time.time() if started is None else started
    precision = resolve_mixed_precision()
    use_all_cores()
    tune_malloc()
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
        check_outputs(run, args)
    arguments = describe_arguments(run, args)
    push, args.push_to_hub = args.push_to_hub, False  # the Trainer would upload the whole output folder
    say(precision, *share_steps(args))

    folder = find_data(run)
    say(*describe_layout(folder))
    dataset = split_data(run, folder)
    if not run.kfold or run.fold:  # else each fold has its own
        say(f"splits      {describe_splits(dataset)}")
    ends_by = started + 60 * run.max_minutes if run.max_minutes else None
    context = RunContext(run, arguments, precision, folder, dataset, ends_by)

    if run.estimate or run.search:
        (estimate_run if run.estimate else search_settings)(context, args)
        return
    metrics = run_repeats(context, args) if repeated else run_once(context, args, checkpoint)
    say(*describe_results(metrics), f"results in {out}")
    if args.process_index == 0:
        publish(run, args, push, [folder.root / file for file in folder.test_files or folder.train_files])
    if run.reproduce and args.process_index == 0:
        lines, reproduced = compare_results(Path(run.reproduce), out / "run.json")
        say(*lines)
        sys.exit(0 if reproduced else 1)


if __name__ == "__main__":
    main(started=process_start())
