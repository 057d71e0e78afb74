"""Checkpoints: which of them are whole, from which one a run goes on, and what they were made from."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from transfer.errors import UserError

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"  # the Trainer writes it last

# A kill may come while a checkpoint is deleted, too, in whatever order the system deletes.
PARTS = ("*.safetensors", "optimizer*", "scheduler.pt", "rng_state*.pth")

# Arguments that do not decide the weights: they may change where a run is resumed.
WITHOUT_EFFECT_ON_WEIGHTS = {
    "data_dir",
    "output_dir",
    "resume_from_checkpoint",
    "reproduce",
    "estimate",
    "max_minutes",
    "do_train",
    "do_eval",
    "do_predict",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "per_device_eval_batch_size",
    "eval_accumulation_steps",
    "save_total_limit",
    "report_to",
    "disable_tqdm",
    "run_name",
    "project",
    "push_to_hub",
}
PREFIXES_WITHOUT_EFFECT = ("hub_", "log", "trackio_", "local_rank", "skip_memory")


def decides_weights(argument: str) -> bool:
    """Whether another value of an argument may train to other weights."""
    return argument not in WITHOUT_EFFECT_ON_WEIGHTS and not argument.startswith(PREFIXES_WITHOUT_EFFECT)


def read_state(checkpoint: Path) -> dict:
    """What the Trainer wrote into a checkpoint last; empty if it did not get there."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        return state if isinstance(state, dict) else {}
    except (OSError, ValueError):
        return {}


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end and is not half deleted."""
    return "global_step" in read_state(checkpoint) and all(any(checkpoint.glob(part)) for part in PARTS)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name, -1 if there is none."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; one that a kill cut short is passed over."""
    return max(filter(is_complete, output_dir.glob("checkpoint-*")), key=step_of, default=None)


def find_checkpoint(output_dir: Path, resume: str | None) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means: `true` for the last in output_dir, or a folder."""
    if resume is None or resume.lower() == "false":
        return None
    if resume.lower() != "true":
        if not is_complete(Path(resume)):
            raise UserError(
                f"--resume_from_checkpoint {resume}: is no whole checkpoint; give `true` or a checkpoint-N folder"
            )
        return resume
    last = last_checkpoint(output_dir)
    if last is None:
        raise UserError(f"--resume_from_checkpoint true: {output_dir} holds no checkpoint; start without it")
    return str(last)


def discard_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint so that it never looks whole in between."""
    (checkpoint / STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def describe_resume(output_dir: Path) -> str:
    """What to do after a run broke off."""
    last = last_checkpoint(output_dir)
    if last is None:
        return "no epoch of this training was finished: the same command starts again, or says how to go on"
    return f"go on with --resume_from_checkpoint true, from {last.name}"


def make_room(output_dir: Path, needed: int, best: str | None) -> None:
    """See that `needed` bytes are free, deleting checkpoints that are neither the best nor the last if they are not.

    Raises `UserError`, with those two left as they are, where that is not enough.
    """
    if shutil.disk_usage(output_dir).free < needed:
        rotate_checkpoints(str(output_dir), save_total_limit=1, best_model_checkpoint=best)
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise UserError(
            f"{output_dir}: the next checkpoint needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free; "
            f"free some, then {describe_resume(output_dir)}"
        )


class RunProvenance(TrainerCallback, ExportableState):
    """What a run is made from, kept in its checkpoints so that resuming notices what has changed since."""

    def __init__(self, data_fingerprint: str, split_fingerprint: str, arguments: Mapping):
        self.data_fingerprint, self.split_fingerprint = data_fingerprint, split_fingerprint
        self.arguments = {name: value for name, value in arguments.items() if decides_weights(name)}

    def state(self) -> dict:
        return {"args": vars(self).copy(), "attributes": {}}

    def check(self, checkpoint: Path) -> None:
        """Refuse a checkpoint of other data; warn of arguments that differ. Raises `UserError`."""
        then = read_state(checkpoint).get("stateful_callbacks", {}).get(type(self).__name__, {}).get("args")
        if then is not None:
            self.compare(checkpoint, then)

    def compare(self, place: Path, then: Mapping) -> None:
        """The same for what lies at a place, from `then`: its fingerprints and arguments."""
        for name, what in (("data_fingerprint", "images"), ("split_fingerprint", "validation images")):
            if then[name] != getattr(self, name):
                raise UserError(
                    f"{place}: was made from other {what}: the data or the split have changed since; "
                    "restore them, or start again in another --output_dir"
                )
        changes = [
            f"{name} {then['arguments'][name]} -> {value}"
            for name, value in self.arguments.items()
            if name in then["arguments"] and then["arguments"][name] != value
        ]
        if changes:
            logger.warning("going on with other arguments than %s was made with: %s", place, ", ".join(changes))
