"""A web page that shows a model's five most probable classes for an image.

    python -m transfer.demo outputs/sample/model

This file is also the app of a Hub Space, with demo.json beside it that names the model; so it imports nothing from
this project.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from PIL import Image
from transformers import pipeline

TOP_K = 5
SPACE_FILE = Path(__file__).with_name("demo.json")


def make_classifier(model: str, revision: str | None = None) -> Callable[[Image.Image | None], dict[str, float]]:
    """Return a function from an image to the probabilities of its most probable classes; none without an image."""
    classify = pipeline("image-classification", model=model, revision=revision)

    def predict(image: Image.Image | None) -> dict[str, float]:
        if image is None:
            return {}
        return {answer["label"]: answer["score"] for answer in classify(image.convert("RGB"), top_k=TOP_K)}

    return predict


def make_page(model: str, revision: str | None = None):
    """Return the page as a gradio app."""
    import gradio  # an optional package, not needed for --help

    return gradio.Interface(
        make_classifier(model, revision),
        gradio.Image(type="pil", label="image", height=320),
        gradio.Label(num_top_classes=TOP_K, label="classes"),
        title=f"Image classification with {Path(model).parent.name if Path(model).is_dir() else model}",
        live=True,  # predicts as soon as an image is dropped
        flagging_mode="never",
        analytics_enabled=False,
    )


def stop(mistake: str) -> NoReturn:
    """Print one line and exit with code 2, as the project's other commands do."""
    print(f"error: {mistake}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m transfer.demo", description="Classify images on a web page.")
    parser.add_argument("model", help="a model folder such as outputs/sample/model, or a Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--port", type=int, help="port on this machine [first free port from 7860]")
    args = parser.parse_args(argv)
    if Path(args.model).is_dir() and not (Path(args.model) / "config.json").is_file():
        stop(f"{args.model}: holds no config.json; give a run's model folder, such as outputs/sample/model")
    try:
        page = make_page(args.model, args.revision)
    except ImportError as fault:
        stop(f"the demo needs gradio ({fault}); pip install -r requirements-extras.txt")
    except (OSError, ValueError) as fault:
        stop(f"{args.model}: cannot be loaded: {' '.join(str(fault).split())}")
    page.launch(server_name="127.0.0.1", server_port=args.port)


if __name__ == "__main__":
    if SPACE_FILE.is_file():
        shown = json.loads(SPACE_FILE.read_text(encoding="utf-8"))
        make_page(shown["model"], shown["revision"]).launch()
    else:
        main()
