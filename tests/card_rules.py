"""What the Hub demands of a card's metadata, as far as its documentation tells: what /api/validate-yaml answers."""

import re
from collections.abc import Iterator

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# Of the many, those that a card of ours could have.
PIPELINES = {"image-classification", "image-feature-extraction", "text-classification"}
SDKS = {"gradio", "streamlit", "docker", "static"}
TEXTS, LISTS = ("library_name", "license", "license_name", "pipeline_tag"), ("tags", "datasets", "metrics", "language")


def read_metadata(content: str) -> dict | None:
    """The block between the two lines of dashes at the top."""
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", content, re.S)
    return yaml.safe_load(found[1]) if found else None


def find_faults(content: str, repo_type: str) -> list[str]:
    """Every reason for which the Hub would refuse the card."""
    try:
        metadata = read_metadata(content)
    except yaml.YAMLError as fault:
        return [f"invalid YAML: {fault}"]
    if not isinstance(metadata, dict):
        return ["metadata is missing" if metadata is None else "metadata must be an object"]
    return list(_space_faults(metadata) if repo_type == "space" else _model_faults(metadata))


def _space_faults(metadata: dict) -> Iterator[str]:
    if metadata.get("sdk") not in SDKS:
        yield f'"sdk" must be one of {sorted(SDKS)}'
    if len(str(metadata.get("short_description", ""))) > 60:
        yield '"short_description" length must be less than or equal to 60 characters long'
    yield from _name_faults(metadata, "models")


def _model_faults(metadata: dict) -> Iterator[str]:
    for key in TEXTS:
        if not isinstance(metadata.get(key, ""), str):
            yield f'"{key}" must be a string'
    for key in LISTS:
        entries = metadata.get(key, [])
        if not isinstance(entries, (str, list)) or not all(isinstance(entry, str) for entry in entries):
            yield f'"{key}" must be a string or a list of strings'
    if metadata.get("pipeline_tag", "image-classification") not in PIPELINES:
        yield f'"pipeline_tag" {metadata["pipeline_tag"]} is not known'
    yield from _name_faults(metadata, "base_model")
    yield from _name_faults(metadata, "datasets")
    for number, model in enumerate(metadata.get("model-index", [])):
        if not isinstance(model.get("name"), str):
            yield f'"model-index[{number}].name" must be a string'
        for result in model.get("results", []):
            yield from _result_faults(result, f"model-index[{number}].results")


def _name_faults(metadata: dict, key: str) -> Iterator[str]:
    names = metadata.get(key) or []
    for name in [names] if isinstance(names, str) else names:
        try:
            validate_repo_id(name)
        except HFValidationError:
            yield f'"{key}" with value "{name}" is not valid: use a model or data set id from the Hub'


def _result_faults(result: dict, place: str) -> Iterator[str]:
    for part, keys in {"task": ["type"], "dataset": ["type", "name"]}.items():
        for key in keys:
            if not isinstance(result.get(part, {}).get(key), str):
                yield f'"{place}.{part}.{key}" is required'
    if not result.get("metrics"):
        yield f'"{place}.metrics" is required'
    for metric in result.get("metrics") or []:
        if not isinstance(metric.get("type"), str) or isinstance(metric.get("value"), (type(None), str)):
            yield f'"{place}.metrics" need a type and a value'
