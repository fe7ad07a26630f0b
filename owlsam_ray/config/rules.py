"""The cross-field rules of the run file: every combination of settings that is refused, and its message.

A rule concerns several fields; what a single field accepts is declared at the field. Settings that contradict each
other, or have no effect, are refused and never resolved silently. The first broken rule of a section is reported.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

_LISTS = ("coco", "lvis", "objects365")
_FILES = ("table", "webdataset")


class Rule(NamedTuple):
    """A combination of settings that is refused."""

    is_broken: Callable[[Any], bool]
    """Called with the validated section."""
    message: str | Callable[[Any], str]
    """What is wrong, and the way out: a format string in which `s` is the section, or a function of the section."""

    def problem_of(self, section: Any) -> str | None:
        """The message, if the section breaks the rule; None otherwise."""
        if not self.is_broken(section):
            return None
        return self.message.format(s=section) if isinstance(self.message, str) else self.message(section)


def _differs(section: Any, name: str) -> bool:
    """Whether a field has another value than its default."""
    return bool(getattr(section, name) != type(section).model_fields[name].default)


COLUMNS = (
    Rule(
        lambda s: (s.height is None) != (s.width is None),
        "columns.height and columns.width go together: give both, or neither",
    ),
    Rule(
        lambda s: s.uri is not None and s.bytes is not None,
        "columns.uri and columns.bytes both say where the image is: give one of them",
    ),
)

DATA = (
    Rule(
        lambda s: s.source in _LISTS and s.annotations is None,
        "source: {s.source} needs data.annotations, the JSON file",
    ),
    Rule(
        lambda s: s.source not in _LISTS and s.annotations is not None,
        "source: {s.source} takes no data.annotations; did you mean source: coco?",
    ),
    Rule(lambda s: s.source == "table" and not s.files, "source: table needs data.files, the tables"),
    Rule(lambda s: s.source == "webdataset" and not s.files, "source: webdataset needs data.files, the tar files"),
    Rule(
        lambda s: s.source not in _FILES and s.files,
        "source: {s.source} takes no data.files; did you mean source: table or webdataset?",
    ),
    Rule(
        lambda s: s.source not in _FILES and s.images is None,
        "source: {s.source} needs data.images, the root of the image files",
    ),
    Rule(
        lambda s: s.source == "webdataset" and s.images is not None,
        "source: webdataset takes no data.images: the images are members of data.files",
    ),
    Rule(
        lambda s: s.source != "table" and _differs(s, "columns"),
        "data.columns is for source: table, not for {s.source}",
    ),
)

PLAN = (
    Rule(
        lambda s: s.limit is not None and s.sample is not None,
        "plan.limit and plan.sample both choose among the images: give one, and unset the other with null",
    ),
)

CATEGORY = (
    Rule(
        lambda s: s.prompts and s.synonyms,
        "category {s.name!r:.120} has prompts and synonyms: prompts replace name and synonyms, so add the synonyms to "
        "the prompts, or leave the prompts out",
    ),
)

VOCABULARY = (
    Rule(
        lambda s: s.synonyms and s.categories not in ("lvis", "dataset"),
        "synonyms: true uses the synonyms of `lvis` or of the dataset's own categories, and categories is neither "
        "`lvis` nor `dataset`: give synonyms in a list of categories or a text file, which are always queried",
    ),
    Rule(
        lambda s: s.frequency is not None and isinstance(s.categories, str) and s.categories not in ("lvis", "dataset"),
        lambda s: (
            f"frequency: {list(s.frequency)} needs categories with frequency groups, and {s.categories} has none: set "
            "categories to `lvis`, or to `dataset` if its categories have a `frequency`"
        ),
    ),
    Rule(
        lambda s: s.exemplars_replace_text and not s.exemplars,
        "exemplars_replace_text without exemplars would have no effect: give exemplars, or leave it out",
    ),
)

DETECTOR = (
    Rule(
        lambda s: s.pad_value is not None and s.preprocess != "scenic",
        "pad_value {s.pad_value} belongs to preprocess: scenic; hf pads as transformers does. Set preprocess: scenic, "
        "or leave pad_value out",
    ),
    Rule(
        lambda s: s.objectness == "multiply" and s.model != "owlv2",
        "objectness: multiply needs model: owlv2; {s.model} does not estimate objectness",
    ),
)

TILING = (
    Rule(
        lambda s: s.size is None and _differs(s, "overlap"),
        "overlap: {s.overlap} without size would have no effect: set tiling.size",
    ),
    Rule(
        lambda s: s.size is None and _differs(s, "full_image"),
        "full_image: {s.full_image} without size would have no effect: set tiling.size",
    ),
)


def _given_thresholds(s: Any) -> str | None:
    """The setting that gives a threshold, for a message; None when none does."""
    return "thresholds" if s.thresholds else None if s.threshold is None else f"threshold {s.threshold}"


SUPPRESS = (
    Rule(
        lambda s: s.decay is not None and s.strategy != "soft_nms",
        "decay: {s.decay} belongs to strategy: soft_nms, not to {s.strategy}",
    ),
    Rule(
        lambda s: s.sigma is not None and (s.strategy != "soft_nms" or s.decay == "linear"),
        "sigma {s.sigma} belongs to strategy: soft_nms with decay: exponential",
    ),
    Rule(
        lambda s: s.strategy == "none" and _given_thresholds(s) is not None,
        lambda s: (
            f"strategy: none suppresses nothing, so {_given_thresholds(s)} would have no effect: leave it out (null)"
        ),
    ),
    Rule(
        lambda s: s.strategy == "soft_nms" and s.decay != "linear" and _given_thresholds(s) is not None,
        lambda s: (
            f"exponential decay has no threshold, so {_given_thresholds(s)} would have no effect: leave it out (null), "
            "or set decay: linear"
        ),
    ),
    Rule(
        lambda s: s.thresholds and s.across_labels,
        "thresholds are per category, and across_labels compares boxes of different categories: set one threshold, or "
        "across_labels: false",
    ),
    Rule(
        lambda s: s.strategy == "merge" and s.overlap == "ios",
        "strategy: merge averages boxes, and overlap: ios groups parts with wholes, so the mean box would fit neither: "
        "set overlap: iou, or strategy: nms",
    ),
    Rule(
        lambda s: s.strategy == "none" and s.across_labels,
        "strategy: none suppresses nothing, so across_labels would have no effect",
    ),
    Rule(
        lambda s: s.strategy == "none" and s.overlap != "iou",
        "strategy: none suppresses nothing, so overlap: {s.overlap} would have no effect",
    ),
)

RESOURCES = (
    Rule(
        lambda s: s.takeover_s < 2 * s.heartbeat_s,
        "takeover_s {s.takeover_s:g} is less than twice heartbeat_s {s.heartbeat_s:g}: a live attempt would be taken "
        "over",
    ),
)


def _below_the_floor(run: Any) -> Iterator[tuple[str, float]]:
    """Thresholds of `reduce` that are below the floor of inference, by setting."""
    asked: Mapping[str, float | None] = {"score_threshold": run.reduce.score_threshold} | {
        f"score_thresholds.{name}": value for name, value in run.reduce.score_thresholds.items()
    }
    for name, value in asked.items():
        if value is not None and value < run.detector.score_floor:
            yield name, value


def _looser_than_inference(run: Any) -> Iterator[tuple[str, float, float]]:
    """Thresholds of `reduce.suppress` above those with which inference has removed boxes: name, value, inference's."""
    early, late = run.suppress, run.reduce.suppress
    if late is None or run.reduce.mapping is not None:  # a mapping may join categories that inference kept separate
        return
    if late.strategy in ("none", "soft_nms") or early.strategy not in ("nms", "merge"):
        return
    if (late.overlap, late.across_labels) != (early.overlap, early.across_labels):
        return
    if late.common_threshold > early.common_threshold and set(early.thresholds) == set(late.thresholds):
        yield "threshold", late.common_threshold, early.common_threshold
    for name, value in late.thresholds.items():
        before = early.thresholds.get(name, early.common_threshold)
        if value > before:
            yield f"thresholds.{name}", value, before


def _floor_message(run: Any) -> str:
    name, value = next(_below_the_floor(run))
    return (
        f"reduce.{name} {value} is below detector.score_floor {run.detector.score_floor}: inference did not keep those "
        "boxes"
    )


def _looser_message(run: Any) -> str:
    name, value, before = next(_looser_than_inference(run))
    return (
        f"reduce.suppress.{name} {value:g} is looser than suppress.threshold {before:g}, with which inference has "
        "already removed boxes that cannot be restored: set a smaller one, or leave reduce.suppress out"
    )


RUN = (
    Rule(lambda s: any(_below_the_floor(s)), _floor_message),
    Rule(lambda s: any(_looser_than_inference(s)), _looser_message),
    Rule(
        lambda s: s.tiling.size is not None and s.suppress.strategy == "none",
        "tiling.size with suppress.strategy: none would keep an object once for every tile that contains it: set "
        "suppress.strategy to nms, soft_nms or merge",
    ),
)
