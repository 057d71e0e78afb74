"""Runs of the program in several processes, as accelerate launch starts them, without its seconds of importing."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import datasets
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import ROOT

from transfer import runtime
from transfer.transforms import training

CONFIGS = ROOT / "recipes" / "accelerate"

# Forks of a process that has everything imported and has computed nothing.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["finetune_vit", "several"])


def whole_images(heights, widths, min_area, generator):
    """In `draw_crops`' place: training views that are not random."""
    return [torch.zeros_like(heights), torch.zeros_like(widths), heights, widths]


def see_whole_images() -> None:

    training.draw_crops = whole_images


def run_out_of_memory() -> None:
    """The second process alone, in its fourth step."""
    from transfer import errors
    from transfer.training.trainer import FinetuningTrainer

    original = FinetuningTrainer.compute_loss

    def compute(self, model, *args, **kwargs):
        if model.training and self.args.process_index == 1 and self.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return original(self, model, *args, **kwargs)

    FinetuningTrainer.compute_loss = compute
    errors.OTHERS_WAIT_SECONDS = 0.1


def get_sigterm_in_step_7() -> None:
    """In the second process alone."""
    from transfer.training.trainer import FinetuningTrainer

    original = FinetuningTrainer.compute_loss

    def compute(self, model, *args, **kwargs):
        if model.training and self.args.process_index == 1 and self.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, model, *args, **kwargs)

    FinetuningTrainer.compute_loss = compute


def be_slow_in_the_second_process() -> None:
    """So that the two would not agree on how many steps fit into `--max_minutes`."""
    from transfer.runs.timing import TimeBudget

    original = TimeBudget._count_steps

    def count(self, *args):
        return original(self, *args) if os.environ["RANK"] == "0" else 0

    TimeBudget._count_steps = count


def shard_on_cpus() -> None:
    """accelerate shards models on accelerators alone, though gloo can: take the CPU for one."""
    from accelerate.state import DistributedType, PartialState

    original = PartialState.__init__

    def start(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start
    runtime.can_shard = lambda: True


def _work(environment: dict, cache: str, log: str, argv: list[str], changes: list) -> None:
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    for change in changes:
        change()
    from finetune_vit import main

    main(argv)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(
    argv: list, log: Path, cache: Path, config: str = "cpu_2", processes: int = 2, changes=(), seconds: int = 120
) -> int:
    """Run the program; returns the exit code of the first process that failed, else 0. What they print is in `log`.

    As the launcher does, the others are ended where one has failed; `changes` are called in each process before.
    """
    words = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--mixed_precision", "no", "finetune_vit.py"]
    options, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    options.num_processes = processes
    environment = {name: value for name, value in prepare_multi_gpu_env(options).items() if name not in os.environ}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_MIXED_PRECISION": "no", "LOCAL_WORLD_SIZE": str(processes)}
    environment |= {"WORLD_SIZE": str(processes)}
    started = []
    for rank in map(str, range(processes)):
        one = environment | {"RANK": rank, "LOCAL_RANK": rank}
        started.append(
            CONTEXT.Process(target=_work, args=(one, str(cache), str(log), list(map(str, argv)), list(changes)))
        )
        started[-1].start()
    deadline = time.monotonic() + seconds
    while any(p.exitcode is None for p in started) and not any(p.exitcode for p in started):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    hanging = time.monotonic() > deadline
    failed = [p.exitcode for p in started if p.exitcode]
    for process in started:
        process.kill()
        process.join()
    assert not hanging, log.read_text()
    return failed[0] if failed else 0


if __name__ == "__main__":  # by hand: python tests/several.py CONFIG CACHE [change ...] -- RECIPE [--key value ...]
    cut = sys.argv.index("--")
    config, cache, *names = sys.argv[1:cut]
    import several

    log = Path(f"{cache}.log")
    log.unlink(missing_ok=True)
    code = several.launch(
        sys.argv[cut + 1 :], log, Path(cache), config, changes=[getattr(several, name) for name in names], seconds=300
    )
    print(log.read_text(), "exit code", code)
