"""Fine-tune a pretrained ViT or ConvNeXt on folders of images and write a Kaggle submission.

    accelerate launch --config_file accelerate_config.yaml finetune_vit.py recipes/sample.yaml
    accelerate launch --config_file accelerate_config.yaml finetune_vit.py recipes/offline.yaml --data_dir DATA.zip

The first needs no data and no hub and ends in under five minutes on two CPU cores. Every run leaves submission.csv,
metrics.json, run.json and model/ in outputs/<recipe name>; `--help` lists what a recipe may say.
"""

import logging
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import transformers
from accelerate.utils import set_seed

from data_loading import (
    ImageFolder,
    describe_layout,
    load_dataset,
    open_data,
    split_fingerprint,
    take_evenly,
)
from transfer import UserError, exits_cleanly
from transfer.arguments import FinetuningArguments, RunArguments, parse_command_line
from transfer.augmentation import EvaluationView, TrainingView, ViewGeometry, check_view, read_geometry
from transfer.estimate import describe_estimate, estimate, leave_no_traces
from transfer.hub import push_model
from transfer.modeling import Classifier, build_classifier, load_trained
from transfer.pixels import PixelDataset, PixelStore, open_pixel_store
from transfer.predictions import Predictions
from transfer.record import (
    claim_output_dir,
    describe_arguments,
    make_record,
    save_whole_folder,
    write_record,
    write_whole,
)
from transfer.reporting import keep_card, measure, write_card, write_metrics
from transfer.submission import digest_of, make_template, read_template, render_submission
from transfer.training import (
    FinetuningTrainer,
    check_same_weights,
    find_checkpoint,
    keep_freed_memory,
    logits_to_accuracy,
    settle_precision,
    start_training,
    use_all_cores,
)


def say(args: FinetuningArguments, *lines: str) -> None:
    """Print from the main process alone."""
    if args.process_index == 0:
        print(*lines, sep="\n", flush=True)


def set_up_logging(args: FinetuningArguments) -> None:
    """Progress bars and warnings from the main process; nobody needs a line for each file that is loaded."""
    logging.basicConfig(level=logging.WARNING)
    transformers.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()  # the one for loading weights; the Trainer keeps its own


def prepare_model(run: RunArguments, args: FinetuningArguments, folder: ImageFolder) -> Classifier:
    """The checkpoint with a head for our classes, or an already fine-tuned model where nothing is trained."""
    if not args.do_train:
        return load_trained(run.model_name_or_path, folder.wnids, run.model_revision)
    set_seed(args.seed)  # before the head is drawn
    classifier = build_classifier(
        run.model_name_or_path,
        folder.wnids,
        folder.class_names,
        folder.glosses,
        run.image_size,
        run.model_revision,
        run.head_warm_start,
    )
    parameters = sum(p.numel() for p in classifier.model.parameters())
    say(
        args,
        f"model       {type(classifier.model).__name__}, {parameters / 1e6:.1f} M parameters; "
        f"the head starts from the checkpoint's for {classifier.warm_classes} of {len(folder.wnids)} classes",
    )
    return classifier


def prepare_pixels(args: FinetuningArguments, folder: ImageFolder, geometry: ViewGeometry) -> PixelStore:
    """Every image decoded, once a machine."""
    files = folder.train_files + folder.test_files
    with args.main_process_first(local=True, desc="decoding images"):
        return open_pixel_store(folder.root, files, geometry.apply, geometry.crop, geometry.rule)


def make_trainer(
    run: RunArguments,
    args: FinetuningArguments,
    classifier: Classifier,
    store: PixelStore,
    dataset: datasets.DatasetDict,
) -> FinetuningTrainer:
    geometry = read_geometry(classifier.processor)
    view = EvaluationView(geometry, store.cropped)
    return FinetuningTrainer(
        classifier,
        args,
        evaluation_view=view,
        training_view=TrainingView(view, run.train_image_size or geometry.crop[0], run.min_crop_area),
        layer_decay=run.layer_decay,
        train_dataset=PixelDataset(store, dataset["train"]),
        eval_dataset=PixelDataset(store, dataset["validation"]),
        compute_metrics=logits_to_accuracy,
    )


def evaluate_split(trainer: FinetuningTrainer, split: PixelDataset) -> dict:
    """Metrics of the evaluation view of a labelled split."""
    outcome = trainer.predict(split)
    return measure(outcome.predictions, outcome.label_ids)


def sample_of_train(dataset: datasets.DatasetDict, store: PixelStore) -> PixelDataset:
    """As many training images as there are validation images, evenly over the classes."""
    train = dataset["train"]
    positions = take_evenly(range(len(train)), train["file"][:], train["label"][:], len(dataset["validation"]))
    return PixelDataset(store, train.select(positions))


def train_and_measure(
    trainer: FinetuningTrainer, dataset: datasets.DatasetDict, store: PixelStore, checkpoint: str | None
) -> dict:
    """Train, keep the best epoch and measure it on unaugmented training images."""
    zero_epoch = evaluate_split(trainer, trainer.eval_dataset)["accuracy"]
    say(trainer.args, f"zero epoch  validation accuracy {zero_epoch:.4f} before any training")
    speed = start_training(trainer, checkpoint)
    train = evaluate_split(trainer, sample_of_train(dataset, store))
    return {"zero_epoch": {"accuracy": zero_epoch}, "train": train | speed}


def predict_and_measure(
    trainer: FinetuningTrainer, dataset: datasets.DatasetDict, store: PixelStore
) -> tuple[Predictions, dict]:
    """Logits of the validation and test images; the accuracy on the first and how fast the second were predicted."""
    held_out = trainer.predict(trainer.eval_dataset)
    metrics = {"validation": measure(held_out.predictions, held_out.label_ids)}
    ids, logits = [], np.empty((0, held_out.predictions.shape[-1]))
    if "test" in dataset:
        start = time.perf_counter()
        logits = trainer.predict(PixelDataset(store, dataset["test"])).predictions
        seconds = time.perf_counter() - start
        ids = dataset["test"]["image_id"][:]
        metrics["prediction"] = {"samples_per_second": len(ids) / seconds, "seconds": seconds}
    files = dataset["validation"]["file"][:]
    return Predictions(files, held_out.label_ids, held_out.predictions, ids, logits), metrics


def save_model(trainer: FinetuningTrainer, place: Path) -> None:
    """model/: what from_pretrained and pipeline need, and nothing else, checked against the chosen checkpoint."""

    def write(folder: Path) -> None:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        if trainer.state.best_model_checkpoint:
            check_same_weights(folder, Path(trainer.state.best_model_checkpoint))

    save_whole_folder(place, write)


def write_results(
    trainer: FinetuningTrainer, folder: ImageFolder, metrics: dict, predictions: Predictions, record: dict
) -> None:
    """Everything a run leaves, the submission last."""
    out = Path(trainer.args.output_dir)
    save_model(trainer, out / "model")
    if "train" in metrics:
        write_card(out / "model", metrics, record, folder.class_names)
    else:
        keep_card(
            Path(record["arguments"]["model_name_or_path"]).expanduser(),
            out / "model",
            record["arguments"]["hub_model_id"],
        )
    predictions.save(out)
    write_metrics(out, metrics)
    if not len(predictions.test_ids):
        write_record(out, record)
        return
    labels = dict(zip(predictions.test_ids.tolist(), predictions.test_logits.argmax(-1).tolist(), strict=True))
    template = read_template(folder.template_path) if folder.template_path else make_template(sorted(labels))
    submission = render_submission(template, labels)
    write_record(out, record | {"submission_sha256": digest_of(submission)})
    write_whole(out / "submission.csv", submission)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run one recipe from data to submission."""
    precision = settle_precision()
    use_all_cores()
    keep_freed_memory()
    run, args, _ = parse_command_line(sys.argv[1:] if argv is None else argv)
    out = Path(args.output_dir)
    checkpoint = find_checkpoint(out, args.resume_from_checkpoint)
    if run.estimate:
        leave_no_traces(args)
    elif args.process_index == 0:
        claim_output_dir(out, resuming=checkpoint is not None)
    set_up_logging(args)
    arguments = describe_arguments(run, args)
    push, args.push_to_hub = args.push_to_hub, False  # the Trainer would upload the whole output folder
    say(args, precision)

    folder = open_data(run.data_dir)
    say(args, *describe_layout(folder))
    dataset = load_dataset(folder, run.validation_fraction, run.split_seed, run.max_train_samples)
    say(args, "splits      " + ", ".join(f"{name} {len(split)}" for name, split in dataset.items()))

    classifier = prepare_model(run, args, folder)
    if args.gradient_checkpointing and not classifier.model.supports_gradient_checkpointing:
        raise UserError(f"--gradient_checkpointing: {type(classifier.model).__name__} does not support it")
    geometry = read_geometry(classifier.processor)
    check_view(classifier.processor, EvaluationView(geometry))
    store = prepare_pixels(args, folder, geometry)
    trainer = make_trainer(run, args, classifier, store, dataset)

    if run.estimate:
        tested = len(dataset["test"]) if "test" in dataset else 0
        batch, images = args.per_device_train_batch_size, len(dataset["train"])
        found = estimate(trainer, args.num_train_epochs, tested)
        say(args, *describe_estimate(found, batch, images, tested))
        return
    training = train_and_measure(trainer, dataset, store, checkpoint) if args.do_train else {}
    predictions, metrics = predict_and_measure(trainer, dataset, store)
    metrics |= training

    if args.process_index == 0:
        record = make_record(arguments, precision, store.data_fingerprint, split_fingerprint(dataset))
        write_results(trainer, folder, metrics, predictions, record)
    validation = metrics["validation"]
    low, high = validation["accuracy_ci95"]
    say(
        args,
        f"validation accuracy {validation['accuracy']:.4f} (95% interval {low:.4f} to {high:.4f}, "
        f"n={validation['n']}); results in {out}",
    )
    if push and args.process_index == 0:
        link = push_model(out / "model", args.hub_model_id, args.hub_private_repo, args.hub_revision)
        say(args, f"model link  {link}")


if __name__ == "__main__":
    main()
