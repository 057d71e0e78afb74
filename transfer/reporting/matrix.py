"""The confusion matrix as one picture that can be read at a hundred classes and more."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

MOST_CLASSES = 120  # whose names can still be read; of more, those with the most mistakes are shown
CELL, MARGIN = 10, 118
# CSS pixels of a unit: few classes are not blown up to the page's width, and many do not shrink on a phone.
LARGEST_SCALE, SMALLEST_SCALE = 1.5, 0.85
LONGEST_NAME = 22

# Shares of a class's images at which the colour of a cell darkens.
LEVELS = np.array([0.05, 0.1, 0.2, 0.4, 0.7])


def choose_classes(confusions: np.ndarray, order: Sequence[int]) -> list[int]:
    """The classes to show, in the given order: all of them, or those that take part in the most mistakes."""
    if len(order) <= MOST_CLASSES:
        return list(order)
    mistakes = confusions.sum(0) + confusions.sum(1) - 2 * confusions.diagonal()
    shown = set(np.argsort(-mistakes, kind="stable")[:MOST_CLASSES].tolist())
    return [label for label in order if label in shown]


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _names(names: Sequence[str]) -> Markup:
    row, column = '<text class="name end" x="{}" y="{}">{}</text>', '<text class="name" transform="{}">{}</text>'
    texts = []
    for i, name in enumerate(names):
        baseline, edge = MARGIN + CELL * i + 8, MARGIN - 4
        texts.append(Markup(row).format(edge, baseline, _short(name)))
        texts.append(Markup(column).format(f"translate({baseline} {edge}) rotate(-90)", _short(name)))
    return Markup("").join(texts)


def _guides(count: int) -> Markup:
    """A thin line every five classes, to follow a row or a column."""
    end = MARGIN + CELL * count
    places = [MARGIN + CELL * i for i in range(0, count + 1, 5)]
    path = "".join(f"M{MARGIN} {p}H{end}M{p} {MARGIN}V{end}" for p in places)
    return Markup('<path class="guide" d="{}"/>').format(path)


def draw_matrix(confusions: np.ndarray, names: Sequence[str], order: Sequence[int]) -> tuple[Markup, dict]:
    """The picture, rows the labels and columns the predictions, and what its reading line needs.

    Cells of one colour are one path, so that a matrix of a hundred classes takes some 20 kB.
    """
    counts = confusions[np.ix_(order, order)]
    shares = counts / np.maximum(1, confusions.sum(1)[list(order)])[:, None]
    levels = np.searchsorted(LEVELS, shares, side="right")
    paths = defaultdict(list)
    for row, column in zip(*np.nonzero(counts), strict=True):
        kind = ("right" if row == column else "wrong", int(levels[row, column]))
        paths[kind].append(f"M{MARGIN + CELL * column} {MARGIN + CELL * row}h{CELL}v{CELL}h-{CELL}z")
    cells = [
        Markup('<path class="{}-{}" d="{}"/>').format(kind, level, "".join(parts))
        for (kind, level), parts in sorted(paths.items())
    ]
    shown, size = [names[label] for label in order], MARGIN + CELL * len(order) + 2
    head = (
        '<svg class="matrix" id="matrix" style="max-width:{1:.0f}px;min-width:{2:.0f}px" viewBox="0 0 {0} {0}" '
        'role="img" aria-label="confusion matrix">'
    )
    frame = Markup(head).format(size, LARGEST_SCALE * size, SMALLEST_SCALE * size)
    picture = frame + _guides(len(order)) + Markup("").join(cells) + _names(shown)
    reading = {
        "names": shown,
        "images": confusions.sum(1)[list(order)].tolist(),
        "cells": [[int(r), int(c), int(counts[r, c])] for r, c in zip(*np.nonzero(counts), strict=True)],
        "cell": CELL,
        "margin": MARGIN,
    }
    return picture + Markup('<rect class="cross" id="row"/><rect class="cross" id="column"/></svg>'), reading
