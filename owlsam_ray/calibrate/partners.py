"""Which images and categories of a run a ground truth speaks of."""

import logging
from collections import defaultdict
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from owlsam_ray.errors import InputError
from owlsam_ray.evaluate.ground_truth import GroundTruth
from owlsam_ray.manifest import Manifest
from owlsam_ray.settings import Category
from owlsam_ray.vocabulary.names import fold_category, same_things

_log = logging.getLogger(__name__)


def listed_images(manifest: Manifest, truth: GroundTruth) -> dict[int, dict[int, int]]:
    """Shard → the manifest's image id → the ground truth's, by name, and where names tell nothing, by id.

    Of two images with one name the first counts. Only rows that may be meant become Python objects.

    Raises:
        InputError: there is none.
    """
    ids = pa.array(list(truth.images), pa.int64())
    names = {each: image.file_name or "" for each, image in truth.images.items()}
    spellings = pa.array([name for name in set(names.values()) if name], pa.string())
    theirs: dict[int, str] = {}
    shards: dict[int, int] = {}
    for table in manifest.iter_images():
        may_be = pc.or_(pc.is_in(table["image_id"], value_set=ids), pc.is_in(table["file_name"], value_set=spellings))
        rows = table.select(["image_id", "file_name", "shard"]).filter(may_be)
        theirs |= dict(zip(rows["image_id"].to_pylist(), rows["file_name"].to_pylist(), strict=True))
        shards |= dict(zip(rows["image_id"].to_pylist(), rows["shard"].to_pylist(), strict=True))
    partners = same_things(theirs, names, fold=str, what=f"images of {manifest.run_url}")
    by_shard: dict[int, dict[int, int]] = defaultdict(dict)
    taken: set[int] = set()
    for each, partner in partners.items():
        if partner not in taken:
            by_shard[shards[each]][each] = partner
            taken.add(partner)
    if len(taken) < len(partners):
        _log.warning("%d images of the run are there twice by name: the first counts", len(partners) - len(taken))
    if not taken:
        first = next(iter(names.items()), None)
        raise InputError(
            f"none of the {len(names)} images of {truth.url} is an image of {manifest.run_url} (the ground truth's "
            f"first: id, file_name = {first}): name the ground truth of images that the run labelled, with the "
            "file names or the ids of its manifest"
        )
    return by_shard


def listed_categories(categories: Sequence[Category], truth: GroundTruth) -> list[int | None]:
    """The ground truth's id of each category, by name, and where names tell nothing, by id; None where it has none.

    Raises:
        InputError: not one has any.
    """
    partners = same_things(
        {each.id: each.name for each in categories},
        {each: category.name for each, category in truth.categories.items()},
        fold=fold_category,
        what="categories of the run",
    )
    found: list[int | None] = []
    for each in categories:
        partner = partners.get(each.id)
        found.append(None if partner in found else partner)
    if not partners:
        raise InputError(
            f"{truth.url} lists none of the run's {len(categories)} categories (its first: "
            f"{next(iter(truth.categories.values())).name!r}): name a ground truth with the run's category names"
        )
    without = found.count(None)
    if without:
        _log.warning(
            "%d of %d categories are not in %s: they get the threshold of a pool", without, len(found), truth.url
        )
    return found
