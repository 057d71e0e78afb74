"""The model card: its numbers are the files', its metadata loads, and it names no place of this machine."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import WNIDS
from fabricated import ARGUMENTS, RECORD, seed_metrics, some_logits, write_run
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

from transfer.evaluation.metrics import Calibration, RunMetrics, Scores, SplitScores, TtaMetrics
from transfer.evaluation.predictions import Predictions
from transfer.reporting import card
from transfer.reporting.card import keep_card, write_card

NAMES = ["red thing", "green | thing", "<blue> [thing]", "grey_thing"]
LABELS = np.arange(40) % 4

SEEDS = seed_metrics([0.7, 0.71, 0.72], soup=0.7345, ensemble=0.7456, members=[3, 8]) | {
    "mean": SplitScores(Scores(0.7123, 0.9876), Scores(0.8234, 0.5432)),
    "std": SplitScores(Scores(0.0123, 0.0234), Scores(0.0345, 0.0456)),
}


def make_card(folder: Path, record=None, class_ids=WNIDS, **metrics) -> tuple[Path, RunMetrics, dict]:
    """A card of a made-up run; returns its path, and the metrics and the record that it was made from."""
    logits = some_logits(LABELS, 4, sharpness=1.5)
    write_run(folder, "x", [f"{i}.JPEG" for i in range(40)], LABELS, NAMES, logits, **metrics)
    measured = RunMetrics.read(folder)
    arguments = ARGUMENTS | {"data_dir": "/home/jane/data/tiny-imagenet-100.zip"} | (record or {}).pop("arguments", {})
    record = RECORD | (record or {}) | {"arguments": arguments}
    write_card(folder / "model", measured, record, NAMES, class_ids, Predictions.load(folder))
    return folder / "model" / "README.md", measured, record


def numbers_in(value) -> set[str]:
    """Every number in a json value, written in the ways in which a card may write it."""
    if isinstance(value, dict):
        return set().union(*(numbers_in(v) for v in value.values()), *(numbers_in(k) for k in value))
    if isinstance(value, list):
        return set().union(*map(numbers_in, value))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return set(re.findall(r"\d+(?:\.\d+)*", str(value)))
    return {str(value), f"{value:.4f}", f"{value:.1f}", f"{value / 60:.1f}"}


def counted_numbers(predictions: Predictions) -> set[str]:
    """Counts of every class and pair, and the calibration error, computed here."""
    said, labels = predictions.validation_logits.argmax(1), predictions.validation_labels
    counts = [((labels == a) & (said == b)).sum() for a in range(4) for b in range(4)]
    pairs = [((labels == a) & (said == b) | (labels == b) & (said == a)).sum() for a in range(4) for b in range(a)]
    p = np.exp(predictions.validation_logits.astype(float))
    p /= p.sum(1, keepdims=True)
    bins = np.minimum((p.max(1) * 15).astype(int), 14)
    ece = sum(abs((p.max(1) - (said == labels))[bins == b].sum()) for b in range(15)) / len(labels)
    return {str(n) for n in [*counts, *pairs, *np.bincount(labels)]} | {f"{ece:.4f}"}


@pytest.mark.parametrize("metrics", [{}, SEEDS], ids=["one seed", "three seeds"])
def test_every_number_of_the_card_is_in_the_runs_files(metrics, tmp_path):
    path, measured, record = make_card(tmp_path / "run", **metrics)
    text = ModelCard.load(path).text
    known = numbers_in(measured.to_json()) | numbers_in(record) | counted_numbers(Predictions.load(tmp_path / "run"))
    known |= {str(len(NAMES)), "15", str(len(metrics.get("seeds", ())))}  # classes, bins, seeds
    names = re.compile(r"EfficientNet-Lite0 \(ImageNet-1k\)|top-5|F1|95% interval|tiny-imagenet-100")
    strange = set(re.findall(r"\d+(?:\.\d+)*", names.sub("", text))) - known
    assert not strange
    assert f"| validation | 40 | {measured.validation.accuracy:.4f} |" in text


def test_a_card_of_one_seed_says_that_the_spread_is_not_known(tmp_path):
    text = make_card(tmp_path / "run")[0].read_text()
    assert "Trained with one seed: the spread over seeds is unknown." in text and "±" not in text


def test_a_card_of_three_seeds_gives_mean_and_standard_deviation(tmp_path):
    text = make_card(tmp_path / "run", **SEEDS)[0].read_text()
    assert "over 3 seeds, validation: accuracy 0.7123 ± 0.0123, loss 0.9876 ± 0.0234." in text
    assert "over 3 seeds, training images: accuracy 0.8234 ± 0.0345, loss 0.5432 ± 0.0456." in text
    assert "soup of the seeds 0.7345, ensemble of the seeds 0.7456" in text and "one seed" not in text


def test_a_card_says_of_which_weights_and_views_its_figures_are(tmp_path):
    views = TtaMetrics(kept=["plain", "flip"], accuracy={"plain": 0.7012, "flip": 0.69})
    arguments = {"seeds": [3, 5, 8], "freeze_layers": 4}
    text = make_card(tmp_path / "run", record={"arguments": arguments}, tta=views, **SEEDS)[0].read_text()
    assert "This model has the mean of the weights of seeds 3, 8 (greedy soup)." in text
    assert "test-time augmentation, the mean of the views plain, flip." in text
    assert "the validation accuracy is 0.7012." in text
    assert "| seeds | 3, 5, 8 |" in text and "| seed |" not in text and "| freeze_layers | 4 |" in text


def test_a_measured_calibration_is_what_the_card_says(tmp_path):
    text = make_card(tmp_path / "run", calibration=Calibration(1.2345, 0.0212, 0.0123))[0].read_text()
    assert "Expected calibration error on the validation images: 0.0212 in 15 bins, 0.0123 with temp" in text
    assert "(temperature 1.2345)" in text


def test_the_metadata_is_what_the_hub_reads(tmp_path):
    hub = {"model_name_or_path": "google/vit-base-patch16-224-in21k", "hub_model_id": "me/tiny"}
    path, measured, _ = make_card(tmp_path / "run", record={"local_model": False, "arguments": hub})
    metadata = metadata_load(path)
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "image-classification"
    validate_repo_id(metadata["base_model"])
    assert metadata["base_model"] == hub["model_name_or_path"]
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == "tiny"
    values = {result.metric_type: result.metric_value for result in results}
    assert values == {"accuracy": measured.validation.accuracy, "f1": measured.validation.macro_f1}
    assert all(result.dataset_split == "validation" for result in results)
    loaded = ModelCard.load(path)
    assert loaded.data.eval_results[0].metric_value == measured.validation.accuracy
    assert 'pipeline("image-classification", model="me/tiny")' in loaded.text


@pytest.mark.parametrize("metrics", [{}, SEEDS], ids=["one seed", "three seeds"])
@pytest.mark.parametrize("base", ["offline", "google/vit-base-patch16-224-in21k"])
def test_the_hub_accepts_the_card(hub, metrics, base, tmp_path):
    arguments = {"model_name_or_path": base, "dataset_name": None if base == "offline" else "me/flowers"}
    record = {"local_model": base == "offline", "arguments": arguments}
    ModelCard.load(make_card(tmp_path / "run", record=record, **metrics)[0]).validate()
    assert hub.requests == ["POST /api/validate-yaml"]


def test_a_card_that_the_hub_refuses_would_be_noticed(hub, tmp_path):
    text = make_card(tmp_path / "run")[0].read_text()
    for good, bad in [
        ("image-classification\n", "seeing\n"),
        ("pipeline_tag:", "base_model: /my/place\npipeline_tag:"),
    ]:
        assert good in text
        with pytest.raises(ValueError, match=r"pipeline_tag|base_model"):
            ModelCard(text.replace(good, bad)).validate()


def test_a_local_checkpoint_is_no_base_model_of_the_hub_and_its_place_stays_private(tmp_path):
    local = {"model_name_or_path": "/home/jane/checkpoints/my-vit", "output_dir": "/home/jane/outputs/x"}
    command = "python finetune_vit.py /home/jane/a.yaml --data_dir=/home/jane/tiny.zip --output_dir ~jane/x"
    path, *_ = make_card(tmp_path / "run", record={"arguments": local, "command": command})
    content = path.read_text()
    assert "base_model" not in metadata_load(path) and "| base model | my-vit |" in content
    assert "jane" not in content and "/home" not in content
    assert "python finetune_vit.py a.yaml --data_dir=tiny.zip --output_dir x" in content


def test_names_of_classes_are_text_and_not_markdown(tmp_path):
    text = make_card(tmp_path / "run")[0].read_text()
    assert "<blue>" not in text and r"&lt;blue&gt; \[thing\]" in text and r"green \| thing" in text


@pytest.mark.parametrize(
    ("data_dir", "wnids", "terms"),
    [
        ("tiny-imagenet-100.zip", WNIDS, "derive from ImageNet"),
        ("sample", WNIDS, "The images are generated"),
        ("flowers", ["rose", "tulip", "lily", "daisy"], "No license is given here"),
    ],
)
def test_the_terms_are_those_of_the_data(data_dir, wnids, terms, tmp_path):
    text = make_card(tmp_path / "run", record={"arguments": {"data_dir": data_dir}}, class_ids=wnids)[0].read_text()
    assert terms in text and text.count("derive from ImageNet") == (data_dir == "tiny-imagenet-100.zip")


def columns_of(card: Path) -> str:
    return next(line for line in card.read_text().splitlines() if line.startswith("| measured on"))


def test_of_few_classes_the_card_has_no_top5(tmp_path):
    path, measured, record = make_card(tmp_path / "run")
    assert columns_of(path) == "| measured on | images | accuracy | 95% interval | macro F1 | loss |"
    names = [f"class {i}" for i in range(11)]
    labels = np.arange(22) % 11
    predictions = Predictions([f"{i}.JPEG" for i in range(22)], labels, some_logits(labels, 11), [], np.empty((0, 11)))
    write_card(tmp_path / "run" / "model", measured, record, names, names, predictions)
    assert columns_of(path) == "| measured on | images | accuracy | 95% interval | top-5 | macro F1 | loss |"
    assert f"| {measured.validation.top5_accuracy:.4f} |" in path.read_text()


def card_of(folder: Path, **arguments) -> tuple[dict, str]:
    """(metadata, text) of the card of a run that started from a local model."""
    record = {"local_model": True, "arguments": {"data_dir": "flowers"} | arguments}
    path, *_ = make_card(folder, record=record, class_ids=["rose", "tulip", "lily", "daisy"])
    return metadata_load(path), path.read_text()


def test_a_model_that_is_pushed_under_another_name_gets_a_card_with_that_name(tmp_path):
    path, *_ = make_card(tmp_path, record={"arguments": {"hub_model_id": "me/taken", "data_dir": "."}})
    (tmp_path / "again").mkdir()
    keep_card(tmp_path / "model", tmp_path / "again", "me/new")
    card, again = (folder.read_text() for folder in (path, tmp_path / "again" / "README.md"))
    assert "taken" in card and "taken" not in again and again.count("me/new") == card.count("me/taken")
    loaded = ModelCard(again)
    assert loaded.data.model_name == "new" and loaded.data.eval_results[0].dataset_name == Path.cwd().name


def test_the_license_is_that_of_the_base_models_card_and_is_left_out_where_there_is_none(tmp_path):
    base = tmp_path / "vit"
    base.mkdir()
    metadata, text = card_of(tmp_path / "none", model_name_or_path=str(base))
    assert "license" not in metadata and "No license is given here" in text
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: dinov3\nlicense_link: LICENSE.md\n---\n# vit\n"
    )
    metadata, text = card_of(tmp_path / "run", model_name_or_path=str(base))
    assert (metadata["license"], metadata["license_name"]) == ("other", "dinov3") and "license_link" not in metadata
    assert "The license is that of the base model." in text and "No license" not in text
    assert "base_model" not in metadata  # a downloaded folder does not tell its own name
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    assert "license" not in card_of(tmp_path / "damaged", model_name_or_path=str(base))[0]


def test_a_model_that_was_fine_tuned_again_names_the_repository_that_it_began_with(tmp_path):
    first = {"local_model": False, "arguments": {"model_name_or_path": "google/vit-base-patch16-224-in21k"}}
    path, *_ = make_card(tmp_path / "first", record=first)
    (path.parent / "config.json").write_text(json.dumps({"class_ids": WNIDS}))
    metadata, text = card_of(tmp_path / "second", model_name_or_path=str(path.parent))
    assert metadata["base_model"] == "google/vit-base-patch16-224-in21k"
    assert "| base model | first/model |" in text


def test_a_folder_of_the_hubs_cache_is_named_by_its_repository(tmp_path):
    place = tmp_path / "models--facebook--convnextv2-base-22k-224" / "snapshots" / ("0123abcd" * 5)
    place.mkdir(parents=True)
    (place / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    metadata, text = card_of(tmp_path / "run", model_name_or_path=str(place))
    assert metadata["base_model"] == "facebook/convnextv2-base-22k-224" and metadata["license"] == "apache-2.0"
    assert "[facebook/convnextv2-base-22k-224](https://huggingface.co/facebook/convnextv2-base-22k-224)" in text


def test_the_card_of_a_hub_model_is_read_from_the_cache(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr(card, "try_to_load_from_cache", lambda *names, **_: str(readme) if "me/vit" in names else None)
    record = {"local_model": False, "arguments": {"model_name_or_path": "me/vit"}}
    assert metadata_load(make_card(tmp_path / "run", record=record)[0])["license"] == "mit"
