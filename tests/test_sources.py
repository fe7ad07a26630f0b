"""Every source in its real layout, from plan to labels, with the demo's models."""

import csv
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from owlsam_ray.config.run import RunConfig
from owlsam_ray.models.shipped import model_settings
from tests.drawn_images import draw_picture
from tests.runs import label_here

NUM_IMAGES = 6
PATCHES = ["images/v1/patch8/objects365_v1_00420917.jpg", "images/v1/patch4/objects365_v1_00215264.jpg"]


@dataclass
class Layout:
    """A dataset on the disk."""

    data: dict[str, Any]
    """The section of a run file."""
    names: list[str]
    """File names in the output, in order."""
    ids: list[int]
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields that the first image record of the output must have."""


def photos(shared: Path) -> list[tuple[dict[str, Any], Path]]:
    """Real records with their pictures."""
    mini = shared / "data" / "coco_mini"
    images = json.loads((mini / "instances.json").read_text())["images"][:NUM_IMAGES]
    return [(image, mini / "images" / image["file_name"]) for image in images]


def write_json(path: Path, tree: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree), encoding="utf-8")
    return str(path)


def coco_2017(root: Path, shared: Path) -> Layout:
    """annotations/instances_val2017.json over val2017/000000000139.jpg."""
    records = []
    for image, picture in photos(shared):
        (root / "val2017").mkdir(exist_ok=True)
        shutil.copy(picture, root / "val2017" / image["file_name"])
        records.append(image | {"coco_url": f"http://images.cocodataset.org/val2017/{image['file_name']}"})
    file = write_json(root / "annotations" / "instances_val2017.json", {"images": records, "categories": []})
    return Layout(
        {"source": "coco", "images": str(root), "annotations": file},
        [f"val2017/{record['file_name']}" for record in records],
        [record["id"] for record in records],
        {"license": records[0]["license"], "flickr_url": records[0]["flickr_url"]},
    )


def coco_2014(root: Path, shared: Path) -> Layout:
    """annotations/image_info_test2014.json, without annotations, over test2014/COCO_test2014_000000000073.jpg."""
    records = []
    for image, picture in photos(shared):
        name = f"COCO_test2014_{image['file_name']}"
        (root / "test2014").mkdir(exist_ok=True)
        shutil.copy(picture, root / "test2014" / name)
        records.append({key: image[key] for key in ("id", "height", "width", "license")} | {"file_name": name})
    file = write_json(root / "annotations" / "image_info_test2014.json", {"images": records, "licenses": []})
    return Layout(
        {"source": "coco", "images": str(root / "test2014"), "annotations": file},
        [record["file_name"] for record in records],
        [record["id"] for record in records],
    )


def lvis(root: Path, shared: Path) -> Layout:
    """Records of LVIS, without file names as in v1, over val2017 and train2017. The pictures are drawn: none of the
    real ones is at hand."""
    tree = json.loads((shared / "data" / "lvis" / "lvis_val_100.json").read_text())
    records = tree["images"][:NUM_IMAGES]
    for place, record in enumerate(records):
        del record["file_name"]
        if place % 2:
            record["coco_url"] = record["coco_url"].replace("val2017", "train2017")
        draw_picture(root.joinpath(*record["coco_url"].split("/")[-2:]), record["height"], record["width"], seed=place)
    file = write_json(root / "lvis_v1_val.json", tree | {"images": records})
    return Layout(
        {"source": "lvis", "images": str(root), "annotations": file},
        ["/".join(record["coco_url"].split("/")[-2:]) for record in records],
        [record["id"] for record in records],
        {key: records[0][key] for key in ("neg_category_ids", "not_exhaustive_category_ids", "coco_url")},
    )


def objects365(root: Path, shared: Path) -> Layout:
    """Quoted records, `images/v1/patch8/…` over train/patch8/…; their pictures are drawn."""
    tree = json.loads((shared / "data" / "objects365" / "sample_records.json").read_text())
    for place, record in enumerate(tree["images"]):
        assert record["file_name"] == PATCHES[place]
        path = root / "train" / record["file_name"].removeprefix("images/v1/")
        draw_picture(path, record["height"], record["width"], seed=place)
    file = write_json(root / "zhiyuan_objv2_train.json", tree)
    return Layout(
        {"source": "objects365", "images": str(root), "annotations": file},
        [f"train/{name.removeprefix('images/v1/')}" for name in PATCHES],
        [420917, 215264],
        {"license": 5, "url": ""},
    )


def folder(root: Path, shared: Path) -> Layout:
    names = []
    for place, (image, picture) in enumerate(photos(shared)):
        names.append(f"día {place % 2}/{image['file_name']}")
        (root / names[-1]).parent.mkdir(exist_ok=True)
        shutil.copy(picture, root / names[-1])
    return Layout({"source": "folder", "images": str(root)}, sorted(names), list(range(1, NUM_IMAGES + 1)))


def parquet_table(root: Path, shared: Path) -> Layout:
    """Two files of relative paths with ids and sizes."""
    rows = []
    for image, picture in photos(shared):
        (root / "images").mkdir(exist_ok=True)
        shutil.copy(picture, root / "images" / image["file_name"])
        sizes = {key: image[key] for key in ("height", "width")}
        rows.append({"path": image["file_name"], "key": image["id"], "note": "ü", **sizes})
    for part in range(2):
        pq.write_table(pa.Table.from_pylist(rows[part::2]), root / f"part-{part}.parquet")
    ordered = rows[0::2] + rows[1::2]
    columns = {"uri": "path", "id": "key", "height": "height", "width": "width", "extra": ["note"]}
    return Layout(
        {
            "source": "table",
            "files": str(root / "part-*.parquet"),
            "images": str(root / "images"),
            "columns": columns,
        },
        [row["path"] for row in ordered],
        [row["key"] for row in ordered],
        {"note": "ü"},
    )


def parquet_bytes(root: Path, shared: Path) -> Layout:
    """Pictures in the rows, as Hugging Face's datasets store them."""
    rows = [{"image": {"bytes": picture.read_bytes(), "path": image["file_name"]}} for image, picture in photos(shared)]
    pq.write_table(pa.Table.from_pylist(rows), root / "train-00000.parquet", row_group_size=4)
    return Layout(
        {
            "source": "table",
            "files": str(root / "*.parquet"),
            "columns": {"bytes": "image.bytes", "file_name": "image.path"},
        },
        [row["image"]["path"] for row in rows],
        list(range(1, NUM_IMAGES + 1)),
    )


def csv_table(root: Path, shared: Path) -> Layout:
    """URLs of any kind, without a root."""
    urls = []
    for image, picture in photos(shared):
        shutil.copy(picture, root / image["file_name"])
        urls.append(f"file://{root}/{image['file_name']}")
    with (root / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["uri"], *([url] for url in urls)])
    return Layout(
        {"source": "table", "files": str(root / "list.csv"), "images": str(root)},
        [url.rsplit("/", 1)[-1] for url in urls],
        list(range(1, NUM_IMAGES + 1)),
    )


def jsonl_table(root: Path, shared: Path) -> Layout:
    names = []
    with (root / "list.jsonl").open("w") as file:
        for image, picture in photos(shared):
            names.append(image["file_name"])
            shutil.copy(picture, root / names[-1])
            file.write(json.dumps({"uri": names[-1], "id": image["id"], "other": [1, {"a": None}]}) + "\n")
    return Layout(
        {"source": "table", "files": str(root / "list.jsonl"), "images": str(root), "columns": {"id": "id"}},
        names,
        [image["id"] for image, _ in photos(shared)],
    )


def webdataset(root: Path, shared: Path) -> Layout:
    """Two shards with a picture and its JSON for each key."""
    names = []
    pictures = photos(shared)
    for shard in range(2):
        with tarfile.open(root / f"set-{shard:06d}.tar", "w") as tar:
            for key, (image, picture) in enumerate(pictures[shard::2]):
                for name, data in ((f"{key:04d}.jpg", picture.read_bytes()), (f"{key:04d}.json", b"{}")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                names.append(f"set-{shard:06d}.tar/{key:04d}.jpg")
                assert image["height"] > 0
    return Layout(
        {"source": "webdataset", "files": str(root / "set-{000000..000001}.tar")}, names, list(range(1, NUM_IMAGES + 1))
    )


LAYOUTS: list[Callable[[Path, Path], Layout]] = [
    coco_2017, coco_2014, lvis, objects365, folder, parquet_table, parquet_bytes, csv_table, jsonl_table, webdataset
]  # fmt: skip


def run_config(layout: Layout, run: Path) -> RunConfig:
    models = model_settings()
    return RunConfig.model_validate(
        models
        | {
            "run": str(run),
            "data": layout.data,
            "vocabulary": models["vocabulary"] | {"categories": ["red circle", "blue square"]},
            "resources": {"device": "cpu", "num_cpus": 2, "object_store_mb": 200, "shard_size": 4, "torch_threads": 1},
            "plan": {"workers": 1},
            "reduce": {"min_mask_area": 0},
        }
    )


def check_labels(layout: Layout, run: Path) -> None:
    """One image record for each image, with its name, id and what the source says of it."""
    labels = json.loads((run / "coco" / "annotations.json").read_text())
    assert [image["file_name"] for image in labels["images"]] == layout.names
    assert [image["id"] for image in labels["images"]] == layout.ids
    first = labels["images"][0]
    assert {key: first.get(key) for key in layout.extra} == layout.extra
    proof = labels["info"]["owlsam_ray"]["proof"]
    assert (proof["images"], proof["failed"], proof["flagged_by_reason"]) == (len(layout.names), 0, {})
    assert {each["image_id"] for each in labels["annotations"]} <= set(layout.ids)


@pytest.mark.parametrize("build", LAYOUTS, ids=lambda build: build.__name__)
def test_a_source_from_plan_to_labels(build: Callable[[Path, Path], Layout], tmp_path: Path, shared: Path) -> None:
    (tmp_path / "data").mkdir()
    layout = build(tmp_path / "data", shared)
    label_here(run_config(layout, tmp_path / "run"))
    check_labels(layout, tmp_path / "run")


def test_an_extended_run_labels_what_is_new(tmp_path: Path) -> None:
    """A sample, then a part of the rest, then another folder: each image once, and old shards to the byte."""
    for place in range(20):
        draw_picture(tmp_path / "a" / f"{place:02d}.png", 40, 50, seed=place)
    for place in range(3):
        draw_picture(tmp_path / "b" / f"{place:02d}.jpg", 50, 40, seed=50 + place)
    run = tmp_path / "run"
    config = run_config(Layout({"source": "folder", "images": str(tmp_path / "a")}, [], []), run)

    def shards() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (run / "predictions").iterdir()}

    def labels() -> dict[str, Any]:
        return dict(json.loads((run / "coco" / "annotations.json").read_text()))

    label_here(config.model_copy(update={"plan": config.plan.model_copy(update={"sample": 6, "seed": 2})}))
    first, before = labels(), shards()
    label_here(config, extend=True)
    both = labels()
    other = run_config(Layout({"source": "folder", "images": str(tmp_path / "b")}, [], []), run)
    table = config.model_copy(update={"data": other.data.model_copy(update={"suffixes": (".jpg",)})})
    label_here(table, extend=True)
    last = labels()
    assert {name: shards()[name] for name in before} == before
    assert [len(each["images"]) for each in (first, both, last)] == [6, 20, 23]
    assert len({image["file_name"] for image in both["images"]}) == 20
    assert [image["id"] for image in last["images"]] == list(range(1, 24))
    assert last["images"][:20] == both["images"]
    assert both["images"][:6] == first["images"]
    assert both["annotations"][: len(first["annotations"])] == first["annotations"]
    assert len({each["id"] for each in last["annotations"]}) == len(last["annotations"])


@pytest.mark.slow
@pytest.mark.parametrize("build", LAYOUTS, ids=lambda build: build.__name__)
def test_a_source_through_ray(build: Callable[[Path, Path], Layout], tmp_path: Path, shared: Path) -> None:
    from owlsam_ray.annotate.attempt import annotate_run
    from owlsam_ray.reduce.run import reduce_run

    (tmp_path / "data").mkdir()
    layout = build(tmp_path / "data", shared)
    config = run_config(layout, tmp_path / "run")
    assert annotate_run(config)["new"] == len(layout.names)
    reduce_run(config)
    check_labels(layout, tmp_path / "run")
    label_here(config.model_copy(update={"run": str(tmp_path / "here")}))
    here, there = ((tmp_path / name / "coco" / "annotations.json").read_bytes() for name in ("here", "run"))
    assert here == there
