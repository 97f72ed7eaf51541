"""Properties of the partitions, over label sets of all shapes."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.errors import RecipeError
from common.partitions import MAJOR_SHARE, Indices, Scheme, label_counts, partition

SCHEMES: list[Scheme] = ["iid", "dirichlet", "major-class"]


def labels_of(sizes: list[int]) -> Indices:
    """Labels of classes of these sizes, in mixed order."""
    labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.int64)
    return np.random.default_rng(0).permutation(labels)


class_sizes = st.lists(st.integers(min_value=1, max_value=60), min_size=1, max_size=12)
worker_counts = st.integers(min_value=1, max_value=20)
seeds = st.integers(min_value=0, max_value=2**32)


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(deadline=None)
@given(sizes=class_sizes, workers=worker_counts, seed=seeds)
def test_shares_are_disjoint_and_equally_large(
    scheme: Scheme, sizes: list[int], workers: int, seed: int
) -> None:
    labels = labels_of(sizes)
    assume(len(labels) >= workers)
    try:
        shares = partition(labels, workers, scheme, seed)
    except RecipeError:
        # The only refusal there is with as many samples as workers: no class to go round.
        assert scheme == "major-class"
        assert min(sizes) < -(-workers // len(sizes))
        return
    assert len(shares) == workers
    assert len({len(share) for share in shares}) == 1
    assert len(shares[0]) > 0
    everything = np.concatenate(shares)
    assert len(np.unique(everything)) == len(everything)
    assert everything.min() >= 0
    assert everything.max() < len(labels)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet"])
@settings(deadline=None)
@given(sizes=class_sizes, workers=worker_counts, seed=seeds)
def test_less_than_one_sample_a_worker_is_left_over(
    scheme: Scheme, sizes: list[int], workers: int, seed: int
) -> None:
    labels = labels_of(sizes)
    assume(len(labels) >= workers)
    shares = partition(labels, workers, scheme, seed)
    assert len(labels) - sum(map(len, shares)) < workers


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(deadline=None)
@given(workers=st.integers(min_value=1, max_value=8), seed=seeds)
def test_the_seed_decides_everything(scheme: Scheme, workers: int, seed: int) -> None:
    labels = labels_of([40] * 10)
    first = partition(labels, workers, scheme, seed)
    again = partition(labels, workers, scheme, seed)
    other = partition(labels, workers, scheme, seed + 1)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@settings(deadline=None)
@given(sizes=class_sizes, workers=worker_counts, seed=seeds)
def test_major_class_keeps_its_skew_whatever_the_sizes(
    sizes: list[int], workers: int, seed: int
) -> None:
    labels = labels_of(sizes)
    assume(min(sizes) >= -(-workers // len(sizes)))
    assume(len(labels) >= workers)
    shares = partition(labels, workers, "major-class", seed)
    assert (label_counts(labels, shares).max(axis=1) >= MAJOR_SHARE * len(shares[0])).all()


def test_major_class_is_the_papers_on_the_papers_sizes() -> None:
    """16 workers on CIFAR-10: 3,125 samples each, 2,000 or more of them of one class."""
    labels = labels_of([5_000] * 10)
    shares = partition(labels, 16, "major-class", seed=1)
    counts = label_counts(labels, shares)
    assert counts.sum() == 50_000
    assert (counts.sum(axis=1) == 3_125).all()
    majors = counts.argmax(axis=1)
    assert (counts.max(axis=1) >= 2_000).all()
    assert (counts.max(axis=1) < 2_200).all()
    # Workers take the ten classes in turn.
    assert len(set(majors[:10])) == 10
    assert majors[10:].tolist() == majors[:6].tolist()


def test_dirichlet_is_skewed_and_iid_is_not() -> None:
    labels = labels_of([1_000] * 10)
    iid = label_counts(labels, partition(labels, 4, "iid", seed=0))
    dirichlet = label_counts(labels, partition(labels, 4, "dirichlet", seed=0))
    # An even split has 250 of each label.
    assert abs(iid - 250).max() < 60
    assert (dirichlet.max(axis=1) > 500).all()


@pytest.mark.parametrize(
    ("labels", "workers", "scheme", "says"),
    [
        ([0, 1], 3, "iid", "2 samples are too few for 3 workers"),
        ([0, 1], 0, "iid", "at least one worker"),
        ([0, 1], 2, "alphabetical", "'alphabetical' is no partition"),
        ([0, 0, 0, 1], 4, "major-class", "too few samples to be the major class"),
    ],
)
def test_what_cannot_be_split_is_refused(
    labels: list[int], workers: int, scheme: Scheme, says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        partition(np.array(labels), workers, scheme, seed=0)
