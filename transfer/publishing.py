"""What a finished run is made into for others, if asked: an ONNX file, a pushed model and its demo, a hand-in pack."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from transfer import UserError
from transfer.arguments import TRAINING_ONLY, FinetuningArguments, RunArguments
from transfer.export import check_export, export_onnx
from transfer.hand_in import check_target, pack
from transfer.hub import check_push, push_model, push_space
from transfer.record import describe_command, extend_record, find_run_of

READ_BACK_IMAGES = 10


def check_wishes(run: RunArguments, args: FinetuningArguments) -> None:
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
