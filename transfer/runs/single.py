"""What a finished run is made into for others, if asked: an ONNX file, a pushed model and its demo, a hand-in pack.

What a run leaves in its folder, each file whole or not at all, the submission last.

A trained model measured: on held-out images, on unaugmented training images, and its predictions for the test.

What all trainings of a run share.

What a training starts from: the checkpoint's classifier, the decoded images, and the Trainer over both.
"""

import dataclasses
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
from accelerate.utils import set_seed

from transfer.bundle import check_target, pack
from transfer.config import TRAINING_ONLY, FinetuningArguments, RunArguments
from transfer.data.images import ImageGeometry, PixelDataset, PixelStore, open_pixel_store
from transfer.data.labels import open_template, render_submission
from transfer.data.layouts import DatasetFiles
from transfer.data.splits import take_evenly
from transfer.errors import UserError
from transfer.evaluation.metrics import measure, measure_calibration, write_metrics
from transfer.evaluation.predictions import Predictions, average_views, choose_views
from transfer.export import check_export, export_onnx
from transfer.files import anonymise_file, digest_of_folder, write_atomically, write_folder_atomically
from transfer.hub import check_push, push_model, push_space
from transfer.models.build import Classifier, build_classifier, load_trained
from transfer.models.layers import (
    describe_learning_rates,
    freeze_batch_norm_stats,
    freeze_layers,
    parameter_groups,
    trained_share,
)
from transfer.models.load import read_geometry
from transfer.models.lora import add_adapters, holds_adapters
from transfer.reporting.card import keep_card, write_card
from transfer.reporting.page import draw_report
from transfer.runs.record import describe_command, extend_record, find_run_of, write_record
from transfer.runtime import say
from transfer.submission import digest_of
from transfer.training.trainer import FinetuningTrainer, check_same_weights, logits_to_metrics
from transfer.transforms.evaluation import TTA_TRANSFORMS, EvaluationTransform, check_transform
from transfer.transforms.mixing import Mixing
from transfer.transforms.training import TrainTransform

READ_BACK_IMAGES = 10


def check_outputs(run: RunArguments, args: FinetuningArguments) -> None:
    """Refuse, before anything is trained, what could not be done with the results. Raises `UserError`."""
    if run.export:
        check_export(run.export)
    if run.hand_in:
        check_target(Path(run.hand_in))
    if args.push_to_hub:
        check_push(args.hub_model_id, run.hub_space_id)


def command_to_push(command: str, output_dir: Path) -> str:
    """A run's command changed to push the model that the run left."""
    words, kept = [], True
    for word in shlex.split(command):
        if word.startswith("--"):
            kept = word[2:].partition("=")[0] not in TRAINING_ONLY
        if kept:
            words.append(word)
    # The last of two equal flags counts.
    words += ["--do_train", "false", "--model_name_or_path", str(output_dir / "model")]
    return shlex.join([*words, "--output_dir", f"{output_dir}-pushed"])


def push_results(run: RunArguments, args: FinetuningArguments, images: Sequence[Path]) -> None:
    """Push model/, have the copy name images as the run's model does, record its link, make its Space."""
    out = Path(args.output_dir)
    try:
        link = push_model(out / "model", args.hub_model_id, args.hub_private_repo, args.hub_revision, images)
        trained_in = find_run_of(Path(run.model_name_or_path)) if not args.do_train else None
        for folder in filter(None, [out, trained_in]):  # so that a pack of either holds the link
            extend_record(folder, model_link=dataclasses.asdict(link))
        print(f"model link  {link.url}", flush=True)
        if run.hub_space_id:
            print(f"demo        {push_space(run.hub_space_id, link)}", flush=True)
    except UserError as fault:
        advice = command_to_push(describe_command(), out)
        raise UserError(f"{fault}; the run is finished and whole, push it again with: {advice}") from None


def publish(run: RunArguments, args: FinetuningArguments, push: bool, images: Sequence[Path]) -> None:
    """Push, pack, export, in this order: the pack holds the link. The images serve to check copies of the model."""
    out = Path(args.output_dir)
    if push:
        push_results(run, args, images[:READ_BACK_IMAGES])
    if run.hand_in:
        print(f"hand-in     {run.hand_in}: {pack(out, Path(run.hand_in))} files", flush=True)
    if run.export:
        print(f"export      {export_onnx(out / 'model', out / 'model.onnx', images)}", flush=True)


def save_model(trainer: FinetuningTrainer, place: Path) -> None:
    """model/: what from_pretrained and pipeline need, and nothing else, checked against the chosen checkpoint."""

    def write(folder: Path) -> None:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        if trainer.chosen_weights and not holds_adapters(trainer.chosen_weights):  # checked when they were merged
            check_same_weights(folder, trainer.chosen_weights)

    write_folder_atomically(place, write)


def make_submission(folder: DatasetFiles, ids: Sequence[str], scores: np.ndarray) -> bytes:
    """The csv of the test images' scores (M, classes)."""
    labels = dict(zip(ids, scores.argmax(-1).tolist(), strict=True))
    return render_submission(open_template(folder.template_path, folder.test_ids), labels)


def write_results(
    trainer: FinetuningTrainer,
    folder: DatasetFiles,
    record: dict,
    metrics: dict,
    predictions: Predictions,
    scores: np.ndarray | None = None,
) -> None:
    """Everything a run leaves, the submission last.

    The submission comes from `scores` (M, classes) of the test images, or from the model's own.
    """
    out, arguments = Path(trainer.args.output_dir), record["arguments"]
    save_model(trainer, out / "model")
    predictions.save(out)
    if "train" in metrics:
        write_card(out / "model", metrics, record, folder.class_names, folder.class_ids, predictions)
    else:
        keep_card(Path(arguments["model_name_or_path"]).expanduser(), out / "model", arguments["hub_model_id"])
    anonymise_file(out / "model" / "README.md")  # it is what gets pushed
    write_metrics(out, metrics)
    record |= {
        "metrics": metrics,
        "optimizer_steps": trainer.state.global_step,
        "weights_sha256": digest_of_folder(out / "model", "*.safetensors"),
    }
    submission = None
    if len(predictions.test_ids):
        scores = predictions.test_logits if scores is None else scores
        submission = make_submission(folder, predictions.test_ids.tolist(), scores)
        record |= {"submission_sha256": digest_of(submission)}
    draw_report(out, record, folder.root)
    write_record(out, record)
    if submission is not None:
        write_atomically(out / "submission.csv", submission)


def describe_results(metrics: dict) -> list[str]:
    """The figures that everybody asks for first, a line each."""
    validation = metrics["validation"]
    low, high = validation["accuracy_ci95"]
    lines, whose = [], ""
    if "seeds" in metrics:
        mean, std = (metrics[name]["validation"]["accuracy"] for name in ("mean", "std"))
        lines = [
            f"{len(metrics['seeds'])} seeds     validation accuracy {mean:.4f}, standard deviation {std:.4f}",
            f"soup        validation accuracy {metrics['soup']['accuracy']:.4f} "
            f"of seeds {', '.join(map(str, metrics['soup']['members']))}",
            f"ensemble    validation accuracy {metrics['ensemble']['accuracy']:.4f}",
            f"submission  from {metrics['submission']['from']}, the best on validation",
        ]
    if "folds" in metrics:
        mean, std = (metrics[name]["validation"]["accuracy"] for name in ("mean", "std"))
        lines = [
            f"{len(metrics['folds'])} folds     mean validation accuracy {mean:.4f}, standard deviation {std:.4f}",
            f"submission  from the {metrics['submission']['from']}",
        ]
        whose = "all images, each by the fold that had not seen it: "
    return [
        *lines,
        f"{whose}validation accuracy {validation['accuracy']:.4f} (95% interval {low:.4f} to {high:.4f}, "
        f"n={validation['n']})",
    ]


def evaluate_split(trainer: FinetuningTrainer, split: PixelDataset) -> dict:
    """Metrics of the evaluation view of a labelled split."""
    outcome = trainer.predict(split)
    return measure(outcome.predictions, outcome.label_ids)


def sample_of_train(dataset: datasets.DatasetDict, store: PixelStore) -> PixelDataset:
    """As many training images as there are validation images, evenly over the classes."""
    train = dataset["train"]
    positions = take_evenly(range(len(train)), train["file"][:], train["label"][:], len(dataset["validation"]))
    return PixelDataset(store, train.select(positions))


def predict_and_measure(
    trainer: FinetuningTrainer, dataset: datasets.DatasetDict, store: PixelStore, tta: Sequence[str] = ()
) -> tuple[Predictions, dict]:
    """Logits of the validation and test images; the accuracy on the first and how fast the second were predicted.

    Test-time views are averaged in where they raise the accuracy on the validation images.
    """
    labels = trainer.eval_dataset.labels
    tried = {name: trainer.predict_view(trainer.eval_dataset, name) for name in ["plain", *tta]}
    kept = choose_views(tried, labels)
    held_out = average_views([tried[name] for name in kept])
    metrics = {"validation": measure(held_out, labels), "calibration": measure_calibration(held_out, labels)}
    if tta:
        accuracies = {name: measure(logits, labels)["accuracy"] for name, logits in tried.items()}
        metrics["tta"] = {"kept": kept, "accuracy": accuracies}
    ids, tested = [], np.empty((0, held_out.shape[-1]))
    if "test" in dataset:
        start = time.perf_counter()
        unlabelled = PixelDataset(store, dataset["test"])
        tested = average_views([trainer.predict_view(unlabelled, name) for name in kept])
        seconds = time.perf_counter() - start
        ids = dataset["test"]["image_id"][:]
        metrics["prediction"] = {"samples_per_second": len(ids) / seconds, "seconds": seconds}
    return Predictions(dataset["validation"]["file"][:], labels, held_out, ids, tested), metrics


@dataclass(frozen=True)
class RunContext:
    """The data, their split, and what was asked for."""

    run: RunArguments
    arguments: dict  # as they were given, for run.json
    precision: str
    folder: DatasetFiles
    dataset: datasets.DatasetDict
    ends_by: float | None = None  # `--max_minutes`, in seconds since the epoch
    parent_split: datasets.DatasetDict | None = (
        None  # of one of several trainings: the split that all of them start from
    )

    @property
    def test_images(self) -> int:
        """How many images are to be predicted."""
        return len(self.dataset["test"]) if "test" in self.dataset else 0

    @property
    def views(self) -> int:
        """How often the final prediction shows each image to the model, at most."""
        return 1 + sum(len(TTA_TRANSFORMS[name]) for name in self.run.tta)


def prepare_model(context: RunContext, args: FinetuningArguments) -> Classifier:
    """The checkpoint with a head for our classes, or an already fine-tuned model where nothing is trained."""
    run, folder = context.run, context.folder
    if not args.do_train:
        return load_trained(run.model_name_or_path, folder.class_ids, run.model_revision, run.trust_remote_code)
    set_seed(args.seed)  # before the head is drawn
    classifier = build_classifier(
        run.model_name_or_path,
        folder.class_ids,
        folder.class_names,
        folder.synonyms,
        run.image_size,
        run.model_revision,
        run.head_warm_start,
        run.trust_remote_code,
        run.drop_path_rate,
    )
    kind, parameters = type(classifier.model).__name__, sum(p.numel() for p in classifier.model.parameters())
    if run.freeze_batch_norm_stats:
        freeze_batch_norm_stats(classifier.model)
    if run.freeze_layers:
        freeze_layers(classifier.model, run.freeze_layers)
    if run.lora_r:
        classifier = replace(classifier, model=add_adapters(classifier.model, run.lora_r))
    say(
        args,
        f"model       {kind}, {parameters / 1e6:.1f} M parameters, {trained_share(classifier.model):.2%} trained; "
        f"the head starts from the checkpoint's for {classifier.warm_classes} of {len(folder.class_ids)} classes",
    )
    groups = parameter_groups(classifier.model, args.learning_rate, args.weight_decay, run.layer_decay)
    say(args, f"rates       {describe_learning_rates(groups)}")
    if args.gradient_checkpointing and not classifier.model.supports_gradient_checkpointing:
        raise UserError(f"--gradient_checkpointing: {type(classifier.model).__name__} does not support it")
    return classifier


def prepare_pixels(args: FinetuningArguments, folder: DatasetFiles, geometry: ImageGeometry) -> PixelStore:
    """Every image decoded, once a machine."""
    with args.main_process_first(local=True, desc="decoding images"):
        return open_pixel_store(folder.root, folder.files, geometry)


def make_trainer(
    context: RunContext, args: FinetuningArguments, classifier: Classifier
) -> tuple[FinetuningTrainer, PixelStore]:
    """The Trainer of one model and the pixels that it looks at."""
    run, dataset = context.run, context.dataset
    geometry = read_geometry(classifier.processor)
    check_transform(classifier.processor, EvaluationTransform(geometry))
    store = prepare_pixels(args, context.folder, geometry)
    view = EvaluationTransform(geometry, store.cropped)
    train_transform = TrainTransform(
        view,
        run.train_image_size or [geometry.crop[0]],
        run.min_crop_scale,
        run.trivial_augment,
        run.erasing_probability,
        run.augment_until,
    )
    mixed = run.mixup_alpha > 0 or run.cutmix_alpha > 0
    trainer = FinetuningTrainer(
        classifier,
        args,
        eval_transform=view,
        train_transform=train_transform,
        layer_decay=run.layer_decay,
        mixing=Mixing(classifier.model.num_labels, run.mixup_alpha, run.cutmix_alpha) if mixed else None,
        ema_decay=run.ema_decay,
        train_dataset=PixelDataset(store, dataset["train"]),
        eval_dataset=PixelDataset(store, dataset["validation"]),
        compute_metrics=logits_to_metrics,
    )
    return trainer, store
