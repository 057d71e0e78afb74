"""What a run tells about itself on its way: wall time in its log, and trackers such as TensorBoard."""

import time

from transformers import TrainerCallback
from transformers.integrations import is_tensorboard_available
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from transfer import UserError


def default_trackers() -> list[str]:
    """TensorBoard where it is installed, and nothing elsewhere: no other tracker may start unasked."""
    return ["tensorboard"] if is_tensorboard_available() else []


def check_trackers(names: list[str]) -> None:
    """Refuse a tracker that is unknown or not installed, before anything is read. Raises `UserError`."""
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UserError(
                f"--report_to {name}: is no tracker; there are {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()  # opens nothing before training begins
        except (RuntimeError, ImportError) as fault:
            raise UserError(f"--report_to {name}: cannot be used: {' '.join(str(fault).split())}") from None


class StampSeconds(TrainerCallback):
    """Adds to every entry of the log how many seconds of training led to it; a resumed run counts on."""

    def on_train_begin(self, args, state, control, **kwargs):
        spent = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self.start = time.perf_counter() - spent

    def on_log(self, args, state, control, **kwargs):
        if state.log_history and hasattr(self, "start"):
            state.log_history[-1].setdefault("seconds", round(time.perf_counter() - self.start, 2))
