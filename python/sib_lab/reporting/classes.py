"""Class by class: how often each is told, what it is taken for, and whether the explanation lies on its objects."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor


def by_class(classes: Sequence[str], methods: Sequence[str], runs: Sequence[Mapping[str, Any]], epg: str) -> dict:
    """Of the explained test set, each number the mean over a method's runs.

    Args:
        runs: each with ``method``, ``told`` (``labels`` and ``predicted`` of every test image; of several labels
            ``images`` and ``average_precision`` of every class), ``labels`` of the explained images and ``values``, a
            tensor for each key.
        epg: the key of the EPG that stands for all.

    Returns:
        ``rows``: for each class its ``name``, number of ``images``, and by training method ``accuracy`` and ``epg``
        (None: no such image, or no mask); ``confusion``: training method -> [K,K], how many images of the class of a
        row were taken for that of a column, in all runs together. Of several labels ``average_precision`` takes the
        place of ``accuracy``, and there is no confusion.
    """
    count = len(classes)
    if "average_precision" in runs[0]["told"]:
        return {"rows": _of_labels(classes, methods, runs, epg), "confusion": {}}
    confusion = {method: np.zeros((count, count), dtype=int) for method in methods}
    shares: dict[str, list[np.ndarray]] = {method: [] for method in methods}
    for run in runs:
        told, method = run["told"], run["method"]
        np.add.at(confusion[method], (np.asarray(told["labels"], int), np.asarray(told["predicted"], int)), 1)
        if epg in run["values"]:
            shares[method].append(means(run["values"][epg], run["labels"], count))
    return {
        "rows": [
            {
                "name": name,
                "images": int(np.bincount(np.asarray(runs[0]["told"]["labels"], int), minlength=count)[label]),
                "accuracy": {m: _share(matrix[label, label], matrix[label].sum()) for m, matrix in confusion.items()},
                "epg": {m: _mean([of_run[label] for of_run in of]) for m, of in shares.items() if of},
            }
            for label, name in enumerate(classes)
        ],
        "confusion": {method: matrix.tolist() for method, matrix in confusion.items()},
    }


def _of_labels(
    classes: Sequence[str], methods: Sequence[str], runs: Sequence[Mapping[str, Any]], epg: str
) -> list[dict]:
    of = {method: [run for run in runs if run["method"] == method] for method in methods}
    precisions = {m: [np.asarray(run["told"]["average_precision"], float) for run in some] for m, some in of.items()}
    shares = {
        method: [means(run["values"][epg], run["labels"], len(classes)) for run in some if epg in run["values"]]
        for method, some in of.items()
    }
    return [
        {
            "name": name,
            "images": int(runs[0]["told"]["images"][label]),
            "average_precision": {m: _mean([of_run[label] for of_run in some]) for m, some in precisions.items()},
            "epg": {m: _mean([of_run[label] for of_run in some]) for m, some in shares.items() if some},
        }
        for label, name in enumerate(classes)
    ]


def means(values: Tensor, labels: Sequence[int], count: int) -> np.ndarray:
    """The mean of the defined values of each class [count]; NaN where there is none."""
    values, labels = np.asarray(values, float), np.asarray(labels, int)
    known = np.isfinite(values)
    sums, images = (np.bincount(labels[known], weights, count) for weights in (values[known], None))
    return np.divide(sums, images, out=np.full(count, np.nan), where=images > 0)


def _share(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else None


def mistakes(matrix: Sequence[Sequence[int]], classes: Sequence[str], most: int) -> list[tuple[str, str, int, float]]:
    """The most frequent ones: (class, taken for, images, share of the class's images)."""
    matrix = np.asarray(matrix)
    wrong = matrix - np.diag(np.diag(matrix))
    found = []
    for place in np.argsort(-wrong, axis=None, kind="stable")[:most]:
        row, column = divmod(int(place), len(classes))
        if wrong[row, column]:
            share = wrong[row, column] / matrix[row].sum()
            found.append((classes[row], classes[column], int(wrong[row, column]), float(share)))
    return found
