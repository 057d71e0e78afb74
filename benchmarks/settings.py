"""How much each setting of the training loop changes its speed on this machine: one is changed at a time.

    accelerate launch --config_file accelerate_config.yaml benchmarks/settings.py [--cases atto lite0] [--json PATH]

Every measurement is the median step time of a training in its own process. Settings take turns in each repeat. The
numbers are step times relative to those of the project's settings, medians over the repeats: above 1, the project's
setting is faster.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from tqdm import tqdm

from benchmarks.throughput import CASES, GPU_CASES, open_store, project_trainer, quiet, train_timed
from data_loading import load_dataset, open_data
from transfer.models.cpu_kernels import apply_cpu_speedups, skip_saturated_gates, use_plain_attention
from transfer.models.load import read_geometry
from transfer.runs.record import describe_device, describe_versions
from transfer.runtime import resolve_mixed_precision, tune_malloc, use_all_cores
from transfer.training import trainer

# name: TrainingArguments that it changes; the other switches are read by `measure`.
SETTINGS: dict[str, dict] = {
    "as the project does it": {},
    "depthwise gradients as torch computes them": {},
    "freed memory given back (no mallopt)": {},
    "contiguous instead of channels-last": {},
    "attention by the fused kernel (SDPA)": {},
    "AdamW not fused": {"optim": "adamw_torch"},
    "gradients clipped": {"max_grad_norm": 1.0},
    "non-finite losses filtered": {"logging_nan_inf_filter": True},
    "two worker processes": {"dataloader_num_workers": 2},
    "compiled": {"torch_compile": True},
}
PROJECT = next(iter(SETTINGS))


def in_contiguous_format(model: torch.nn.Module) -> None:
    """Undo channels-last in the model and in what it is fed."""
    model.to(memory_format=torch.contiguous_format)
    trainer.channels_last = torch.Tensor.contiguous


def measure(case: str, setting: str, data_dir: str) -> float:
    """Median seconds of a step."""
    resolve_mixed_precision()
    use_all_cores()
    if "mallopt" not in setting:
        tune_malloc()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    _, build, batch, steps = (CASES | GPU_CASES)[case]
    model, processor = build()
    (skip_saturated_gates if "depthwise" in setting else apply_cpu_speedups)(model)
    geometry = read_geometry(processor)
    if "attention" not in setting:
        use_plain_attention(model, (batch, geometry.crop[0]), (batch, geometry.crop[0]))
    folder = open_data(data_dir)
    store = open_store(folder, geometry)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = quiet(scratch, batch, steps) | SETTINGS[setting]
        ours = project_trainer(model, processor, store, load_dataset(folder), arguments)
        if "contiguous" in setting:
            in_contiguous_format(ours.model)
        return train_timed(ours, steps)


def applies(case: str, setting: str) -> bool:
    """Whether a model has what the setting changes."""
    if "attention" in setting:
        return case.startswith("vit")
    return "depthwise" not in setting or not case.startswith("vit")


def main() -> None:
    """Measure what the command line names and print it."""
    known = CASES | (GPU_CASES if torch.cuda.is_available() else {})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES | GPU_CASES), default=list(known))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS)[1:], default=list(SETTINGS)[1:-1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data_dir", default="sample", help="images to train on")
    parser.add_argument("--json", type=Path, help="where to write the seconds of every repeat")
    options = parser.parse_args()
    use_all_cores()  # as every measurement does
    print(resolve_mixed_precision(), describe_device(), sep="\n")
    spawn, results = multiprocessing.get_context("spawn"), {}
    for case in options.cases:
        names = [name for name in [PROJECT, *options.settings] if applies(case, name)]
        results[case] = {name: [] for name in names}
        for _ in tqdm(range(options.repeats), desc=case):
            for name in names:
                with ProcessPoolExecutor(1, mp_context=spawn) as alone:
                    results[case][name].append(alone.submit(measure, case, name, options.data_dir).result())
    lines = [f"| setting | {' | '.join(options.cases)} |", "|---" * (len(options.cases) + 1) + "|"]
    for name in options.settings:
        cells = []
        for case in options.cases:
            pairs = zip(results[case].get(name, []), results[case][PROJECT], strict=False)
            ratios = [switched / own for switched, own in pairs]
            cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if options.json:
        found = {"device": describe_device(), "versions": dict(describe_versions()), "seconds": results}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
