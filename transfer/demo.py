"""Try a model: a page to drop a picture on, which answers with the five likeliest names.

    python -m transfer.demo outputs/sample/model

The same file is the app of a Hub Space, where demo.json beside it names the model; so it imports nothing of ours.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from transformers import pipeline

SHOWN = 5
SPACE_FILE = Path(__file__).with_name("demo.json")


def make_classifier(model: str, revision: str | None = None) -> Callable[[Image.Image | None], dict[str, float]]:
    """A function from a picture to the probabilities of its likeliest names, nothing for no picture."""
    classify = pipeline("image-classification", model=model, revision=revision)

    def name(picture: Image.Image | None) -> dict[str, float]:
        if picture is None:
            return {}
        return {answer["label"]: answer["score"] for answer in classify(picture.convert("RGB"), top_k=SHOWN)}

    return name


def make_page(model: str, revision: str | None = None):
    """The page as a gradio app."""
    import gradio  # an optional extra: whoever only asks for --help needs none

    return gradio.Interface(
        make_classifier(model, revision),
        gradio.Image(type="pil", label="picture", height=320),
        gradio.Label(num_top_classes=SHOWN, label="names"),
        title=f"What does {Path(model).parent.name if Path(model).is_dir() else model} see?",
        live=True,  # answers as soon as a picture is dropped
        flagging_mode="never",
        analytics_enabled=False,
    )


def stop(mistake: str) -> None:
    """One line and exit code 2, as everywhere in this project."""
    print(f"error: {mistake}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> None:
    """Serve the page until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m transfer.demo", description="A page to drop a picture on.")
    parser.add_argument("model", help="a model folder such as outputs/sample/model, or a Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--port", type=int, help="port on this machine [the first free one from 7860]")
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
