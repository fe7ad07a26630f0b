"""Pool categories with few examples with similar categories.

A category with n < m examples counts as if the others of its pool had m - n objects, with the detections that belong to
them, in addition to its own: with no example it gets the pool's threshold, with m its own. The pool is that of its
frequency (LVIS), else of its supercategory, else all categories: the first whose other categories have m examples. What
an example is depends on the target (`Sample.num_examples`). For the others it is always an object, or a detection where
these are fewer, since most detections have scores so low that they say nothing about a threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from owlsam_ray.calibrate.curves import CurveCounts, Cuts, blended, counts_of, cuts_of
from owlsam_ray.calibrate.samples import Sample, TargetName, pooled

GRID = 256
"""Number of cuts of pools and of resamples."""
ALL = "all categories"


@dataclass(frozen=True)
class Pool:
    """Categories whose samples are combined."""

    name: str
    members: frozenset[int]
    """Indices of its categories."""
    sample: Sample
    floor: float

    @cached_property
    def cuts(self) -> Cuts:
        """At most `GRID` cuts."""
        return cuts_of(self.sample.score, self.floor, GRID)

    @cached_property
    def counts(self) -> CurveCounts:
        """Counts at its cuts."""
        return counts_of(self.sample, self.cuts)


@dataclass(frozen=True, slots=True)
class Basis:
    """The data that a category's threshold is chosen from."""

    place: int
    """Index of the category."""
    sample: Sample
    """The category's own sample."""
    cuts: Cuts
    """Every distinct score; the pool's cuts if there is a pool."""
    counts: CurveCounts
    pool: Pool | None = None
    """None for a category that is not pooled."""
    weight: float = 0.0
    """Weight of each detection and object of the pool's other categories."""

    @staticmethod
    def alone(place: int, sample: Sample, floor: float) -> "Basis":
        """Basis of a category that is not pooled."""
        cuts = cuts_of(sample.score, floor)
        return Basis(place, sample, cuts, counts_of(sample, cuts))


def bases(
    samples: Sequence[Sample],
    groups: Sequence[Sequence[str]],
    floor: float,
    enough: int,
    *,
    target: TargetName,
) -> tuple[list[Basis], Pool]:
    """Return the basis of each category's threshold, and the pool of all categories.

    Args:
        samples: one sample for each category; at least one has a detection.
        groups: for each category, names of pools, the narrowest first.
        floor: the lowest threshold.
        enough: number of examples from which a category is not pooled.
        target: determines what an example is.
    """
    members: dict[str, list[int]] = {}
    for place, names in enumerate(groups):
        for name in names:
            members.setdefault(name, []).append(place)
    members[ALL] = list(range(len(samples)))
    lent = np.array([each.num_examples("f1") for each in samples])
    made: dict[str, Pool] = {}

    def pool_of(name: str) -> Pool:
        if name not in made:
            sample = pooled([samples[place] for place in members[name]])
            made[name] = Pool(name, frozenset(members[name]), sample, floor)
        return made[name]

    found = []
    for place, sample in enumerate(samples):
        missing = enough - sample.num_examples(target)
        if missing <= 0:
            found.append(Basis.alone(place, sample, floor))
            continue
        others = {name: int(lent[members[name]].sum() - lent[place]) for name in (*groups[place], ALL)}
        name = next((name for name, count in others.items() if count >= enough), ALL)
        pool = pool_of(name)
        weight = min(1.0, missing / max(1, others[name]))
        own = counts_of(sample, pool.cuts)
        found.append(Basis(place, sample, pool.cuts, blended(own, pool.counts, weight), pool, weight))
    return found, pool_of(ALL)
