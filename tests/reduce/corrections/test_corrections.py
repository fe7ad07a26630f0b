"""People's corrections replayed over a run: what they say holds under any settings, and nothing is lost silently."""

import copy
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pycocotools import mask as coco_mask

from owlsam_ray.config.inference import SuppressConfig
from owlsam_ray.config.reduce import ReduceConfig
from owlsam_ray.errors import GuardError, InputError
from owlsam_ray.reduce.decisions import Decisions
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.shards import load_shard, write_shard
from owlsam_ray.schema import PREDICTION_SCHEMA
from tests.reduce.everything import keep_everything
from tests.reduce.made_runs import CATEGORIES, FINGERPRINT, K, random_run, reduce_shards

Tree = dict[str, Any]
SEEDS = range(4)


def reduced(
    root: Path,
    manifest: Manifest,
    decisions: Decisions,
    fixed: Tree | None = None,
    *,
    workers: int = 1,
    **settings: Any,
) -> tuple[Tree, dict[str, Any], Tree]:
    """The tree of `annotations.json`, the counts, and the tree of `corrections_report.json`."""
    out = root / f"out-{len(list(root.iterdir()))}"
    if fixed is not None:
        path = root / f"fixed-{len(list(root.iterdir()))}.json"
        path.write_text(json.dumps(fixed))
        settings["corrections"] = str(path)
    counts = reduce_shards(
        str(root), manifest, ReduceConfig(out=str(out), workers=workers, **settings), decisions=decisions
    )
    report = json.loads((out / "corrections_report.json").read_text()) if fixed is not None else {}
    return json.loads((out / "annotations.json").read_text()), counts, report


def everything() -> Decisions:
    return keep_everything(CATEGORIES)


def stricter(choose: random.Random) -> Decisions:
    """Decisions about each annotation by itself, so that a twin can tell what becomes of it."""
    return Decisions(
        CATEGORIES,
        np.arange(len(CATEGORIES), dtype=np.int32),
        np.array([choose.choice([0.3, 0.7, 0.95]) for _ in CATEGORIES]),
        min_mask_area=choose.choice([0, 300]),
        min_stability=choose.choice([-np.inf, 0.5]),
    )


def draw(choose: random.Random, height: int, width: int) -> Tree:
    """Fields of an annotation that somebody draws."""
    x, y = choose.randrange(width), choose.randrange(height)
    w, h = choose.randrange(1, width - x + 1), choose.randrange(1, height - y + 1)
    entry: Tree = {"bbox": [x, y, w, h], "category_id": choose.choice(CATEGORIES).id}
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    rle = coco_mask.encode(mask)
    runs = [int(value) for value in np.diff(np.flatnonzero(np.diff(mask.ravel("F"), prepend=2, append=2)))]
    kind = choose.choice(["none", "rle", "runs", "polygon"])
    if kind == "rle":
        entry["segmentation"] = {"size": [height, width], "counts": rle["counts"].decode()}
    elif kind == "runs":
        entry["segmentation"] = {"size": [height, width], "counts": ([0] if mask[0, 0] else []) + runs}
    elif kind == "polygon":
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if kind != "none":
        entry |= {"area": w * h, "mask_bbox": [x, y, w, h], "counts": rle["counts"].decode()}
    else:
        entry["area"] = w * h
    return entry


def facts(entry: Tree) -> Tree:
    """What an annotation says, with masks as compressed RLE."""
    told = {key: entry.get(key) for key in ("image_id", "category_id", "area", "mask_bbox")}
    told["bbox"] = [round(float(value), 3) for value in entry["bbox"]]
    told["counts"] = entry["counts"] if "counts" in entry else (entry.get("segmentation") or {}).get("counts")
    return told


def edit(choose: random.Random, tree: Tree, *, deletes: bool = True) -> tuple[Tree, list[Tree], Counter[str]]:
    """A reviewer at work.

    Returns:
        The file, its annotations as they must come out (those without an id are new), and what was done.
    """
    fixed = copy.deepcopy(tree)
    sizes = {image["id"]: (image["height"], image["width"]) for image in tree["images"]}
    entries, expected, done = [], [], Counter[str]()
    for entry in fixed["annotations"]:
        what = choose.choice(["confirmed", "edited", "edited", "rejected", "added", *(["deleted"] if deletes else [])])
        done[what] += 1
        if what == "edited":
            drawn = draw(choose, *sizes[entry["image_id"]])
            entry = {key: entry[key] for key in ("id", "image_id")} | drawn
            expected.append(entry)
        elif what == "rejected":
            entry["owlsam_rejected"] = True
        elif what == "deleted":
            continue
        else:
            expected.append(entry)
        entries.append(entry)
        if what == "added":
            done["confirmed"] += 1
            drawn = draw(choose, *sizes[entry["image_id"]]) | {"image_id": entry["image_id"]}
            expected.append(drawn)
            entries.append(drawn | choose.choice([{}, {"id": 0}, {"id": 10**9}]))
    choose.shuffle(entries)
    fixed["annotations"] = [{k: v for k, v in e.items() if k not in ("counts", "mask_bbox")} for e in entries]
    return fixed, expected, done


def check_ids(tree: Tree, manifest: Manifest) -> None:
    ids = [each["id"] for each in tree["annotations"]]
    assert len(ids) == len(set(ids))
    assert ids == sorted(ids, key=lambda each: (each % 2**52 // K, each))
    assert max(ids, default=0) < 2**53
    ordinals: dict[int, int] = {}
    for shard in manifest.iter_shards():
        first, _ = manifest.shard_span(shard)
        ordinals |= {image: first + row for row, image in enumerate(manifest.read_shard(shard)["image_id"].to_pylist())}
    assert all(each["id"] % 2**52 // K == ordinals[each["image_id"]] for each in tree["annotations"])


def by_facts(entries: list[Tree]) -> list[str]:
    return sorted(json.dumps(facts(each), sort_keys=True) for each in entries)


def made(root: Path, seed: int) -> tuple[Manifest, random.Random]:
    print(f"seed {seed}")
    choose = random.Random(seed)
    return random_run(root, seed, num_images=24, shard_size=choose.randrange(3, 12)), choose


@pytest.mark.parametrize("seed", SEEDS)
def test_a_file_without_changes_changes_nothing(tmp_path: Path, seed: int) -> None:
    manifest, choose = made(tmp_path, seed)
    decisions = stricter(choose)
    tree, counts, _ = reduced(tmp_path, manifest, decisions)
    again, corrected, report = reduced(tmp_path, manifest, decisions, tree)
    assert again["annotations"] == tree["annotations"]
    assert again["images"] == tree["images"]
    assert report["counts"]["confirmed"] == report["counts"]["entries"] == counts["num_annotations"]
    assert report["applied"] == report["conflicts"] == []
    assert corrected["left_out"] == counts["left_out"]
    # Nor do a tool's rounding, and its own numbers.
    rounded = copy.deepcopy(tree)
    numbers = {image["id"]: number for number, image in enumerate(rounded["images"])}
    names = Counter(image["file_name"] for image in rounded["images"])
    assert max(names.values()) == 1
    for image in rounded["images"]:
        image["id"] = numbers[image["id"]]
    for number, entry in enumerate(rounded["annotations"]):
        entry |= {"id": number, "image_id": numbers[entry["image_id"]]}
        entry["bbox"] = [round(value, 2) for value in entry["bbox"]]
        entry.pop("score")
    again, _, report = reduced(tmp_path, manifest, decisions, rounded)
    whole, _, _ = reduced(tmp_path, manifest, everything())
    boxes = Counter((each["image_id"], str(np.round(each["bbox"], 1))) for each in whole["annotations"])
    alike = {image for (image, _), count in boxes.items() if count > 1}  # a box does not tell which one it is
    told = [[each for each in one["annotations"] if each["image_id"] not in alike] for one in (again, tree)]
    assert told[0] == told[1]
    assert report["counts"]["conflicts"] == {}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_reviewed_image_has_what_the_reviewer_saved(tmp_path: Path, seed: int) -> None:
    manifest, choose = made(tmp_path, seed)
    tree, _, _ = reduced(tmp_path, manifest, everything())
    looked_at = set(choose.sample([image["id"] for image in tree["images"]], len(tree["images"]) // 2))
    part = dict(tree)
    for key, name in (("images", "id"), ("annotations", "image_id")):
        part[key] = [each for each in tree[key] if each[name] in looked_at]
    fixed, expected, done = edit(choose, part)
    ids: set[tuple[int, ...]] = set()
    for decisions in (everything(), stricter(choose), stricter(choose)):
        plain, _, _ = reduced(tmp_path, manifest, decisions)
        found, counts, report = reduced(tmp_path, manifest, decisions, fixed)
        check_ids(found, manifest)
        others = [each for each in plain["annotations"] if each["image_id"] not in looked_at]
        assert [each for each in found["annotations"] if each["image_id"] not in looked_at] == others
        own = [each for each in found["annotations"] if each["image_id"] in looked_at]
        assert by_facts(own) == by_facts(expected)
        ids.add(tuple(each["id"] for each in own))
        told = {key: report["counts"][key] for key in ("confirmed", "edited", "added", "rejected")}
        assert told == {key: done[key] for key in told}
        assert report["counts"]["conflicts"] == {}
        shown = {each["id"] for each in plain["annotations"] if each["image_id"] in looked_at}
        said = {each["id"] for each in fixed["annotations"] if "id" in each}
        assert {line["id"] for line in report["applied"] if line["what"] == "deleted"} == shown - said
        assert report["counts"]["deleted"] == len(shown - said)
        assert found["info"]["owlsam_ray"]["proof"]["corrections"] == report["counts"] == counts["corrections"]
        assert sum(bool(each.get("corrected")) for each in own) == done["edited"] + done["added"]
        confirmed = {each["id"]: each for each in tree["annotations"]}
        assert all(each == confirmed[each["id"]] for each in own if "corrected" not in each)
        assert all(each["score"] == 1 and "stability" not in each for each in own if each["id"] not in confirmed)
        listed = [(line["id"], line["what"]) for line in report["applied"]]
        assert Counter(what for _, what in listed)["added"] == done["added"]
        assert {number for number, what in listed if what == "added"} == {each["id"] for each in own} - set(confirmed)
    assert len(ids) == 1  # they do not depend on what is decided
    # Its own output, opened and saved, is the same correction.
    saved = found | {"images": part["images"], "annotations": own}
    again, _, _ = reduced(tmp_path, manifest, stricter(choose), saved, corrections_scope="images")
    assert [each for each in again["annotations"] if each["image_id"] in looked_at] == own


@pytest.mark.parametrize("seed", SEEDS)
def test_of_a_review_list_only_what_it_listed_is_touched(tmp_path: Path, seed: int) -> None:
    manifest, choose = made(tmp_path, seed)
    tree, _, _ = reduced(tmp_path, manifest, everything())
    part = copy.deepcopy(tree)
    part["annotations"] = [each for each in part["annotations"] if choose.random() < 0.5]
    listed = {each["id"] for each in part["annotations"]}
    part["info"]["owlsam_ray"]["review"] = {"scope": "annotations", "listed": sorted(listed)}
    fixed, expected, done = edit(choose, part)
    for decisions in (everything(), stricter(choose)):
        plain, _, _ = reduced(tmp_path, manifest, decisions)
        found, _, report = reduced(tmp_path, manifest, decisions, fixed)
        check_ids(found, manifest)
        others = [each for each in plain["annotations"] if each["id"] not in listed]
        assert by_facts(found["annotations"]) == by_facts(expected + others)
        kept = [each for each in found["annotations"] if each["id"] in {other["id"] for other in others}]
        assert kept == others
        assert report["counts"]["deleted"] == done["deleted"]
    # The same when the tool has dropped `info`, and the list is at hand.
    (tmp_path / "list.json").write_text(json.dumps(part))
    bare = fixed | {"info": {"contributor": "a tool"}}
    again, _, _ = reduced(tmp_path, manifest, decisions, bare, corrections_base=str(tmp_path / "list.json"))
    assert again["annotations"] == found["annotations"]


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_files(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 11, num_images=60, shard_size=4)
    choose = random.Random(11)
    tree, _, _ = reduced(tmp_path, manifest, everything())
    fixed, _, _ = edit(choose, tree)
    fixed["annotations"] += [{"id": 1, "image_id": 10**7, "category_id": 3}, fixed["annotations"][0]]
    path = tmp_path / "fixed.json"
    path.write_text(json.dumps(fixed))

    def files(workers: int) -> dict[str, bytes]:
        out = tmp_path / f"workers-{workers}"
        settings = ReduceConfig(out=str(out), workers=workers, corrections=str(path))
        reduce_shards(str(tmp_path), manifest, settings, decisions=everything())
        return {each.name: each.read_bytes() for each in out.iterdir()}

    assert files(1) == files(2)


def test_confirmed_ones_suppress_others_and_are_not_suppressed(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 12, num_images=20, shard_size=6)
    tree, _, _ = reduced(tmp_path, manifest, everything())
    part = copy.deepcopy(tree)
    worst: dict[int, Tree] = {}
    for each in part["annotations"]:
        if each["image_id"] not in worst or each["score"] < worst[each["image_id"]]["score"]:
            worst[each["image_id"]] = each
    part["annotations"] = list(worst.values())
    part["info"]["owlsam_ray"]["review"] = {"scope": "annotations", "listed": [each["id"] for each in worst.values()]}
    late = Decisions(
        CATEGORIES,
        np.arange(len(CATEGORIES), dtype=np.int32),
        np.full(len(CATEGORIES), 0.5),
        suppress=SuppressConfig(strategy="nms", threshold=0.01, across_labels=True),
        max_per_image=1,
    )
    found, _, report = reduced(tmp_path, manifest, late, part)
    own = {each["id"]: each for each in found["annotations"]}
    assert report["counts"]["confirmed"] == len(worst)
    assert all(own[each["id"]] == each for each in worst.values())
    assert len(own) == len(worst)  # they take the place of the one that each image may have


CONFLICTS: dict[str, Tree] = {
    "category": {"category_id": 99},
    "crowd": {"iscrowd": 1},
    "entry": {"bbox": "wide"},
    "geometry": {"bbox": [0, 0, -3, 2]},
    "geometry ": {"bbox": [0, 0, 0, 2]},
    "geometry  ": {"bbox": [1e6, 0, 4, 4]},
    "geometry   ": {"segmentation": {"size": [3, 100000], "counts": "0"}},
    "geometry    ": {"segmentation": [[1, 2, "x", 3, 4, 5]]},
    "entry ": {"bbox": [0, 0, None, 2]},
    "entry  ": {"image_id": 10**30},
    "entry   ": {"image_id": None},
    "geometry      ": {"bbox": None, "segmentation": None},
}


@pytest.mark.parametrize("reason", CONFLICTS)
def test_what_cannot_be_applied_is_told_and_stays_the_machines(tmp_path: Path, reason: str) -> None:
    manifest = random_run(tmp_path, 13, num_images=12, shard_size=4)
    tree, _, _ = reduced(tmp_path, manifest, everything())
    fixed = copy.deepcopy(tree)
    odd = fixed["annotations"][4]
    odd |= CONFLICTS[reason]
    found, _, report = reduced(tmp_path, manifest, everything(), fixed)
    assert found["annotations"] == tree["annotations"]
    (conflict,) = report["conflicts"]
    assert conflict["annotation"] == 4
    assert (conflict["id"], conflict["image_id"]) == (odd["id"], odd["image_id"])
    assert conflict["reason"].split(":")[0] == reason.strip()
    assert report["counts"]["conflicts"] == {reason.strip(): 1}
    assert report["counts"]["confirmed"] == len(tree["annotations"]) - 1
    # Under settings that leave it out, it is left out.
    none = Decisions(CATEGORIES, np.arange(3, dtype=np.int32), np.full(3, 2.0))
    found, _, _ = reduced(tmp_path, manifest, none, fixed)
    assert found["annotations"] == [each for place, each in enumerate(tree["annotations"]) if place != 4]


def test_conflicts_of_ids_and_images(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 14, num_images=30, shard_size=4)
    tree, _, _ = reduced(tmp_path, manifest, everything())
    fixed = copy.deepcopy(tree)
    entries = fixed["annotations"]
    twice = dict(entries[0]) | {"bbox": [0, 0, 1, 1]}
    failures = next(tmp_path.glob("out-*")) / "failures.jsonl"
    lost = json.loads(failures.read_text().splitlines()[0])
    fixed["images"] += [
        {"id": 10**8, "file_name": "nobody's.jpg"},
        {"id": lost["image_id"], "file_name": lost["file_name"]},
    ]
    entries += [
        twice,
        {"id": 1, "image_id": 10**8, "category_id": 3, "bbox": [0, 0, 1, 1]},
        {"id": 2, "image_id": 10**9, "category_id": 3, "bbox": [0, 0, 1, 1]},
        {"id": 3, "image_id": lost["image_id"], "category_id": 3, "bbox": [0, 0, 1, 1]},
        {"id": 4, "image_id": entries[0]["image_id"], "owlsam_rejected": True},
        7,
    ]
    entries.append(dict(entries[1]))
    found, _, report = reduced(tmp_path, manifest, everything(), fixed)
    new = [each for each in found["annotations"] if each.get("corrected")]
    assert [each["bbox"] for each in new] == [[0, 0, 1, 1]]  # another thing under an id that is taken
    assert [each for each in found["annotations"] if each not in new] == tree["annotations"]
    assert report["counts"]["conflicts"] == {"image": 3, "no_detection": 1, "entry": 1, "repeated": 1}
    count = len(tree["annotations"])
    assert sorted(each["annotation"] for each in report["conflicts"]) == list(range(count + 1, count + 7))


@pytest.mark.parametrize("seed", SEEDS)
def test_ids_of_a_tool_mean_nothing_where_geometry_speaks(tmp_path: Path, seed: int) -> None:
    """Numbered anew, in any order, so that many ids lie in the range of their image by chance."""
    manifest, choose = made(tmp_path, seed)
    tree, _, _ = reduced(tmp_path, manifest, everything())
    fixed = copy.deepcopy(tree)
    rejected = choose.randrange(len(fixed["annotations"]))
    fixed["annotations"][rejected]["owlsam_rejected"] = True
    gone = fixed["annotations"][rejected]["id"]
    by_image: dict[int, list[Tree]] = {}
    for each in fixed["annotations"]:
        by_image.setdefault(each["image_id"], []).append(each)
    for own in by_image.values():
        boxes = {str(np.round(each["bbox"], 1)) for each in own}
        if len(boxes) < len(own):  # a box does not tell which one it is
            continue
        ids = [each["id"] for each in own]
        choose.shuffle(ids)
        for each, number in zip(own, ids, strict=True):
            each["id"] = choose.choice([number, str(number), float(number), ids[0], "x", None, 1.5])
            each["image_id"] = choose.choice([each["image_id"], str(each["image_id"])])
    found, _, report = reduced(tmp_path, manifest, everything(), fixed)
    assert found["annotations"] == [each for each in tree["annotations"] if each["id"] != gone]
    told = {key: report["counts"][key] for key in ("rejected", "deleted", "edited", "added", "conflicts")}
    assert told == {"rejected": 1, "deleted": 0, "edited": 0, "added": 0, "conflicts": {}}


def distinct_images(tree: Tree, *, least: int) -> list[list[Tree]]:
    """The annotations of each image with at least that many, all in different boxes that can be seen."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in tree["images"]}
    by_image: dict[int, list[Tree]] = {}
    for each in tree["annotations"]:
        by_image.setdefault(each["image_id"], []).append(each)

    def is_seen(each: Tree) -> bool:
        (x, y, width, height), size = each["bbox"], sizes[each["image_id"]]
        return bool(x < size[0] and y < size[1] and min(width, height) > 0.1)

    return [
        own
        for own in by_image.values()
        if len({str(np.round(each["bbox"], 1)) for each in own}) == len(own) >= least and all(map(is_seen, own))
    ]


def numbered_anew(tree: Tree, images: list[list[Tree]], *, first: int, masks: bool) -> Tree:
    """An export of a tool that numbers images, categories and annotations, rounds boxes and writes no `info` of ours.

    CVAT's COCO export numbers from 1, Roboflow's from 0, and COCO Annotator's has the ids of its database.
    """
    shown = [own[0]["image_id"] for own in images]
    names = {image["id"]: image["file_name"] for image in tree["images"]}
    categories = {each["id"]: number for number, each in enumerate(tree["categories"], 1)}
    entries = [
        {
            "id": number,
            "image_id": shown.index(each["image_id"]) + 1,
            "category_id": categories[each["category_id"]],
            "segmentation": each.get("segmentation", []) if masks else [],
            "area": each["area"],
            "bbox": [round(side, 2) for side in each["bbox"]],
            "iscrowd": 0,
            "attributes": {"occluded": False},
        }
        for number, each in enumerate((each for own in images for each in own), first)
    ]
    return {
        "info": {"contributor": "", "version": ""},
        "images": [{"id": number, "file_name": names[image]} for number, image in enumerate(shown, 1)],
        "categories": [each | {"id": categories[each["id"]]} for each in tree["categories"]],
        "annotations": entries,
    }


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("first", ["0", "1", "a database's", "its image's own"])
def test_an_export_that_is_numbered_anew_pairs_by_box_and_category(tmp_path: Path, first: str, masks: bool) -> None:
    manifest = random_run(tmp_path, 31, num_images=60, shard_size=20)
    tree, _, _ = reduced(tmp_path, manifest, everything())
    images = distinct_images(tree, least=2)[::-1]  # the tool sorts them differently
    assert len(images) >= 3
    moved, renamed, chance = images[0][0], images[0][1], images[2]
    before = len(images[0]) + len(images[1])
    start = {"0": 0, "1": 1, "a database's": 48211}.get(first, chance[1]["id"] - before)
    export = numbered_anew(tree, images, first=start, masks=masks)
    x, y, width, height = export["annotations"][0]["bbox"]
    export["annotations"][0]["bbox"] = [x, y, width + 1, height]
    export["annotations"][1]["category_id"] = export["annotations"][1]["category_id"] % 3 + 1
    found, _, report = reduced(tmp_path, manifest, everything(), export, corrections_scope="images")
    lost = {moved["id"], renamed["id"]}
    kept = [each for each in found["annotations"] if "corrected" not in each]
    assert kept == [each for each in tree["annotations"] if each["id"] not in lost]
    lines = Counter((line["what"], line.get("annotation")) for line in report["applied"])
    assert lines == {("added", 0): 1, ("added", 1): 1, ("deleted", None): 2}
    assert {line["id"] for line in report["applied"] if line["what"] == "deleted"} == lost
    told = {key: report["counts"][key] for key in ("confirmed", "edited", "added", "deleted", "conflicts")}
    confirmed = sum(len(own) for own in images) - 2
    assert told == {"confirmed": confirmed, "edited": 0, "added": 2, "deleted": 2, "conflicts": {}}


def test_an_id_that_is_kept_keeps_its_annotation(tmp_path: Path) -> None:
    """Moved, renamed, or both; and renamed where the run has another, hidden detection of that name in the same box."""
    manifest = random_run(tmp_path, 31, num_images=60, shard_size=20)
    rows = load_shard(str(tmp_path), 0)[1].to_pylist()
    row = next(row for row in rows if row["status"] == "ok" and len(row["label"]) >= 3)
    row["label"][:3] = [0, 1, 2]
    for axis in ("x0", "y0", "x1", "y1"):
        row[axis][1] = row[axis][0]  # the second is in the box of the first
    table = pa.Table.from_pylist(rows, PREDICTION_SCHEMA)
    write_shard(str(tmp_path), 0, table, fingerprint=FINGERPRINT, numerics="n", stage_s={})
    tree, _, _ = reduced(tmp_path, manifest, everything())
    own = [each for each in tree["annotations"] if each["image_id"] == row["image_id"]]
    hidden = own[1]
    fixed = copy.deepcopy(tree)
    fixed["annotations"] = [each for each in fixed["annotations"] if each["id"] != hidden["id"]]
    entries = {each["id"]: each for each in fixed["annotations"]}
    entries[own[0]["id"]]["category_id"] = hidden["category_id"]
    entries[own[2]["id"]] |= {"category_id": hidden["category_id"], "bbox": [0, 0, 1.5, 1]}
    found, _, report = reduced(tmp_path, manifest, everything(), fixed)
    applied = {line["id"]: (line["what"], line.get("changed")) for line in report["applied"]}
    assert applied.pop(hidden["id"]) == ("deleted", None)
    assert applied.pop(own[0]["id"]) == ("edited", ["category_id"])
    what, changed = applied.pop(own[2]["id"])
    assert (what, changed[:2]) == ("edited", ["bbox", "category_id"])
    assert applied == {}
    assert {each["id"] for each in found["annotations"] if each.get("corrected")} == {own[0]["id"], own[2]["id"]}


def test_equal_ones_are_paired_in_order(tmp_path: Path) -> None:
    """Two detections with one box and one category, and two entries numbered anew; a third one is new."""
    manifest = random_run(tmp_path, 31, num_images=60, shard_size=20)
    rows = load_shard(str(tmp_path), 0)[1].to_pylist()
    row = next(row for row in rows if row["status"] == "ok" and len(row["label"]) >= 3)
    for name in ("label", "x0", "y0", "x1", "y1"):
        row[name][1] = row[name][0]
    table = pa.Table.from_pylist(rows, PREDICTION_SCHEMA)
    write_shard(str(tmp_path), 0, table, fingerprint=FINGERPRINT, numerics="n", stage_s={})
    tree, _, _ = reduced(tmp_path, manifest, everything())
    first, second = [each for each in tree["annotations"] if each["image_id"] == row["image_id"]][:2]
    bare = {"image_id": row["image_id"], "category_id": first["category_id"], "bbox": first["bbox"]}
    image = [each for each in tree["images"] if each["id"] == row["image_id"]]
    for count, ids in ((1, [first["id"]]), (2, [first["id"], second["id"]]), (3, [first["id"], second["id"]])):
        fixed = tree | {"images": image, "annotations": [bare | {"id": number} for number in range(count)]}
        found, _, report = reduced(tmp_path, manifest, everything(), fixed)
        own = [each for each in found["annotations"] if each["image_id"] == row["image_id"]]
        assert [each["id"] for each in own if "corrected" not in each] == ids
        assert report["counts"]["added"] == max(0, count - 2)


@pytest.mark.parametrize("strategy", ["merge", "soft_nms", "nms"])
def test_a_suppression_at_reduce_changes_nothing_in_its_own_file(tmp_path: Path, strategy: Any) -> None:
    manifest = random_run(tmp_path, 21, num_images=20, shard_size=6)
    late = Decisions(
        CATEGORIES,
        np.arange(len(CATEGORIES), dtype=np.int32),
        np.full(len(CATEGORIES), 0.05),
        suppress=SuppressConfig(
            strategy=strategy, threshold=None if strategy == "soft_nms" else 0.1, across_labels=True
        ),
    )
    tree, _, _ = reduced(tmp_path, manifest, late)
    assert tree["annotations"] != reduced(tmp_path, manifest, everything())[0]["annotations"]
    found, _, report = reduced(tmp_path, manifest, late, tree)
    assert found["annotations"] == tree["annotations"]
    assert report["counts"]["confirmed"] == len(tree["annotations"])


def test_what_was_deleted_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest = random_run(tmp_path, 22, num_images=20, shard_size=6)
    tree, _, _ = reduced(tmp_path, manifest, everything())
    ids = [each["id"] for each in tree["annotations"]]
    with caplog.at_level("INFO"):
        _, counts, report = reduced(tmp_path, manifest, everything(), tree | {"annotations": tree["annotations"][3:]})
    assert report["applied"] == [{"id": number, "what": "deleted"} for number in ids[:3]]
    assert counts["corrections"]["deleted"] == 3
    assert f"corrections: {len(ids) - 3} confirmed, 0 edited, 0 added, 3 deleted, 0 rejected" in caplog.text
    assert "deletes" not in caplog.text
    caplog.clear()
    _, counts, report = reduced(tmp_path, manifest, everything(), tree | {"annotations": []})
    assert (report["counts"]["entries"], report["counts"]["deleted"]) == (0, len(ids))
    assert f"deletes {len(ids)} of the {len(ids)} annotations" in caplog.text
    # What the settings leave out, nobody misses.
    caplog.clear()
    none = Decisions(CATEGORIES, np.arange(3, dtype=np.int32), np.full(3, 2.0))
    found, counts, report = reduced(tmp_path, manifest, none, tree | {"annotations": []})
    assert found["annotations"] == report["applied"] == []
    assert counts["corrections"]["deleted"] == 0
    assert "deletes" not in caplog.text


def test_an_image_whose_ids_are_all_taken_has_others(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 15, num_images=12, shard_size=4)
    tree, _, _ = reduced(tmp_path, manifest, everything())
    crowded = Counter(each["image_id"] for each in tree["annotations"]).most_common(1)[0]
    assert crowded[1] == 12
    new = [{"image_id": crowded[0], "category_id": 3, "bbox": [0, 0, 1, n / 9]} for n in range(1, 2 * K - 12 + 3)]
    fixed = tree | {"annotations": tree["annotations"] + new}
    found, _, report = reduced(tmp_path, manifest, everything(), fixed)
    check_ids(found, manifest)
    assert report["counts"]["added"] == 2 * K - 12
    assert report["counts"]["conflicts"] == {"no_free_id": 2}
    assert len(found["annotations"]) == len(tree["annotations"]) + 2 * K - 12
    assert sum(each["id"] >= 2**52 for each in found["annotations"]) == K
    again, _, report = reduced(tmp_path, manifest, everything(), found)
    assert again["annotations"] == found["annotations"]
    assert report["counts"]["conflicts"] == {}


def test_marked_images_are_the_reviewed_ones(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 16, num_images=12, shard_size=4)
    tree, _, _ = reduced(tmp_path, manifest, everything())
    fixed = copy.deepcopy(tree)
    marked = tree["annotations"][0]["image_id"]
    for image in fixed["images"]:
        image["owlsam_reviewed"] = image["id"] == marked
    fixed["annotations"] = []
    found, _, _ = reduced(tmp_path, manifest, everything(), fixed)
    assert found["annotations"] == [each for each in tree["annotations"] if each["image_id"] != marked]
    fixed["annotations"] = [each | {"bbox": [0, 0, 1, 1]} for each in tree["annotations"]]
    _, _, report = reduced(tmp_path, manifest, everything(), fixed)
    own = [each for each in tree["annotations"] if each["image_id"] == marked]
    assert report["counts"]["unreviewed"] == len(tree["annotations"]) - len(own)


def test_polygons_of_the_machines_mask_are_no_change(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 17, num_images=12, shard_size=4)
    from owlsam_ray.reduce.formats.coco import CocoOutput

    tree, _, _ = reduced(tmp_path, manifest, everything())
    settings = ReduceConfig(out=str(tmp_path / "polygons"))
    reduce_shards(str(tmp_path), manifest, settings, decisions=everything(), outputs=(CocoOutput(polygons=True),))
    polygons = json.loads((tmp_path / "polygons" / "annotations.json").read_text())
    assert any(isinstance(each.get("segmentation"), list) for each in polygons["annotations"])
    found, _, _ = reduced(tmp_path, manifest, everything(), polygons)
    assert found["annotations"] == tree["annotations"]


def test_categories_go_by_name_through_the_mapping(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 18, num_images=12, shard_size=4)
    tree, _, _ = reduced(tmp_path, manifest, everything())
    numbers = {7: 1, 3: 2, 11: 3}
    fixed = copy.deepcopy(tree)
    for each in fixed["categories"]:
        each["id"] = numbers[each["id"]]
    for each in fixed["annotations"]:
        each["category_id"] = numbers[each["category_id"]]
    found, _, _ = reduced(tmp_path, manifest, everything(), fixed)
    assert found["annotations"] == tree["annotations"]
    only_cats = Decisions(CATEGORIES[:1], np.array([0, -1, -1], np.int32), np.full(3, -np.inf))
    found, _, report = reduced(tmp_path, manifest, only_cats, fixed)
    assert found["annotations"] == [each for each in tree["annotations"] if each["category_id"] == 7]
    assert report["counts"]["left_out"] == len(tree["annotations"]) - len(found["annotations"])
    assert report["counts"]["conflicts"] == {}


INFO: Tree = {"fingerprint": "f", "ids_per_image": K}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"info": {}}, InputError, "corrections_base"),
        ({"images": None}, InputError, "not a COCO file"),
        ({"info": {"owlsam_ray": {"fingerprint": "g", "ids_per_image": K}}}, GuardError, "corrects other labels"),
        ({"info": {"owlsam_ray": {"fingerprint": "f", "ids_per_image": 7}}}, GuardError, "7 ids"),
        ({"info": {"owlsam_ray": INFO | {"image_list": "4-a"}}}, GuardError, "over other images"),
        ({"info": {"owlsam_ray": INFO | {"image_list": []}}}, GuardError, "over other images"),
        ({"info": {"owlsam_ray": INFO | {"review": "x"}}}, InputError, "review is not an object"),
        ({"info": {"owlsam_ray": INFO | {"review": {"scope": "annotations", "listed": 1}}}}, InputError, "not a list"),
        (
            {"info": {"owlsam_ray": INFO | {"review": {"scope": "annotations", "listed": [1.5]}}}},
            InputError,
            "holds 1.5",
        ),
        (
            {"info": {"owlsam_ray": INFO | {"review": {"scope": "annotations", "listed": [5 * K]}}}},
            InputError,
            "no id of this run",
        ),
        (
            {"info": {"owlsam_ray": INFO | {"review": {"scope": "annotations", "listed": [10**30]}}}},
            InputError,
            "no id of this run",
        ),
        ({"images": [{"id": 10**8, "file_name": "x"}]}, InputError, "none of the 1 images"),
        ({"images": [{"id": 1}, {"id": 1}]}, InputError, "twice"),
        ({"annotations": [{"id": 1}]}, InputError, "nothing in"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(tmp_path: Path, change: Tree, error: type, words: str) -> None:
    manifest = random_run(tmp_path, 19, num_images=4, shard_size=4)
    tree, _, _ = reduced(tmp_path, manifest, everything())
    with pytest.raises(error, match=words):
        reduced(tmp_path, manifest, everything(), tree | change)
    if change == {"info": {}}:
        found, _, _ = reduced(tmp_path, manifest, everything(), tree | change, corrections_scope="images")
        assert found["annotations"] == tree["annotations"]


def test_an_image_of_the_run_under_two_ids_is_refused(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 23, num_images=12, shard_size=4)
    tree, _, _ = reduced(tmp_path, manifest, everything())
    twice = tree["images"][2] | {"id": 10**8}
    with pytest.raises(InputError, match=f"twice, as images {twice['id']}|and {twice['id']}"):
        reduced(tmp_path, manifest, everything(), tree | {"images": [*tree["images"], twice]})


def test_a_file_from_before_an_extension_is_of_the_run(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 24, num_images=12, shard_size=4)
    tree, _, _ = reduced(tmp_path, manifest, everything())
    other = random_run(tmp_path / "other", 25, num_images=12, shard_size=4)
    with pytest.raises(GuardError, match="over other images"):
        reduced(tmp_path / "other", other, everything(), tree)
    assert tree["info"]["owlsam_ray"]["image_list"] == manifest.images_digest()
    shorter = tree["info"]["owlsam_ray"] | {"image_list": manifest.images_digest(7)}
    found, _, _ = reduced(tmp_path, manifest, everything(), tree | {"info": {"owlsam_ray": shorter}})
    assert found["annotations"] == tree["annotations"]


def test_what_holds_only_some_earlier_corrections_is_refused(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 26, num_images=12, shard_size=4)
    tree, _, _ = reduced(tmp_path, manifest, everything())
    fixed, _, _ = edit(random.Random(26), tree)
    first, _, _ = reduced(tmp_path, manifest, everything(), fixed)
    again, _, _ = reduced(tmp_path, manifest, everything(), first)
    assert again["annotations"] == first["annotations"]
    part = first | {"images": first["images"][1:]}
    review = first["info"]["owlsam_ray"] | {"review": {"scope": "annotations", "listed": []}}
    marked = [image | {"owlsam_reviewed": place > 0} for place, image in enumerate(first["images"])]
    for odd in (part, first | {"images": marked}, first | {"info": {"owlsam_ray": review}}):
        with pytest.raises(InputError, match="earlier ones would be lost"):
            reduced(tmp_path, manifest, everything(), odd)
    own = part | {
        "annotations": [each for each in first["annotations"] if each["image_id"] != first["images"][0]["id"]]
    }
    reduced(tmp_path, manifest, everything(), own, corrections_scope="images")
