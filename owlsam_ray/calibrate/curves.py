"""Count detections above every threshold, and choose a threshold for a target.

A *cut* is a threshold identified by the lowest score that it keeps, so that equal scores are kept or cut together.
Shapes: G cuts by descending score. Leading axes, if any, are resamples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from owlsam_ray.calibrate.samples import Sample, TargetName
from owlsam_ray.errors import ConfigError

Floats = NDArray[np.float64]
CONFIDENCE = 0.95
"""Coverage of every two-sided interval."""
Z = 1.959963984540054
"""Standard deviations of a normal variable to either side of the mean that cover `CONFIDENCE`."""
SAFE_Z = 2.3263478740408408
"""Standard deviations that cover 98 %. A ratio is *safely* at least a target when the lower end of this interval is.
That is 99 % one-sided. Since the difference of two ratios of equally many detections has √2 times the deviation of one
from the truth, it is 95 % for the ratio in another set of as many detections."""
NOTHING = -1
"""The cut that keeps nothing."""


@dataclass(frozen=True, slots=True)
class Target:
    """What thresholds are chosen for.

    - `precision`: the lowest threshold at which precision is safely (`SAFE_Z`) at least `value`. If only the bare ratio
      were, every other new set of images would miss the target.
    - `recall`: the highest threshold at which recall is safely at least `value`.
    - `f1`: the threshold with the best F1, the highest one in case of ties.
    """

    name: TargetName = "f1"
    value: float | None = None

    def __post_init__(self) -> None:
        """Reject targets that no data can show to be reached."""
        if self.name == "f1" and self.value is not None:
            raise ConfigError(f"the best F1 takes no value: leave {self.value} out")
        if self.name != "f1" and not (self.value is not None and 0 < self.value < 1):
            raise ConfigError(f"a {self.name} of {self.value} is not a valid target: give a number between 0 and 1")

    @property
    def fewest_examples(self) -> int:
        """Fewest examples that can show the target to be reached, if all of them are right."""
        return 1 if self.value is None else int(np.ceil(SAFE_Z**2 * self.value / (1 - self.value)))


@dataclass(frozen=True, slots=True)
class Cuts:
    """Thresholds to choose from."""

    lowest: Floats
    """(G,) the lowest score that each cut keeps, descending."""
    below: Floats
    """(G,) the next lower score, which the cut drops; the score floor for the last cut, which keeps all."""
    floor: float

    def threshold(self, cut: int) -> float:
        """Return a threshold with few digits that keeps exactly a cut's scores; the floor for the cut of all.

        `NOTHING` gives 1, which no score exceeds, in these images or in others. Without any detection, the result is
        the floor.
        """
        if len(self.lowest) == 0:
            return self.floor
        if cut == NOTHING:
            return 1.0
        if cut == len(self.lowest) - 1 and self.below[cut] == self.floor:
            return self.floor
        return between(float(self.below[cut]), float(self.lowest[cut]))


def between(low: float, high: float) -> float:
    """Return a number with few decimals near the middle of two float32 scores.

    As a threshold it keeps the higher score and drops the lower one, whether compared in float64 or in float32.
    """
    middle = low + (high - low) / 2
    for digits in range(2, 18):
        short = round(middle, digits)
        if low <= short and np.float32(short) < high:
            return short
    return low


def cuts_of(score: NDArray[np.float32], floor: float, most: int | None = None) -> Cuts:
    """Make the cuts of detections.

    Args:
        score: (D,) descending, all greater than the floor.
        floor: the lowest threshold.
        most: maximum number of cuts: half of them evenly spread over the detections, half with steps that grow from the
            best detection on; the lowest is among them. Default: every distinct score.
    """
    values = score.astype(np.float64)
    last = np.flatnonzero(np.diff(values, append=-np.inf))  # last index of each run of equal scores
    lowest = values[last]
    below = np.append(lowest[1:], floor)
    if most is not None and len(lowest) > most:
        ranks = np.concatenate([np.linspace(1, len(values), most // 2), np.geomspace(1, len(values), most // 2)])
        places = np.unique(np.searchsorted(last, np.round(ranks).astype(np.int64) - 1))
        lowest, below = lowest[places], below[places]
    return Cuts(lowest, below[: len(lowest)], floor)


@dataclass(frozen=True, slots=True)
class CurveCounts:
    """Counts above each cut; weights may make them fractional."""

    right: Floats
    """(…, G) correct detections."""
    found: Floats
    """(…, G) all detections, right or wrong."""
    objects: Floats
    """(…, 1) objects."""
    evidence: Floats
    """(…, G) number of equally weighted detections with as much information as `found` (Kish's effective size)."""
    object_evidence: Floats
    """(…, 1) the same for `objects`."""

    @staticmethod
    def plain(right: Floats, found: Floats, objects: Floats) -> "CurveCounts":
        """Counts in which everything has the weight 1."""
        return CurveCounts(right, found, objects, found, objects)

    def at(self, cut: int) -> "CurveCounts":
        """Counts above one cut."""
        return CurveCounts(self.right[..., cut, None], self.found[..., cut, None], self.objects,
                      self.evidence[..., cut, None], self.object_evidence)  # fmt: skip

    @property
    def precision(self) -> Floats:
        """(…, G); 0 where nothing was found."""
        return _ratio(self.right, self.found)

    @property
    def recall(self) -> Floats:
        """(…, G); 0 where there is no object."""
        return _ratio(self.right, self.objects)

    @property
    def f1(self) -> Floats:
        """(…, G) harmonic mean of precision and recall."""
        return _ratio(2 * self.right, self.found + self.objects)


def counts_of(sample: Sample, cuts: Cuts) -> CurveCounts:
    """Count a sample above each cut."""
    kept = np.searchsorted(-sample.score.astype(np.float64), -cuts.lowest, side="right")
    right = np.append(0, np.cumsum(sample.right))[kept]
    return CurveCounts.plain(
        right.astype(np.float64), kept.astype(np.float64), np.array([float(len(sample.object_image))])
    )


def blended(own: CurveCounts, pool: CurveCounts, weight: float) -> CurveCounts:
    """Add to the counts of a category, with a weight, those of the other categories of its pool.

    Args:
        own: counts of the category, at the cuts of the pool.
        pool: counts of all categories of the pool, including this one.
        weight: weight of the others' detections and objects.
    """
    others = [getattr(pool, name) - getattr(own, name) for name in ("right", "found", "objects")]
    right, found, objects = (
        getattr(own, name) + weight * other for name, other in zip(("right", "found", "objects"), others, strict=True)
    )
    return CurveCounts(
        right, found, objects,
        evidence=_ratio(found**2, own.found + weight**2 * others[1]),
        object_evidence=_ratio(objects**2, own.objects + weight**2 * others[2]),
    )  # fmt: skip


def choose(counts: CurveCounts, target: Target) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Choose the cut for a target.

    Args:
        counts: counts above at least one cut.
        target: what the cut is chosen for.

    Returns:
        (…) index of the cut, or `NOTHING`; and (…) whether the target is reached. If it is not: for precision, among
        the cuts whose interval contains the target, the one with the highest lower end, or `NOTHING` if there is none;
        for recall, the lowest cut; for F1, which is 0 then, `NOTHING`.
    """
    if target.value is None:
        chosen = counts.f1.argmax(-1)
        reached = np.ones(chosen.shape, np.bool_)
    elif target.name == "precision":
        low, high = wilson(counts.precision, counts.evidence, SAFE_Z)
        fits = low >= target.value
        reached = np.asarray(fits.any(-1))
        maybe = np.where((high >= target.value) & (counts.right > 0), low, -1.0)
        nearest = np.where(maybe.max(-1) >= 0, maybe.argmax(-1), NOTHING)
        chosen = np.where(reached, fits.shape[-1] - 1 - fits[..., ::-1].argmax(-1), nearest)
    else:
        low, _ = wilson(counts.recall, np.broadcast_to(counts.object_evidence, counts.right.shape), SAFE_Z)
        fits = low >= target.value
        reached = np.asarray(fits.any(-1))
        chosen = np.where(reached, fits.argmax(-1), fits.shape[-1] - 1)
    hopeless = counts.right[..., -1] <= 0
    if target.value is None:
        chosen = np.where(hopeless, NOTHING, chosen)
    return chosen, reached & ~hopeless


def agrees(own: CurveCounts, target: Target) -> bool:
    """Whether a category's own counts above one cut allow the target: their interval does not end below it.

    The interval is that of `CONFIDENCE`. Always True for F1, and for a ratio without any examples.
    """
    if target.value is None:
        return True
    share, number = (own.precision, own.found) if target.name == "precision" else (own.recall, own.objects)
    return float(wilson(share, number)[1][0]) >= target.value


def wilson(share: Floats, number: Floats, z: float = Z) -> tuple[Floats, Floats]:
    """Return both ends of Wilson's score interval of a proportion.

    Args:
        share: fraction of successes.
        number: number of trials, may be fractional; 0 gives the interval from 0 to 1.
        z: standard deviations; default: those of `CONFIDENCE`.

    Source: Wilson, 1927.
    """
    spread = z * np.sqrt(np.maximum(share * (1 - share), 0.0) * number + z * z / 4)
    centre, whole = share * number + z * z / 2, number + z * z
    return np.clip((centre - spread) / whole, 0.0, 1.0), np.clip((centre + spread) / whole, 0.0, 1.0)


def _ratio(part: Floats, whole: Floats) -> Floats:
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)
