"""Who trains on what: splitting a labelled data set over workers, evenly or by label.

Every scheme gives each worker the same number of samples. Workers meet in collectives after so
many steps of their own, so a worker with fewer batches would leave the others waiting. No sample
goes to two workers. The same labels, number of workers and seed give the same partition.
"""

from fractions import Fraction
from math import ceil, floor
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from common.errors import RecipeError

__all__ = ["MAJOR_SHARE", "Indices", "Scheme", "label_counts", "partition"]

Scheme = Literal["iid", "dirichlet", "major-class"]
Indices = NDArray[np.int64]

DIRICHLET_CONCENTRATION = 0.5
# Of the 3,125 CIFAR-10 samples of each of 16 workers, 2,000 come from one class
# (Wang, Liang & Joshi 2020, non-IID setting).
MAJOR_SHARE = Fraction(2000, 3125)


def partition(labels: Indices, workers: int, scheme: Scheme, seed: int) -> list[Indices]:
    """Split the samples with these ``labels`` over ``workers``.

    - ``iid``: a random split. At most ``workers - 1`` samples are left over.
    - ``dirichlet``: each worker draws its own mix of labels from Dirichlet(0.5) and fills its share
      from what is left of each label; where its labels have run out, it takes the others. At most
      ``workers - 1`` samples are left over.
    - ``major-class``: at least 64% of each worker's samples come from one class, the rest from
      everywhere. Workers take the classes in turn. Where a class is too small for that, which
      happens with few workers, it is the shares that shrink, not the skew.

    Returns one array of sample indices per worker, all of the same length.

    Raises:
        RecipeError: the scheme is unknown, or there are too few samples for these workers.
    """
    if scheme not in get_args(Scheme):
        raise RecipeError(f"{scheme!r} is no partition; there are {', '.join(get_args(Scheme))}")
    if workers < 1:
        raise RecipeError(f"a partition needs at least one worker, not {workers}")
    if len(labels) < workers:
        raise RecipeError(f"{len(labels)} samples are too few for {workers} workers")
    rng = np.random.default_rng(seed)
    size = len(labels) // workers
    if scheme == "iid":
        return _shares(rng.permutation(len(labels)), workers, size)
    if scheme == "dirichlet":
        return _dirichlet(labels, workers, size, rng)
    return _major_class(labels, workers, size, rng)


def label_counts(labels: Indices, shares: list[Indices]) -> NDArray[np.int64]:
    """How many samples of each label each worker has, as (workers, classes)."""
    classes = int(labels.max()) + 1
    return np.stack([np.bincount(labels[share], minlength=classes) for share in shares])


def _shares(order: Indices, workers: int, size: int) -> list[Indices]:
    return [order[worker * size : (worker + 1) * size] for worker in range(workers)]


def _shuffled_by_class(labels: Indices, rng: np.random.Generator) -> list[Indices]:
    """The samples of each class that occurs, each class in random order."""
    return [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]


def _dirichlet(labels: Indices, workers: int, size: int, rng: np.random.Generator) -> list[Indices]:
    pools = _shuffled_by_class(labels, rng)
    left = np.array([len(pool) for pool in pools])
    mixes = rng.dirichlet(np.full(len(pools), DIRICHLET_CONCENTRATION), size=workers)
    shares = np.empty((workers, size), dtype=np.int64)
    # One sample each in turn, so that the last worker does not get only what nobody else wanted.
    for slot in range(size):
        for worker in range(workers):
            weights = mixes[worker] * (left > 0)
            if not weights.sum() > 0:
                weights = left.astype(np.float64)
            label = rng.choice(len(pools), p=weights / weights.sum())
            left[label] -= 1
            shares[worker, slot] = pools[label][left[label]]
    return list(shares)


def _major_class(
    labels: Indices, workers: int, size: int, rng: np.random.Generator
) -> list[Indices]:
    pools = _shuffled_by_class(labels, rng)
    # The order of the classes is drawn too, so that seeds differ in which of them are major.
    order = rng.permutation(len(pools))
    majors = [int(order[worker % len(pools)]) for worker in range(workers)]
    # Where workers share a class they share its samples; the scarcest decides for all of them.
    available = min(len(pools[major]) // majors.count(major) for major in majors)
    if available == 0:
        raise RecipeError(
            f"a class has too few samples to be the major class of its share of {workers} workers: "
            "use fewer workers or another partition"
        )
    major_size = min(ceil(MAJOR_SHARE * size), available)
    size = min(size, floor(major_size / MAJOR_SHARE))
    taken = [0] * len(pools)
    heads: list[Indices] = []
    for major in majors:
        heads.append(pools[major][taken[major] : taken[major] + major_size])
        taken[major] += major_size
    rest = rng.permutation(np.concatenate([p[n:] for p, n in zip(pools, taken, strict=True)]))
    tails = _shares(rest, workers, size - major_size)
    return [
        rng.permutation(np.concatenate([head, tail]))
        for head, tail in zip(heads, tails, strict=True)
    ]
