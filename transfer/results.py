"""What a run leaves in its folder, each file whole or not at all, the submission last."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from transfer.backbones.lora import holds_adapters
from transfer.data.layouts import ImageFolder
from transfer.predictions import Predictions
from transfer.privacy import anonymise_file
from transfer.record import digest_of_folder, save_whole_folder, write_record, write_whole
from transfer.reporting import draw_report, keep_card, write_card, write_metrics
from transfer.submission import digest_of, open_template, render_submission
from transfer.training.trainer import FinetuningTrainer, check_same_weights


def save_model(trainer: FinetuningTrainer, place: Path) -> None:
    """model/: what from_pretrained and pipeline need, and nothing else, checked against the chosen checkpoint."""

    def write(folder: Path) -> None:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        if trainer.chosen_weights and not holds_adapters(trainer.chosen_weights):  # checked when they were merged
            check_same_weights(folder, trainer.chosen_weights)

    save_whole_folder(place, write)


def make_submission(folder: ImageFolder, ids: Sequence[str], scores: np.ndarray) -> bytes:
    """The csv of the test images' scores (M, classes)."""
    labels = dict(zip(ids, scores.argmax(-1).tolist(), strict=True))
    return render_submission(open_template(folder.template_path, folder.test_ids), labels)


def write_results(
    trainer: FinetuningTrainer,
    folder: ImageFolder,
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
        write_card(out / "model", metrics, record, folder.class_names, folder.wnids, predictions)
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
        write_whole(out / "submission.csv", submission)


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
