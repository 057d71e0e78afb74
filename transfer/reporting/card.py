"""The model card: README.md of a saved model, with the numbers of its run."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, hf_hub_download, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

from transfer.config import card_names
from transfer.errors import UserError
from transfer.evaluation.metrics import Calibration, ClassificationMetrics, RunMetrics
from transfer.evaluation.predictions import CALIBRATION_BINS, Predictions, find_confused_pairs, score_classes
from transfer.files import leave_out_places, name_of, read_json
from transfer.models.offline import is_offline
from transfer.reporting import TOP5_FROM, base_model_name, data_name, find_cached_id
from transfer.reporting.charts import list_stages

UNPUSHED = "path/to/model"  # the name of a model that is not on the Hub
OFF: tuple = (None, False, 0, "none", [])  # values of an ingredient that a run does not use
WORST_CLASSES, CONFUSED_PAIRS = 5, 5
LICENSE_FIELDS = ("license", "license_name", "license_link")

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

{results}

{remarks}

## Errors

{failures}

## Training

{training}

## Run it again

```bash
{command}
```

{origin}

## Data and limitations

{limits}
"""

IMAGENET_TERMS = (
    "These images derive from ImageNet, whose terms apply: non-commercial research and education. A backbone that was "
    "pretrained on ImageNet has seen many of them at full size, so the scores say little about transfer to new images."
)
SAMPLE_TERMS = "The images are generated: the model is only good for trying out the code."
OTHER_TERMS = (
    "No license is given here: the terms of the training images and of the base checkpoint decide how the model may "
    "be used."
)
LICENSED_TERMS = (
    "The license is that of the base model. The terms of the training images also decide how the model may be used."
)


def _literal(text: str) -> str:
    """A name from the data in one line, with everything escaped that is markup in markdown or html."""
    return re.sub(r"([\\`*_{}\[\]|#~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def _read_metadata(path: Path) -> Mapping:
    """The metadata of a model card; empty where there is none, or where it cannot be read."""
    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, YAMLError):
        return {}


def _find_card(name: str, revision: str, may_download: bool) -> Path | None:
    """The card of a model on the Hub: from its cache, or, if it may be downloaded, from the Hub."""
    cached = try_to_load_from_cache(name, "README.md", revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(hf_hub_download(name, "README.md", revision=revision)) if may_download else None
    except Exception:  # the card of a finished run must not fail for lack of a license
        return None


def find_base(record: Mapping) -> tuple[str | None, Mapping]:
    """(Hub id of the base model, the fields of its card that give its license), as far as both are known."""
    arguments = record["arguments"]
    name, revision = str(arguments["model_name_or_path"]), arguments.get("model_revision") or "main"
    if is_offline(name):
        return None, {}
    repo_id: str | None = base_model_name(record)
    if record["local_model"]:
        folder = Path(name).expanduser()
        metadata = _read_metadata(folder / "README.md")
        repo_id = find_cached_id(folder) or _base_of_own(folder, metadata)
    else:
        card = _find_card(name, revision, may_download=bool(arguments.get("push_to_hub")))
        metadata = _read_metadata(card) if card else {}
    known = {field: metadata[field] for field in LICENSE_FIELDS if isinstance(metadata.get(field), str)}
    if not known.get("license_link", "").startswith("https://"):  # else it names a file of the base model
        known.pop("license_link", None)
    return repo_id, known


def _base_of_own(folder: Path, metadata: Mapping) -> str | None:
    """The base model of a model that this project saved, which its card names."""
    try:
        is_own = "class_ids" in read_json(folder / "config.json")
    except UserError:
        return None
    base = metadata.get("base_model")
    return base if is_own and isinstance(base, str) else None


def _tabulate(measured: Mapping[str, ClassificationMetrics], classes: int) -> str:
    """The metrics of each split as a table; of few classes without the top-5 accuracy."""
    columns = {
        "images": lambda m: f"{m.n}",
        "accuracy": lambda m: f"{m.accuracy:.4f}",
        "95% interval": lambda m: "{:.4f} to {:.4f}".format(*m.accuracy_ci95),
        "top-5": lambda m: f"{m.top5_accuracy:.4f}",
        "macro F1": lambda m: f"{m.macro_f1:.4f}",
        "loss": lambda m: f"{m.loss:.4f}",
    }
    if classes < TOP5_FROM:
        del columns["top-5"]
    rows = [["measured on", *columns], ["---"] * (1 + len(columns))]
    rows += [[name, *(write(m) for write in columns.values())] for name, m in measured.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _describe_repeats(metrics: RunMetrics) -> list[str]:
    """Mean and standard deviation over seeds or folds, one line per split."""
    if not (metrics.mean and metrics.std):
        return ["- Trained with one seed: the spread over seeds is unknown."]
    kind = "folds" if metrics.folds else "seeds"
    splits = {
        "validation": (metrics.mean.validation, metrics.std.validation),
        "training images": (metrics.mean.train, metrics.std.train),
    }
    return [
        f"- Mean and standard deviation over {len(metrics.repeats)} {kind}, {name}: "
        f"accuracy {mean.accuracy:.4f} ± {std.accuracy:.4f}, loss {mean.loss:.4f} ± {std.loss:.4f}."
        for name, (mean, std) in splits.items()
    ]


def _describe_calibration(c: Calibration) -> str:
    scaled = "" if c.ece_scaled is None else f", {c.ece_scaled:.4f} with temperature scaling"
    return (
        f"- Expected calibration error on the validation images: {c.ece:.4f} in {CALIBRATION_BINS} bins{scaled} "
        f"(temperature {c.temperature:.4f})."
    )


def _describe_model(metrics: RunMetrics) -> list[str]:
    """Lines for a model that is not from a single training, or whose figures are with test-time augmentation."""
    lines = []
    if metrics.soup:
        members = ", ".join(map(str, metrics.soup.members))
        if len(metrics.soup.members) > 1:
            lines.append(f"- This model has the mean of the weights of seeds {members} (greedy soup).")
        else:
            lines.append(f"- This model is that of seed {members}; no average with another was better (greedy soup).")
    if metrics.tta and len(metrics.tta.kept) > 1:
        lines.append(
            f"- The figures are with test-time augmentation, the mean of the views {', '.join(metrics.tta.kept)}. "
            f"Without it, as in `pipeline`, the validation accuracy is {metrics.tta.accuracy['plain']:.4f}."
        )
    return lines


def _remarks(metrics: RunMetrics) -> str:
    lines = _describe_repeats(metrics)
    if metrics.folds:
        lines.append(
            "- The validation figures are of all labeled images, each predicted by the fold that left it out."
        )
    if stages := list_stages(metrics):
        figures = ", ".join(f"{name} {accuracy:.4f}" for name, accuracy in stages.items())
        lines.append(f"- Validation accuracy by stage: {figures}.")
    lines += _describe_model(metrics)
    if metrics.calibration:
        lines.append(_describe_calibration(metrics.calibration))
    if metrics.copies:
        lines.append(f"- Copies: {metrics.copies.text}.")
    lines.append("- The epoch was chosen on the validation images, so their accuracy is slightly optimistic.")
    return "\n".join(lines)


def _failures(predictions: Predictions, class_names: Sequence[str]) -> str:
    names, confusions = [_literal(name) for name in class_names], predictions.count_confusions()
    worst = score_classes(confusions)[:WORST_CLASSES]
    pairs = find_confused_pairs(confusions, CONFUSED_PAIRS)
    classes = ", ".join(f"{names[s.label]} ({s.correct} of {s.images} correct)" for s in worst)
    lines = [f"- Worst classes on the validation images: {classes}."]
    if pairs:
        confused = ", ".join(f"{names[p.first]} and {names[p.second]} ({p.times} times)" for p in pairs)
        lines.append(f"- Most confused pairs: {confused}.")
    return "\n".join(lines)


def _plain(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _training_table(metrics: RunMetrics, record: Mapping) -> str:
    arguments = record["arguments"]
    repeated = {"seed"} if arguments.get("seeds") else set()  # each training has its own
    settings = [
        (n, arguments[n]) for n in card_names("setting") if arguments.get(n) not in (None, []) and n not in repeated
    ]
    settings += [(name, arguments[name]) for name in card_names("ingredient") if arguments.get(name) not in OFF]
    settings.insert(0, ("base model", base_model_name(record)))
    settings.append(("precision", record["precision"].removeprefix("precision: ")))
    settings.append(("hardware", record["device"]))
    if metrics.train:
        speed = f"{metrics.train.seconds / 60:.1f} min, {metrics.train.samples_per_second:.1f} images/s"
        settings.append(("training time", speed))
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


def _limits(data_dir: str | None, class_ids: Sequence[str], has_license: bool) -> str:
    from_imagenet = all(re.fullmatch(r"n\d{8}", class_id) for class_id in class_ids)
    others = LICENSED_TERMS if has_license else OTHER_TERMS
    terms = SAMPLE_TERMS if data_dir == "sample" else IMAGENET_TERMS if from_imagenet else others
    return f"{terms} `config.class_ids` lists the class ids of the dataset in label order."


def _metadata(
    title: str,
    data: str,
    validation: ClassificationMetrics,
    arguments: Mapping,
    base_model: str | None,
    license_fields: Mapping,
) -> str:
    common: dict[str, Any] = {
        "task_type": "image-classification",
        "task_name": "Image Classification",
        "dataset_type": arguments.get("dataset_name") or "imagefolder",
        "dataset_name": data,
        "dataset_split": "validation",
    }
    results = [
        EvalResult(**common, metric_type="accuracy", metric_name="Accuracy", metric_value=validation.accuracy),
        EvalResult(**common, metric_type="f1", metric_name="Macro F1", metric_value=validation.macro_f1),
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=base_model,
        **license_fields,
        datasets=arguments.get("dataset_name"),
        tags=["image-classification", "vision", "generated_from_trainer"],
        metrics=["accuracy", "f1"],
        model_name=title,
        eval_results=results,
    ).to_yaml()


def write_card(
    folder: Path,
    metrics: RunMetrics,
    record: Mapping,
    class_names: Sequence[str],
    class_ids: Sequence[str],
    predictions: Predictions,
) -> None:
    """Write README.md into the folder of a trained model; it holds no path of this machine."""
    arguments = record["arguments"]
    data = data_name(arguments)
    title = name_of(arguments["hub_model_id"] or arguments["output_dir"])
    base, (repo_id, license_fields) = base_model_name(record), find_base(record)
    measured = {"validation": metrics.validation}
    if metrics.test:
        measured["test"] = metrics.test
    if isinstance(metrics.train, ClassificationMetrics):
        measured["training images, not augmented"] = metrics.train
    text = CARD.format(
        metadata=_metadata(title, data, metrics.validation, arguments, repo_id, license_fields).strip(),
        title=_literal(title),
        classes=len(class_names),
        base=f"[{repo_id}](https://huggingface.co/{repo_id})" if repo_id and base == repo_id else base,
        data=_literal(data),
        model_id=arguments["hub_model_id"] or UNPUSHED,
        results=_tabulate(measured, len(class_names)),
        remarks=_remarks(metrics),
        failures=_failures(predictions, class_names),
        training=_training_table(metrics, record),
        command=leave_out_places(record["command"]),
        origin=_origin(record),
        limits=_limits(arguments["data_dir"], class_ids, bool(license_fields)),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def keep_card(source: Path, folder: Path, repo_id: str | None) -> None:
    """Copy the card of a model that was trained earlier, with the repository that it is pushed to now."""
    if (source / "README.md").is_file():
        text = (source / "README.md").read_text(encoding="utf-8")
        if repo_id and (known := re.search(r'model="([^"]+)"', text)):
            text = text.replace(known[0], f'model="{repo_id}"')
            old, new = Path(known[1]).name, Path(repo_id).name
            for start in ("# ", "- name: "):  # the title, and the name in the metadata
                text = text.replace(f"\n{start}{old}\n", f"\n{start}{new}\n", 1)
        (folder / "README.md").write_text(text, encoding="utf-8")
