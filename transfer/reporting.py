"""Numbers of a run: metrics with their spread, metrics.json and the model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import evaluate
import numpy as np
from huggingface_hub import EvalResult, ModelCardData
from scipy.special import log_softmax
from scipy.stats import binomtest
from sklearn.metrics import f1_score, top_k_accuracy_score

from transfer.record import write_whole


class ClassificationMetrics(evaluate.Metric):
    """Accuracy with its 95% interval, top-5 accuracy, macro F1 and cross-entropy, from logits.

    A metric of our own: `evaluate.load` fetches its scripts from the Hub. The interval is Wilson's (1927): what other
    images of the same kind would give; it does not cover the spread over training seeds.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="predictions: logits, (N, classes); references: labels, (N,)",
            features=datasets.Features(
                predictions=datasets.Sequence(datasets.Value("float32")), references=datasets.Value("int64")
            ),
        )

    def _compute(self, predictions, references):
        logits, labels = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        chosen, classes = logits.argmax(-1), np.arange(logits.shape[1])
        hits = int((chosen == labels).sum())
        interval = binomtest(hits, len(labels)).proportion_ci(method="wilson")
        many = logits.shape[1] > 5
        return {
            "accuracy": hits / len(labels),
            "accuracy_ci95": [interval.low, interval.high],
            "top5_accuracy": float(top_k_accuracy_score(labels, logits, k=5, labels=classes)) if many else 1.0,
            "macro_f1": float(f1_score(labels, chosen, labels=np.unique(labels), average="macro")),
            "loss": float(-log_softmax(logits, axis=-1)[np.arange(len(labels)), labels].mean()),
            "n": len(labels),
        }


def measure(logits: np.ndarray, labels: np.ndarray) -> dict:
    """Metrics of logits (N, classes) against labels (N,)."""
    metric = ClassificationMetrics(keep_in_memory=True)
    return metric.compute(predictions=logits.astype(np.float32), references=labels)


def write_metrics(folder: Path, metrics: Mapping) -> None:
    """metrics.json, whole or not at all."""
    write_whole(folder / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def read_metrics(folder: Path) -> dict:
    """A run's metrics.json."""
    return json.loads((folder / "metrics.json").read_text())


# What a reader needs to judge a training recipe, in this order.
RECIPE_SETTINGS = [
    "model_name_or_path",
    "image_size",
    "train_image_size",
    "min_crop_area",
    "layer_decay",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "label_smoothing_factor",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "split_seed",
    "validation_fraction",
]

UNPUSHED = "path/to/model"  # how a card names a model that is not on the Hub

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

The epoch was chosen on the validation images too, so their accuracy is slightly optimistic.

## Training

{training}

## Limits

Where the images derive from ImageNet, as Tiny ImageNet's do, its terms hold: non-commercial research and education. A
backbone that was pretrained on ImageNet has then seen many of them at full size, so the scores say little about
transfer to images that it has never seen. Labels are in the order of the data set's `wnids.txt`, which `config.wnids`
repeats.
"""


def _row(name: str, m: Mapping) -> str:
    low, high = m["accuracy_ci95"]
    return (
        f"| {name} | {m['n']} | {m['accuracy']:.4f} | {low:.4f} to {high:.4f} | {m['top5_accuracy']:.4f} "
        f"| {m['macro_f1']:.4f} | {m['loss']:.4f} |"
    )


def _training_table(metrics: Mapping, record: Mapping) -> str:
    arguments = record["arguments"]
    lines = ["| setting | value |", "|---|---|", *(f"| {name} | {arguments[name]} |" for name in RECIPE_SETTINGS)]
    lines.append(f"| precision | {record['precision']} |")
    lines.append(f"| hardware | {record['device']} |")
    lines.append(f"| training time | {metrics['train']['seconds'] / 60:.1f} min |")
    lines.append(f"| versions | {', '.join(f'{k} {v}' for k, v in record['versions'].items())} |")
    return "\n".join(lines)


def _name_base(record: Mapping) -> str:
    name = record["arguments"]["model_name_or_path"]
    if name == "offline":
        return "EfficientNet-Lite0 (ImageNet-1k)"
    return Path(name).name if record["local_model"] else f"[{name}](https://huggingface.co/{name})"


def write_card(folder: Path, metrics: Mapping, record: Mapping, class_names: Sequence[str]) -> None:
    """README.md of a trained model's folder, from the run's own numbers."""
    arguments, validation = record["arguments"], metrics["validation"]
    data = Path(arguments["data_dir"]).stem
    title = Path(arguments["hub_model_id"] or arguments["output_dir"]).name
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=None if record["local_model"] else arguments["model_name_or_path"],
        tags=["image-classification", "vision", "generated_from_trainer"],
        metrics=["accuracy"],
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type="imagefolder",
                dataset_name=data,
                dataset_split="validation",
                metric_type="accuracy",
                metric_value=validation["accuracy"],
            )
        ],
    )
    rows = [_row("validation, held out", validation), _row("training images, not augmented", metrics["train"])]
    text = CARD.format(
        metadata=card_data.to_yaml(),
        title=title,
        classes=len(class_names),
        base=_name_base(record),
        data=data,
        model_id=arguments["hub_model_id"] or UNPUSHED,
        rows="\n".join(rows),
        training=_training_table(metrics, record),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def keep_card(source: Path, folder: Path, repo_id: str | None) -> None:
    """Take over the card of a model that was trained earlier, naming the place where it is pushed to now."""
    if (source / "README.md").is_file():
        text = (source / "README.md").read_text(encoding="utf-8")
        text = text.replace(f'model="{UNPUSHED}"', f'model="{repo_id or UNPUSHED}"')
        (folder / "README.md").write_text(text, encoding="utf-8")
