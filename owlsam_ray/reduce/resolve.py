"""Resolve the settings of `reduce` for the categories of a run."""

import difflib
import logging
from collections.abc import Mapping, Sequence

import numpy as np

from owlsam_ray.config.reduce import ReduceConfig
from owlsam_ray.config.vocabulary import Category, MappingName
from owlsam_ray.errors import ConfigError, InputError, shown
from owlsam_ray.inference.suppress import label_thresholds
from owlsam_ray.reduce.decisions import Decisions
from owlsam_ray.reduce.operating_points import OperatingPoints
from owlsam_ray.run.record import RunRecord
from owlsam_ray.vocabulary.mapping import category_mapping
from owlsam_ray.vocabulary.names import by_name, fold_category

_log = logging.getLogger(__name__)
_SHOWN_BY = ("min_mask_area", "min_predicted_iou", "min_stability", "suppress", "max_per_image")
"""Settings other than score thresholds that decide which detections are shown."""
_NAMED = 5
"""Most names in a log line."""


def resolve_decisions(
    settings: ReduceConfig, record: RunRecord, score_floor: float, points: OperatingPoints | None
) -> Decisions:
    """Resolve decisions for each label of the run and each category of the output.

    Args:
        settings: the section `reduce`.
        record: record of the run.
        score_floor: score floor of the run's inference.
        points: contents of `settings.operating_points`.

    Raises:
        ConfigError: a name is not a category.
        InputError: the mapping does not start from the run's categories; or an operating point is below the score
            floor, is not of a category of the run (by id and name), or is the second one of its category.

    Categories without an operating point, and points fitted under other settings, are logged.
    """
    kept = _subset(settings.only, record.categories)
    categories, target = _targets(settings.mapping, record.categories, kept)
    if points is not None:
        shown = [category for category, place in zip(record.categories, target, strict=True) if place >= 0]
        _warn_of_points(settings, shown, points)
    if not (target >= 0).any():
        raise ConfigError("reduce.only and reduce.mapping together keep no category of the run: nothing would be left")
    late = settings.suppress
    return Decisions(
        categories=categories,
        target=target,
        thresholds=_thresholds(settings, record.categories, score_floor, points),
        min_mask_area=settings.min_mask_area,
        min_predicted_iou=-np.inf if settings.min_predicted_iou is None else settings.min_predicted_iou,
        min_stability=-np.inf if settings.min_stability is None else settings.min_stability,
        suppress=late,
        suppress_thresholds=None
        if late is None or not late.thresholds
        else label_thresholds(late, [category.name for category in categories]),
        max_per_image=settings.max_per_image,
    )


def _subset(only: Sequence[int | str] | None, categories: Sequence[Category]) -> set[int]:
    """Labels that `reduce.only` keeps."""
    if only is None:
        return set(range(len(categories)))
    places: dict[int | str, int] = {}
    for label, category in enumerate(categories):
        places |= {category.id: label, category.name: label}
    return {places[_known(each, places, "reduce.only")] for each in only}


def _known(name: int | str, known: Mapping[int | str, int], setting: str) -> int | str:
    """Return a name or id, if it is that of a category.

    Raises:
        ConfigError: it is not.
    """
    if name in known:
        return name
    near = difflib.get_close_matches(str(name), [str(each) for each in known])
    hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    raise ConfigError(f"{setting} names {shown(name)}, which is not a category of the run{hint}")


def _targets(
    mapping: MappingName | dict[str, str] | None, categories: tuple[Category, ...], kept: set[int]
) -> tuple[tuple[Category, ...], np.ndarray[tuple[int], np.dtype[np.int32]]]:
    """Categories of the output, and the index of each label among them, or -1."""
    target = np.full(len(categories), -1, np.int32)
    if mapping is None:
        chosen = [label for label in range(len(categories)) if label in kept]
        target[chosen] = np.arange(len(chosen))
        return tuple(categories[label] for label in chosen), target
    if isinstance(mapping, str):
        of_label, out = _builtin_targets(mapping, categories)
    else:
        of_label, out = _named_targets(mapping, categories)
    places = {category.id: place for place, category in enumerate(out)}
    for label, category_id in of_label.items():
        if label in kept:
            target[label] = places[category_id]
    lost = [category.name for label, category in enumerate(categories) if label in kept and label not in of_label]
    if lost:
        _log.info(
            "reduce.mapping: %d of %d categories have no counterpart and are left out: %s",
            len(lost), len(kept), _some(lost),
        )  # fmt: skip
    return out, target


def _builtin_targets(
    name: MappingName, categories: tuple[Category, ...]
) -> tuple[dict[int, int], tuple[Category, ...]]:
    mapping = category_mapping(name)
    ours = {label: category.name for label, category in enumerate(categories)}
    places = {place: each.spellings for place, each in enumerate(mapping.source)}
    partners = by_name(ours, places, fold=fold_category)
    if 2 * len(partners) < len(categories):
        raise InputError(
            f"reduce.mapping {name} maps the categories of {name.split('_')[0]}, but "
            f"{len(categories) - len(partners)} of {len(categories)} categories of the run are not in that list"
        )
    ids = {label: mapping.ids[mapping.source[place].id] for label, place in partners.items()
           if mapping.source[place].id in mapping.ids}  # fmt: skip
    return ids, tuple(each.category(with_synonyms=True) for each in mapping.target)


def _named_targets(
    mapping: dict[str, str], categories: tuple[Category, ...]
) -> tuple[dict[int, int], tuple[Category, ...]]:
    """Make categories with new names, numbered from 1 in the order of the run's categories."""
    labels: dict[int | str, int] = {category.name: label for label, category in enumerate(categories)}
    for name in mapping:
        _known(name, labels, "reduce.mapping")
    ids: dict[str, int] = {}
    of_label = {}
    for label, category in enumerate(categories):
        if category.name in mapping:
            of_label[label] = ids.setdefault(mapping[category.name], len(ids) + 1)
    return of_label, tuple(Category(id=number, name=name) for name, number in ids.items())


def _thresholds(
    settings: ReduceConfig, categories: tuple[Category, ...], score_floor: float, points: OperatingPoints | None
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(L,) threshold of each label: the category's own setting, else its operating point, else the common threshold."""
    start = -np.inf if settings.score_threshold is None else settings.score_threshold
    thresholds = np.full(len(categories), start, np.float64)
    by_id = {category.id: label for label, category in enumerate(categories)}
    seen: set[int] = set()
    for point in points.categories if points is not None else ():
        if point.category_id not in by_id:
            raise InputError(
                f"reduce.operating_points has a threshold for {shown(point.name)} (id {point.category_id}), which is "
                "not a category of the run"
            )
        name = categories[by_id[point.category_id]].name
        if point.name != name:
            raise InputError(
                f"reduce.operating_points has a threshold for {shown(point.name)} with the id {point.category_id}, "
                f"which belongs to {shown(name)} in the run: calibrate again, or correct {settings.operating_points}"
            )
        if point.category_id in seen:
            raise InputError(
                f"reduce.operating_points has two thresholds for {shown(name)}: keep only one of them in "
                f"{settings.operating_points}"
            )
        seen.add(point.category_id)
        if point.threshold < score_floor:
            raise InputError(
                f"the operating point of {shown(point.name)}, {point.threshold:g}, is below detector.score_floor "
                f"{score_floor:g}: inference did not keep those boxes"
            )
        thresholds[by_id[point.category_id]] = point.threshold
    labels: dict[int | str, int] = {category.name: label for label, category in enumerate(categories)}
    for name, threshold in settings.score_thresholds.items():
        thresholds[labels[_known(name, labels, "reduce.score_thresholds")]] = threshold
    return thresholds


def _warn_of_points(settings: ReduceConfig, shown: Sequence[Category], points: OperatingPoints) -> None:
    """Log which categories of the output lack an operating point, and which settings differ from those of the fit."""
    own = {point.category_id for point in points.categories}
    bare = [each.name for each in shown if each.id not in own and each.name not in settings.score_thresholds]
    if bare:
        common = settings.score_threshold
        limit = "the score floor" if common is None else f"score_threshold {common:g}"
        _log.warning(
            "reduce.operating_points has no threshold for %d of %d categories, which keep all scores above %s: %s",
            len(bare), len(shown), limit, _some(bare),
        )  # fmt: skip
    if points.settings is None:
        return
    now, then = settings_in_use(settings, None), points.settings
    changed = [f"{name} ({then.get(name)} there, {now.get(name)} here)"
               for name in _SHOWN_BY if now.get(name) != then.get(name)]  # fmt: skip
    if changed:
        _log.warning(
            "reduce.operating_points were fitted under other settings, so their targets may be missed: %s",
            ", ".join(changed),
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def settings_in_use(settings: ReduceConfig, points: OperatingPoints | None) -> dict[str, object]:
    """Return settings for `info`: all that affect labels and are not at their defaults, as plain JSON values."""
    apart = {"out", "formats", "max_failed", "executor", "workers", "scratch", "images_per_file", "operating_points",
             "corrections", "corrections_scope", "corrections_base", "label_studio_url", "yolo_val"}  # fmt: skip
    decided = settings.model_dump(mode="json", exclude=apart, exclude_defaults=True)
    decided |= {"score_threshold": settings.score_threshold, "min_mask_area": settings.min_mask_area}
    if points is not None:
        decided["operating_points"] = {
            "target": points.target,
            "thresholds": {point.name: point.threshold for point in points.categories},
        }
    return decided
