"""Two runs on the same held-out images: is one better, or is the difference noise?"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from transfer import UserError
from transfer.reporting.results import RunResults

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Comparison:
    """McNemar's test (1947), exact: of the images that one run alone gets right, is one run's share above a half?"""

    images: int
    first_right: int
    second_right: int
    first_alone: int  # images that only the first run gets right
    second_alone: int
    p_value: float
    interval: tuple[float, float]  # 95%, of the second run's accuracy less the first's

    @property
    def difference(self) -> float:
        return (self.second_right - self.first_right) / self.images


def align_hits(first: RunResults, second: RunResults) -> tuple[np.ndarray, np.ndarray]:
    """(N,) bool each: which images the two runs got right, in one order. Raises `UserError` if these differ."""
    files = [run.predictions.validation_files for run in (first, second)]
    orders = [np.argsort(names, kind="stable") for names in files]
    named = [names[order] for names, order in zip(files, orders, strict=True)]
    if not np.array_equal(*named):
        only = set(named[0]) ^ set(named[1])
        raise UserError(
            f"{first.folder} and {second.folder} held out other images ({len(only)} are in one of them alone, for "
            f"example {min(only)}); only runs with the same data, --validation_fraction and --split_seed compare"
        )
    labels = [run.predictions.validation_labels[order] for run, order in zip((first, second), orders, strict=True)]
    if not np.array_equal(*labels):
        file = named[0][np.flatnonzero(labels[0] != labels[1])[0]]
        raise UserError(f"{first.folder} and {second.folder} give {file} other labels; their classes are not the same")
    return first.hits[orders[0]], second.hits[orders[1]]


def compare_hits(first: np.ndarray, second: np.ndarray) -> Comparison:
    """The paired comparison of which images two classifiers got right, (N,) bool each in one order."""
    alone = int((first & ~second).sum()), int((second & ~first).sum())
    discordant, images = sum(alone), len(first)
    test = binomtest(alone[1], discordant) if discordant else None
    # What is uncertain is how the images that they disagree on split; the others cancel out.
    interval = (0.0, 0.0)
    if test is not None:
        share = test.proportion_ci(method="exact")
        interval = tuple((2 * bound - 1) * discordant / images for bound in (share.low, share.high))
    p_value = 1.0 if test is None else float(test.pvalue)
    return Comparison(images, int(first.sum()), int(second.sum()), *alone, p_value, interval)


def compare_runs(first: RunResults, second: RunResults) -> Comparison:
    """The paired comparison of two runs. Raises `UserError` where their held-out images differ."""
    return compare_hits(*align_hits(first, second))


def describe_comparison(c: Comparison, first: str, second: str) -> list[str]:
    """The comparison in words, a line each; the last one is the answer."""
    width = max(len(first), len(second))
    low, high = (100 * bound for bound in c.interval)
    lines = [
        f"{name:<{width}}  {right / c.images:.4f}  {right} of {c.images} right, {alone} of them it alone"
        for name, right, alone in ((first, c.first_right, c.first_alone), (second, c.second_right, c.second_alone))
    ]
    lines.append(f"difference {100 * c.difference:+.2f} points (95% interval {low:+.2f} to {high:+.2f})")
    lines.append(f"McNemar's exact test on {c.first_alone + c.second_alone} images: p = {c.p_value:.3g}")
    if c.p_value < SIGNIFICANCE:
        better = second if c.difference > 0 else first
        lines.append(f"{better} is better: such a difference is rarely noise. Other seeds may still differ more.")
    else:
        lines.append("This is within noise: these images cannot tell the two runs apart.")
    return lines
