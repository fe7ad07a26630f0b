"""Find the images and categories of a run that a ground truth lists."""

import logging
from collections import defaultdict
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from owlsam_ray.config.vocabulary import Category
from owlsam_ray.errors import InputError, shown
from owlsam_ray.evaluate.ground_truth import GroundTruth
from owlsam_ray.evaluate.pairing import contradiction, pair_categories, pair_images, path_parts
from owlsam_ray.run.manifest import Manifest

_log = logging.getLogger(__name__)


def listed_images(manifest: Manifest, truth: GroundTruth) -> dict[int, dict[int, int]]:
    """Map shard → the manifest's image id → the ground truth's, by the rules of `evaluate.pairing`.

    Only rows that may match become Python objects.

    Raises:
        InputError: no image matches, or names and ids contradict each other.
    """
    ids = pa.array([each for each in truth.images if abs(each) < 2**63], pa.int64())
    names = {each: image.names for each, image in truth.images.items()}
    parts = {path_parts(name)[-1:] for spellings in names.values() for name in spellings}
    lasts = pa.array(sorted(last for (last,) in parts - {()}), pa.string())
    theirs: dict[int, str] = {}
    shards: dict[int, int] = {}
    for table in manifest.iter_images():
        last = pc.replace_substring_regex(table["file_name"], r"(?s)^.*[/\\]", "")
        may_be = pc.or_(pc.is_in(table["image_id"], value_set=ids), pc.is_in(last, value_set=lasts))
        rows = table.select(["image_id", "file_name", "shard"]).filter(may_be)
        theirs |= dict(zip(rows["image_id"].to_pylist(), rows["file_name"].to_pylist(), strict=True))
        shards |= dict(zip(rows["image_id"].to_pylist(), rows["shard"].to_pylist(), strict=True))
    pairs = pair_images(
        {each: (name,) for each, name in theirs.items()}, names,
        what=f"images of {manifest.run_url}", lister=truth.url,
    )  # fmt: skip
    by_shard: dict[int, dict[int, int]] = defaultdict(dict)
    for each, partner in pairs.ids.items():
        by_shard[shards[each]][each] = partner
    if pairs.num_repeated:
        _log.warning("%d images of the run have the name of an earlier one: only the first counts", pairs.num_repeated)
    if not pairs.ids:
        first = next(((each, *spellings[:1]) for each, spellings in names.items()), None)
        raise InputError(
            f"none of the {len(names)} images of {truth.url} is an image of {manifest.run_url} (the ground truth's "
            f"first: id, file_name = {first}): give a ground truth of images that the run labelled, with the "
            "file names or the ids of its manifest"
        )
    return by_shard


def listed_categories(categories: Sequence[Category], truth: GroundTruth) -> list[int | None]:
    """Return the ground truth's id of each category, by the rules of `evaluate.pairing`; None where it has none.

    Raises:
        InputError: no category has one, or names and ids contradict each other.
    """
    pairs = pair_categories(
        {each.id: each.name for each in categories},
        {each: category.name for each, category in truth.categories.items()},
        what="categories of the run",
    )
    partners = pairs.ids
    if pairs.contradictions:
        way_out = "give both the same names, or give other ids to categories that are not the run's"
        raise InputError(
            contradiction(list(pairs.contradictions.values()), what="categories of the run", lister=truth.url,
                          way_out=way_out)
        )  # fmt: skip
    found: list[int | None] = []
    for each in categories:
        partner = partners.get(each.id)
        found.append(None if partner in found else partner)
    if not partners:
        raise InputError(
            f"{truth.url} lists none of the run's {len(categories)} categories (its first: "
            f"{shown(next(iter(truth.categories.values())).name)}): name a ground truth with the run's category names"
        )
    without = found.count(None)
    if without:
        _log.warning(
            "%d of %d categories are not in %s: they get the threshold of their pool", without, len(found), truth.url
        )
    return found
