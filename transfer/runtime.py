"""The process and its environment: supported libraries, precision, CPU threads and memory, signals, and processes."""

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import inspect
import multiprocessing
import os
import platform
import select
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
import yaml
from accelerate import PartialState
from transformers import TrainingArguments

from transfer import terminal
from transfer.errors import Terminated, UserError, at_end

# Supported libraries. This project overrides methods of other libraries, and calls some that are private there. If one
# of them is renamed, an override becomes dead code and nothing says so: the run would end with silently wrong results.
# So every run checks these lists before it does anything else.

# The versions that the list below was written for; constraints.txt pins them.
TESTED = {"transformers": "5.23.0", "accelerate": "1.15.0", "torch": "2.13.0", "evaluate": "0.4.6"}

# Class -> method that we override -> the parameters that we rely on.
OVERRIDDEN: dict[str, dict[str, tuple[str, ...]]] = {
    "transformers:Trainer": {
        "train": ("resume_from_checkpoint", "trial", "ignore_keys_for_eval"),
        "training_step": ("model", "inputs", "num_items_in_batch"),
        "prediction_step": ("model", "inputs", "prediction_loss_only", "ignore_keys"),
        "evaluate": ("eval_dataset", "ignore_keys", "metric_key_prefix"),
        "create_optimizer": ("model",),
        "save_model": ("output_dir", "_internal_call"),
        "floating_point_ops": ("inputs",),
        # Private: without it, the norm of all gradients is computed at every step, only to be logged.
        "_get_grad_norm": ("model", "grad_norm"),
    },
    "evaluate:Metric": {"_info": (), "_compute": ()},  # both are meant to be overridden
    # The hooks of the callbacks: without on_train_end, a run would end with the last epoch instead of the best.
    "transformers:TrainerCallback": dict.fromkeys(
        (
            "on_train_begin",
            "on_train_end",
            "on_epoch_begin",
            "on_epoch_end",
            "on_step_begin",
            "on_step_end",
            "on_prediction_step",
            "on_evaluate",
            "on_save",
            "on_log",
        ),
        ("args", "state", "control"),
    ),
}

# Private function that we call -> its parameters. Where torch emulates bf16 on a CPU, fp32 is faster.
CALLED: dict[str, tuple[str, ...]] = {"torch.cpu:_is_avx512_bf16_supported": ()}


def _find(name: str):
    """What `module:attribute` names, or None."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute, None)


def _misses(function, parameters: tuple[str, ...]) -> bool:
    """Whether a function is missing or lacks one of the parameters."""
    return function is None or not set(parameters) <= inspect.signature(function).parameters.keys()


def check_libraries() -> None:
    """Raise `UserError` unless the installed libraries have all that we override and call."""
    for name, methods in OVERRIDDEN.items():
        for method, parameters in methods.items():
            if _misses(getattr(_find(name), method, None), parameters):
                _refuse(name, method, parameters)
    for name, parameters in CALLED.items():
        if _misses(_find(name), parameters):
            _refuse(name, name.partition(":")[2], parameters)


def _refuse(name: str, method: str, parameters: tuple[str, ...]) -> None:
    package = name.partition(":")[0].partition(".")[0]
    raise UserError(
        f"{package} {importlib.metadata.version(package)} has no {method}({', '.join(parameters)}) in "
        f"{name.partition(':')[0]}, which this project needs; it was tested with {package} {TESTED[package]}: "
        "pip install -r requirements.txt"
    )


# Precision, threads and memory

PRECISION_VARIABLE = "ACCELERATE_MIXED_PRECISION"  # how accelerate launch tells the script
ACCELERATE_CONFIG = Path(__file__).resolve().parent.parent / "accelerate_config.yaml"

# Only accelerate launch and torchrun set these: a precision may also come from the user's own environment.
LAUNCHER_VARIABLES = ("ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")
LAST_SECONDS = 600.0  # for the last checkpoint of a run whose launcher has ended
# What a terminal's or scheduler's end looks like; nohup ignores SIGHUP, which then stays ignored.
END_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _has_bf16_units() -> bool:
    """Whether the device multiplies bf16 in hardware; elsewhere torch emulates it, slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_capability() >= (8, 0)
    if torch.accelerator.is_available():
        return True
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()


def resolve_mixed_precision() -> str:
    """Set the mixed precision in the environment, from where the Trainer reads it; returns a line to print.

    accelerate_config.yaml states it and the launcher passes it on; without a launcher it is read here. A precision
    that is slow on this device is replaced: bf16 by fp16 on a GPU without bf16 units and by fp32 on such a CPU, fp16
    by fp32 on any CPU.
    """
    if not any(name.startswith("ACCELERATE_") for name in os.environ) and ACCELERATE_CONFIG.is_file():
        stated = (yaml.safe_load(ACCELERATE_CONFIG.read_text(encoding="utf-8")) or {}).get("mixed_precision", "no")
        os.environ[PRECISION_VARIABLE] = str(stated)
    asked = os.environ.get(PRECISION_VARIABLE)
    if asked is None:
        return "precision: fp32, because the launcher named no mixed_precision"
    if asked == "no":
        return "precision: fp32 (mixed_precision in the accelerate config)"
    chosen = asked
    if asked == "bf16" and not _has_bf16_units():
        chosen = "fp16" if torch.cuda.is_available() else "no"
    elif asked == "fp16" and not torch.accelerator.is_available():
        chosen = "no"
    os.environ[PRECISION_VARIABLE] = chosen
    shown = "fp32" if chosen == "no" else chosen
    if chosen == asked:
        return f"precision: {shown} (mixed_precision in the accelerate config)"
    return f"precision: {shown}, not the accelerate config's {asked}, which is slow on this device"


def count_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_all_cores() -> None:
    """Let torch compute on every core that this process may use; several processes share the cores.

    accelerate launch sets OMP_NUM_THREADS=1 unless it is set, which halves the speed on two cores. To use fewer
    cores, start the run with `taskset`.
    """
    if os.environ.get("OMP_NUM_THREADS") == "1" and PRECISION_VARIABLE in os.environ:
        torch.set_num_threads(max(1, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def tune_malloc() -> None:
    """Let glibc reuse the memory of freed tensors instead of returning it to the system.

    By default every large tensor gets new pages, which the system fills with zeros at first touch: on a CPU a third of
    the time of a forward pass. Does nothing with an accelerator or without glibc.
    """
    if torch.accelerator.is_available() or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX: take every block from the heap
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


class EndSignals:
    """SIGTERM and SIGHUP: they raise `Terminated` at once, or at the end of the step while a training can be saved."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._is_deferred = False

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        self.received = number
        _silence_lost_outputs()
        if not self._is_deferred:
            raise Terminated(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note signals: the training looks for them after every step."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.received is not None:  # after the last step: everything is saved
            raise Terminated(self.received)


end_signals = EndSignals()


def _silence_lost_outputs() -> None:
    """Send what is printed from now on nowhere, where the terminal or the reader of a pipe has gone."""
    if not hasattr(select, "poll"):
        return
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        with contextlib.suppress(OSError):
            if any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in poll.poll(0)):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


@functools.cache
def shield_worker(pid: int) -> None:
    """For a data worker: it ends with its run, which may still need it for the last step, and not by itself.

    `pid` is its own. SIGTERM is obeyed only if it comes from the run, which torch and multiprocessing may send.
    """
    for number in END_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()
    run = parent.pid if parent else os.getppid()  # under forkserver, the system's parent is the server

    def obey() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
            pass
        os._exit(0)

    threading.Thread(target=obey, daemon=True).start()


_forks_follow = False


@functools.cache
def _let_forks_follow() -> None:
    """Prepare `forks_end_with_this_process`; what is registered for forks stays for good."""
    libc = ctypes.CDLL(None)

    def follow() -> None:
        if _forks_follow:
            libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    os.register_at_fork(after_in_child=follow)


@contextlib.contextmanager
def forks_end_with_this_process() -> Iterator[None]:
    """On Linux, the system kills the processes that are forked in here when this one is killed: nobody else would."""
    global _forks_follow
    if sys.platform == "linux":
        _let_forks_follow()
    _forks_follow = True
    try:
        yield
    finally:
        _forks_follow = False


def handle_end_signals() -> None:
    """Let SIGTERM and SIGHUP end the running command in order, until it ends; those that somebody handles stay."""
    if threading.current_thread() is not threading.main_thread():
        return
    end_signals.received = None
    for number in END_SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end_signals.handle)
            at_end(functools.partial(signal.signal, number, signal.SIG_DFL))


def _is_orphan(parent: int) -> bool:
    """Whether a launched process belongs to the system's first process, which is not the launcher."""
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
        name = Path(f"/proc/{parent}/comm").read_text().strip()
    except OSError:
        return False
    return (parent == 1 or name == "systemd") and not any(word in command for word in (b"accelerate", b"torch"))


def end_with_launcher() -> None:
    """End this process in order when the launcher that started it has ended, in whatever way.

    Schedulers, notebooks and IDEs stop the process that they started, and accelerate launch does not pass that on.
    """
    if not any(name in os.environ for name in LAUNCHER_VARIABLES) or not hasattr(signal, "SIGHUP"):
        return
    parent, ended = os.getppid(), threading.Event()
    if _is_orphan(parent):
        raise Terminated(signal.SIGTERM, "because its launcher has ended")

    def watch() -> None:
        while os.getppid() == parent:
            if ended.wait(0.5):
                return
        os.kill(os.getpid(), signal.SIGTERM)
        if not ended.wait(LAST_SECONDS):
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    at_end(ended.set)


def restore_environment() -> None:
    """Let what a run sets for accelerate end with its command: the next one in this process must not read it."""
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}

    def restore() -> None:
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
        os.environ.update(before)

    at_end(restore)


def set_up_runtime() -> str:
    """Check the libraries and tune the process before anything is computed; returns a line on the precision."""
    restore_environment()
    handle_end_signals()
    end_with_launcher()
    check_libraries()
    use_all_cores()  # first: it looks for what the launcher set
    precision = resolve_mixed_precision()
    tune_malloc()
    return precision


def launched_processes() -> int:
    """Number of processes that the launcher started, over all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def must_use_cpu() -> bool:
    """Whether several processes run without an accelerator: accelerate then needs use_cpu."""
    return launched_processes() > 1 and not torch.accelerator.is_available()


def shards_model() -> bool:
    """Whether the launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def can_shard() -> bool:
    """Whether accelerate can shard the model; on CPUs it silently trains without FSDP."""
    return torch.accelerator.is_available()


def say(*lines: str) -> None:
    """Print lines from the main process; accelerate's own `print` would do so once per machine.

    Call it only after TrainingArguments have been made: they tell accelerate which backend to use.
    """
    if PartialState().is_main_process:
        terminal.show(*lines)


def note(*lines: str) -> None:
    """Write lines to run.log from the main process, and not to the screen."""
    if PartialState().is_main_process:
        terminal.log_only(*lines)


def share_batch(images: int, accumulation: int, processes: int) -> tuple[int, int]:
    """Batch size and gradient accumulation of each of several processes, for the optimizer step of a single one.

    `images` and `accumulation` are those of the single process. The batch never grows, so what fits one device fits
    each. Raises `UserError` if the step cannot be shared equally.
    """
    step = images * accumulation
    if step % processes:
        raise UserError(
            f"--per_device_train_batch_size {images}: {step} images per step cannot be divided equally among "
            f"{processes} processes; use {max(1, round(images / processes)) * processes}"
        )
    share = step // processes
    batch = max(size for size in range(1, min(images, share) + 1) if share % size == 0)
    return batch, share // batch


def share_steps(args: TrainingArguments) -> list[str]:
    """Divide the arguments' batch among the processes, which keeps the optimizer step; returns lines to print."""
    processes = args.world_size
    if processes == 1:
        return []
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    images, times = share_batch(args.per_device_train_batch_size, args.gradient_accumulation_steps, processes)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = images, times
    accumulated = f", {times} times accumulated" if times > 1 else ""
    return [f"processes   a step of {step} images = {processes} processes x {images}{accumulated}"]
