"""Whole runs with stand-ins give exactly what their pictures must, and the pictures are what the benchmark says."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from owlsam_ray.config.data import DataConfig
from owlsam_ray.fetch.images import fetch_rows
from owlsam_ray.sources import list_images
from tests.bench.million import BROKEN, DISTINCT, SOURCES, bench, is_broken, png, write_pictures


def test_pictures_are_different_pngs() -> None:
    pixels = {np.asarray(Image.open(io.BytesIO(png(number)))).tobytes() for number in range(DISTINCT)}
    assert len(pixels) == DISTINCT
    assert {len(each) for each in pixels} == {8 * 8 * 3}


@pytest.mark.parametrize("source", SOURCES)
def test_both_sources_hold_the_same_pictures_in_order(source: str, tmp_path: Path) -> None:
    count = BROKEN + 20
    data = DataConfig.model_validate(write_pictures(tmp_path, count, source))
    rows = [row for table in list_images(data).tables for row in table.to_pylist()]
    assert len(rows) == count
    some = [0, 1, DISTINCT, BROKEN - 1, count - 1]
    found = fetch_rows([rows[place] for place in some], threads=2, max_bytes=10**6)
    assert found == [png(place % DISTINCT)[: 60 if is_broken(place) else None] for place in some]
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(bytes(found[3]))).load()  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "images"), [("table", 20_000), ("webdataset", 5_000)])
def test_a_whole_run_counts_what_its_pictures_must_give(source: str, images: int, tmp_path: Path) -> None:
    told = bench(tmp_path, images, source)
    assert told["annotate"]["done"] == images
    assert told["reduce"]["failed_by_reason"] == ({"truncated": images // BROKEN} if images >= BROKEN else {})
    assert told["shards"]["files"] == told["plan"]["shards"]
    assert told["annotate"]["driver_mib"] < 1024
