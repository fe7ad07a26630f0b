"""Categories with few examples borrow from others.

A category with n < m examples counts as if the others of its pool had m - n objects, with the detections that go with
them, on top of its own: with no example it gets the pool's threshold, with m its own. The pool is that of its frequency
(LVIS), else of its supercategory, else all: the first whose others have m. What an example is depends on the target
(`Sample.num_examples`); of others it is always an object, or a detection where these are fewer, since most detections
have scores so low that they say nothing about a threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from owlsam_ray.calibrate.curves import CurveCounts, Cuts, blended, counts_of, cuts_of
from owlsam_ray.calibrate.samples import Sample, TargetName, pooled

GRID = 256
"""Cuts of a pool, and of resamples."""
ALL = "all categories"


@dataclass(frozen=True)
class Pool:
    """Categories that are taken together."""

    name: str
    members: frozenset[int]
    """Places of its categories."""
    sample: Sample
    floor: float

    @cached_property
    def cuts(self) -> Cuts:
        """At most `GRID`."""
        return cuts_of(self.sample.score, self.floor, GRID)

    @cached_property
    def counts(self) -> CurveCounts:
        """At its cuts."""
        return counts_of(self.sample, self.cuts)


@dataclass(frozen=True, slots=True)
class Basis:
    """What a category's threshold is chosen from."""

    place: int
    """Of the category."""
    sample: Sample
    """Its own."""
    cuts: Cuts
    """Every distinct score; those of the pool where there is one."""
    counts: CurveCounts
    pool: Pool | None = None
    """None for a category that stands for itself."""
    weight: float = 0.0
    """Of each detection and object of the pool's other categories."""

    @staticmethod
    def alone(place: int, sample: Sample, floor: float) -> "Basis":
        """Of a category that stands for itself."""
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
    """What the threshold of each category is chosen from, and the pool of all.

    Args:
        samples: of each category; at least one has a detection.
        groups: of each category, names of pools, the narrowest first.
        floor: the lowest threshold.
        enough: examples with which a category stands for itself.
        target: says what an example is.
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
