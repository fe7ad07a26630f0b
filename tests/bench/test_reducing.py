"""Many images of the stand-in models, reduced in every way: the same bytes, and those of the plain twin."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from owlsam_ray.config.load import load_config
from owlsam_ray.config.run import RunConfig
from owlsam_ray.plan.plan import plan_run
from owlsam_ray.reduce.decisions import Decisions
from owlsam_ray.reduce.run import reduce_run
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.proof import ShardRules
from owlsam_ray.run.record import load_record, save_record
from owlsam_ray.run.shards import load_shard, shard_url, write_shard
from tests.bench.million import DISTINCT, is_broken, write_pictures, write_run_file
from tests.bench.reducing import main
from tests.reduce.everything import keep_everything
from tests.reduce.plain import dump, plain_reduce
from tests.runs import label_here

_BLOCK = 2**24


def labelled_run(root: Path, images: int) -> tuple[RunConfig, Manifest, ShardRules]:
    """A run of so many pictures, of which `DISTINCT` are different and only these were labelled.

    Labels depend on the picture alone: `python -m tests.bench.million` labels every one, and counts the same.
    """
    for name, count in (("few", DISTINCT), ("many", images)):
        (root / name).mkdir()
        write_run_file(root / name / "run.json5", write_pictures(root / name, count, "table"))
    few, many = (
        load_config([str(root / name / "run.json5")], run=str(root / name / "run")) for name in ("few", "many")
    )
    label_here(few)
    labelled = load_record(str(few.run))
    plan = plan_run(many)
    assert labelled is not None
    update = {name: getattr(labelled, name) for name in ("fingerprint", "fingerprint_parts", "numerics")}
    save_record(str(many.run), plan.run.record.model_copy(update=update))
    shards = sorted((root / "few" / "run" / "predictions").iterdir())
    rows = pa.concat_tables([load_shard(str(few.run), number)[1] for number in range(len(shards))]).combine_chunks()
    rows = pa.concat_tables([rows, _broken(rows)])
    rules = ShardRules(labelled.fingerprint or "", labelled.ids_per_image, len(labelled.categories))
    for shard in plan.run.manifest.iter_shards():
        ids = plan.run.manifest.read_shard(shard)["image_id"].to_numpy()
        places = np.where([is_broken(number) for number in ids], DISTINCT, ids % DISTINCT)
        table = rows.take(pa.array(places)).combine_chunks()
        table = table.set_column(0, table.schema.field("image_id"), pa.array(ids))
        write_shard(str(many.run), shard, table, fingerprint=rules.fingerprint, numerics="n", stage_s={})
    return many, plan.run.manifest, rules


def _broken(rows: pa.Table) -> pa.Table:
    """A row of a picture that is cut."""
    values: dict[str, Any] = dict.fromkeys(rows.column_names)
    values |= {"image_id": 0, "status": "failed", "reason": "truncated", "status_class": "permanent"}
    return pa.Table.from_pylist([values], rows.schema)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("images", [20_000, 1_000_000])
def test_stitched_equals_plain_for_any_workers(tmp_path: Path, images: int) -> None:
    config, manifest, rules = labelled_run(tmp_path, images)
    record = load_record(str(config.run))
    assert record is not None
    found = []
    for workers in (1, 2):
        out = tmp_path / f"out-{workers}"
        settings = config.reduce.model_copy(update={"workers": workers, "out": str(out)})
        counts = reduce_run(config.model_copy(update={"reduce": settings}))
        found.append(sha256(out / "annotations.json"))
    assert found[0] == found[1]
    assert counts["failed"] == sum(map(is_broken, range(images)))
    decisions = keep_everything(record.categories)
    expected = plain_lines(str(config.run), manifest, rules, decisions)
    with (tmp_path / "out-1" / "annotations.json").open(encoding="ascii") as file:
        assert file.readline() == "{\n"
        for start in ('"info": ', '"licenses": ', '"images": ['):
            assert file.readline().startswith(start)
        for line in file:
            if line.startswith('"categories": '):
                continue
            assert line == next(expected)
    assert next(expected, None) is None


def plain_lines(run_url: str, manifest: Manifest, rules: ShardRules, decisions: Decisions) -> Iterator[str]:
    """The lines of the plain twin from the first image on, a shard in memory."""
    for key, end in (("images", "],\n"), ("annotations", "]\n")):
        last = None
        for shard in manifest.iter_shards():
            for each in getattr(plain_reduce(run_url, manifest, rules, decisions, shards=[shard]), key):
                if last is not None:
                    yield f"{last},\n"
                last = dump(each)
        if last is not None:
            yield f"{last}\n"
        yield end
        if key == "images":
            yield '"annotations": [\n'
    yield "}\n"


@pytest.mark.slow
def test_both_ways_give_the_same_labels(capsys: pytest.CaptureFixture[str]) -> None:
    """The comparison holds the files against each other, and prints its numbers."""
    main(["--annotations", "3000", "--rounds", "1", "--sizes", "3000"])
    compared, measured = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert compared["annotations"] == measured["annotations"] == 3000
    assert compared["cpu_ratio"] > 0
    assert measured["all_mib"] > 50


@pytest.mark.slow
def test_shards_without_useless_dictionaries(tmp_path: Path) -> None:
    """What shards of other writers hold is read all the same."""
    config, manifest, _ = labelled_run(tmp_path, DISTINCT)
    url = shard_url(str(config.run), 0)
    metadata = pq.read_metadata(url).row_group(0)
    encodings = {metadata.column(place).path_in_schema: metadata.column(place).encodings for place in range(24)}
    assert "RLE_DICTIONARY" in encodings["label.list.element"]
    assert "RLE_DICTIONARY" not in encodings["rle_counts.list.element"]
    assert manifest.num_images == DISTINCT
