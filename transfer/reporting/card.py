"""The model card: README.md of a saved model, every number of it from the run's own files."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from scipy.special import softmax

from transfer.config import card_names
from transfer.evaluation.comparison import look_up, name_base
from transfer.evaluation.metrics import (
    CALIBRATION_BINS,
    count_confusions,
    find_confused_pairs,
    judge_confidence,
    score_classes,
)
from transfer.evaluation.predictions import Predictions
from transfer.files import leave_out_places
from transfer.reporting.curves import STAGES, read_accuracy

UNPUSHED = "path/to/model"  # how a card names a model that is not on the Hub
WORST_CLASSES, CONFUSED_PAIRS = 5, 5

CARD = """---
{metadata}
---

# {title}

An image classifier of {classes} classes: {base} fine-tuned on {data}.

```python
from transformers import pipeline

classify = pipeline("image-classification", model="{model_id}")
print(classify("some_image.jpg"))
```

## Results

| measured on | images | accuracy | 95% interval | top-5 | macro F1 | loss |
|---|---|---|---|---|---|---|
{rows}

{remarks}

## Where it fails

{failures}

## Training

{training}

## Run it again

```bash
{command}
```

{origin}

## Data and limits

{limits}
"""

IMAGENET_TERMS = (
    "These images derive from ImageNet, and its terms hold: non-commercial research and education. A backbone that "
    "was pretrained on ImageNet has then seen many of them at full size, so the scores say little about transfer to "
    "images that it has never seen."
)
SAMPLE_TERMS = "The images are generated: the model is of no use but to see that everything works."
OTHER_TERMS = (
    "No licence is stated here: what may be done with the model depends on the terms of its training images and of "
    "the checkpoint that it started from."
)


def _literal(text: str) -> str:
    """A name from the data as markdown shows it: no markup, no table's edge, one line."""
    return re.sub(r"([\\`*_{}\[\]|#~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _row(name: str, m: Mapping) -> str:
    low, high = m["accuracy_ci95"]
    return (
        f"| {name} | {m['n']} | {m['accuracy']:.4f} | {low:.4f} to {high:.4f} | {m['top5_accuracy']:.4f} "
        f"| {m['macro_f1']:.4f} | {m['loss']:.4f} |"
    )


def _say_repeats(metrics: Mapping) -> list[str]:
    """Mean and standard deviation over repeated runs, a line for each split that has them."""
    kind = "folds" if "folds" in metrics else "seeds"
    repeats, lines = metrics.get(kind) or [], []
    for split, name in (("validation", "validation"), ("train", "training images")):
        figures = []
        for figure in ("accuracy", "loss"):
            mean, spread = (look_up(metrics.get(key), split, figure) for key in ("mean", "std"))
            if mean is not None and spread is not None:
                figures.append(f"{figure} {mean:.4f} ± {spread:.4f}")
        if figures:
            lines.append(f"- Mean and standard deviation over {len(repeats)} {kind}, {name}: {', '.join(figures)}.")
    if not lines:
        lines.append("- One seed: the spread over seeds is not known.")
    return lines


def _say_calibration(metrics: Mapping, predictions: Predictions) -> str:
    measured = metrics.get("calibration")
    if isinstance(measured, Mapping):
        figures = [f"{k.replace('_', ' ')} {v:.4f}" for k, v in measured.items() if look_up(measured, k) is not None]
        return f"- Calibration on the validation images: {', '.join(figures)}."
    probabilities = softmax(predictions.validation_logits.astype(np.float64), axis=1)
    ece = judge_confidence(probabilities, predictions.validation_labels).ece
    return f"- Expected calibration error on the validation images: {ece:.4f} ({CALIBRATION_BINS} bins)."


def _say_which_model(metrics: Mapping) -> list[str]:
    """What the figures are of, where it is not one training seen through one plain view."""
    lines, views = [], (metrics.get("tta") or {}).get("kept") or []
    members = (metrics.get("soup") or {}).get("members")
    if members:
        of = "the mean of the weights of seeds" if len(members) > 1 else "that of seed"
        lines.append(f"- This model is {of} {', '.join(map(str, members))} (greedy soup).")
    plain = look_up(metrics, "tta", "accuracy", "plain")
    if len(views) > 1 and plain is not None:
        lines.append(
            f"- The figures average the views {', '.join(views)} of each image; one plain view, as `pipeline` "
            f"takes it, has validation accuracy {plain:.4f}."
        )
    return lines


def _remarks(metrics: Mapping, predictions: Predictions) -> str:
    stages = [f"{STAGES[key]} {read_accuracy(metrics[key]):.4f}" for key in STAGES if read_accuracy(metrics.get(key))]
    lines = _say_repeats(metrics)
    if "folds" in metrics:
        lines.append("- The validation figures are of all labelled images, each by the fold that had not seen it.")
    if stages:
        lines.append(f"- On the way, validation accuracy: {', '.join(stages)}.")
    lines += _say_which_model(metrics)
    lines.append(_say_calibration(metrics, predictions))
    lines.append("- The epoch was chosen on the validation images too, so their accuracy is slightly optimistic.")
    return "\n".join(lines)


def _failures(predictions: Predictions, class_names: Sequence[str]) -> str:
    names, said = [_literal(name) for name in class_names], predictions.validation_logits.argmax(-1)
    confusions = count_confusions(predictions.validation_labels, said, len(names))
    worst = score_classes(confusions)[:WORST_CLASSES]
    pairs = find_confused_pairs(confusions, CONFUSED_PAIRS)
    classes = ", ".join(f"{names[s.label]} ({s.right} of {s.images} recognised)" for s in worst)
    lines = [f"- Worst classes on the validation images: {classes}."]
    if pairs:
        told = ", ".join(f"{names[p.first]} and {names[p.second]} ({p.times} times)" for p in pairs)
        lines.append(f"- Confused most: {told}.")
    return "\n".join(lines)


def _plain(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _training_table(metrics: Mapping, record: Mapping) -> str:
    arguments = record["arguments"]
    repeated = {"seed"} if arguments.get("seeds") else set()  # each training has its own
    settings = [(n, arguments[n]) for n in card_names("setting") if arguments.get(n) is not None and n not in repeated]
    settings += [(name, arguments[name]) for name in card_names("ingredient") if arguments.get(name)]
    settings.insert(0, ("started from", name_base(record)))
    settings.append(("precision", record["precision"].removeprefix("precision: ")))
    settings.append(("hardware", record["device"]))
    seconds, rate = look_up(metrics, "train", "seconds"), look_up(metrics, "train", "samples_per_second")
    if seconds is not None and rate is not None:
        settings.append(("training time", f"{seconds / 60:.1f} min, {rate:.1f} images/s"))
    return "\n".join(
        ["| setting | value |", "|---|---|", *(f"| {name} | {_plain(value)} |" for name, value in settings)]
    )


def _origin(record: Mapping) -> str:
    code = record["code"]
    state = ", with uncommitted changes" if code["clean"] is False else ""
    lines = [
        f"- Code: commit {code['commit'] or 'unknown'}{state}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in record['versions'].items())}",
        f"- Data fingerprint: {record['data_fingerprint']}",
        f"- Split fingerprint: {record['split_fingerprint']}",
    ]
    return "\n".join(lines)


def _limits(data_dir: str | None, class_ids: Sequence[str]) -> str:
    from_imagenet = all(re.fullmatch(r"n\d{8}", class_id) for class_id in class_ids)
    terms = SAMPLE_TERMS if data_dir == "sample" else IMAGENET_TERMS if from_imagenet else OTHER_TERMS
    return f"{terms} `config.class_ids` names the data set's classes in label order."


def _metadata(title: str, data: str, validation: Mapping, record: Mapping) -> str:
    arguments = record["arguments"]
    common = {
        "task_type": "image-classification",
        "task_name": "Image Classification",
        "dataset_type": arguments.get("dataset_name") or "imagefolder",
        "dataset_name": data,
        "dataset_split": "validation",
    }
    results = [
        EvalResult(**common, metric_type="accuracy", metric_name="Accuracy", metric_value=validation["accuracy"]),
        EvalResult(**common, metric_type="f1", metric_name="Macro F1", metric_value=validation["macro_f1"]),
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=None if record["local_model"] else arguments["model_name_or_path"],
        datasets=arguments.get("dataset_name"),
        tags=["image-classification", "vision", "generated_from_trainer"],
        metrics=["accuracy", "f1"],
        model_name=title,
        eval_results=results,
    ).to_yaml()


def write_card(
    folder: Path,
    metrics: Mapping,
    record: Mapping,
    class_names: Sequence[str],
    class_ids: Sequence[str],
    predictions: Predictions,
) -> None:
    """README.md of a trained model's folder, from the run's own numbers; it names no place of this machine."""
    arguments = record["arguments"]
    data = arguments.get("dataset_name") or Path(arguments["data_dir"]).stem
    title = Path(arguments["hub_model_id"] or arguments["output_dir"]).name
    base = name_base(record)
    rows = [_row("validation, held out", metrics["validation"])]
    if "accuracy_ci95" in metrics["train"]:
        rows.append(_row("training images, not augmented", metrics["train"]))
    text = CARD.format(
        metadata=_metadata(title, data, metrics["validation"], record).strip(),
        title=_literal(title),
        classes=len(class_names),
        base=base if record["local_model"] else f"[{base}](https://huggingface.co/{base})",
        data=_literal(data),
        model_id=arguments["hub_model_id"] or UNPUSHED,
        rows="\n".join(rows),
        remarks=_remarks(metrics, predictions),
        failures=_failures(predictions, class_names),
        training=_training_table(metrics, record),
        command=leave_out_places(record["command"]),
        origin=_origin(record),
        limits=_limits(arguments["data_dir"], class_ids),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def keep_card(source: Path, folder: Path, repo_id: str | None) -> None:
    """Take over the card of a model that was trained earlier, naming the place where it is pushed to now."""
    if (source / "README.md").is_file():
        text = (source / "README.md").read_text(encoding="utf-8")
        text = text.replace(f'model="{UNPUSHED}"', f'model="{repo_id or UNPUSHED}"')
        (folder / "README.md").write_text(text, encoding="utf-8")
