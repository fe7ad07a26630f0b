"""Counts over finished shards: from one listing, and from each footer once, whatever happens meanwhile."""

import json
import logging
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from owlsam_ray.errors import IncompleteError
from owlsam_ray.run import counts as tally_module
from owlsam_ray.run import shards as ledger
from owlsam_ray.run.counts import RunCounts
from owlsam_ray.run.manifest import Manifest, ManifestPart
from owlsam_ray.run.paths import PROGRESS_FILE
from owlsam_ray.run.progress import ProgressWatcher
from owlsam_ray.run.record import RunRecord
from owlsam_ray.run.run import StoredRun
from owlsam_ray.run.shards import shard_url
from owlsam_ray.schema import predictions_to_table
from tests.run.test_shards import PREDICTIONS, write


def planned(url: Path, *num_rows: int, fingerprint: str = "f") -> StoredRun:
    manifest = manifest_of(url, *num_rows)
    record = RunRecord(
        owlsam_version="0",
        config={},
        categories=(),
        queries=(),
        ids_per_image=5,
        layout_hash=manifest.layout_hash,
        fingerprint=fingerprint,
    )
    return StoredRun(record, manifest)


def manifest_of(url: Path, *num_rows: int, shard_size: int = 4) -> Manifest:
    """Parts of so many images; an empty file stands for each."""
    parts: list[ManifestPart] = []
    for rows in num_rows:
        parts.append(
            ManifestPart(
                file=f"part-{len(parts):04d}.parquet",
                sha256="",
                num_rows=rows,
                first_ordinal=1 + sum(part.num_rows for part in parts),
                first_shard=sum(part.num_shards for part in parts),
                num_shards=-(-rows // shard_size),
                shard_size=shard_size,
                max_shard_bytes=0,
                source={},
            )
        )
    return Manifest(str(url), tuple(parts))


def tally_of(run: Path, num_shards: int, **values: Any) -> RunCounts:
    return RunCounts(planned(run, 4 * num_shards), **values)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shards whose footer is read from here on."""
    seen: list[int] = []

    def read(run_url: str, shard: int) -> ledger.ShardFooter:
        seen.append(shard)
        return ledger.read_footer(run_url, shard)

    monkeypatch.setattr(tally_module, "read_footer", read)
    return seen


def test_each_footer_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    tally = tally_of(tmp_path, 3)
    write(str(tmp_path), 0)
    assert tally.refresh().images_done == 4
    write(str(tmp_path), 2)
    assert tally.refresh().images_done == 8
    assert seen == [0, 2]
    assert tally.summary() == {
        "images": 12,
        "done": 8,
        "ok": 2,
        "empty": 2,
        "failed": 4,
        "left": 4,
        "detections": 6,
        "masks": 4,
        "shards": 3,
        "shards_done": 2,
    }
    assert tally.counts["transient"] == 2
    assert tally.transient_shards == tally.failed_shards == tally.done == {0, 2}
    assert tally.stage_s == {"decode": pytest.approx(0.247)}
    assert tally.pending() == [1]


def test_what_is_done_is_known_without_a_footer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    for shard in range(5):
        write(str(tmp_path), shard)
    tally = tally_of(tmp_path, 7)
    assert tally.refresh_listing() == set(range(5))
    assert (tally.unread, tally.pending(), tally.images_done, tally.images_fresh) == (5, [5, 6], 20, 0)
    assert tally.summary()["shards_done"] == 5
    assert not seen
    assert not tally.failed_shards
    tally.refresh(limit=2)
    assert (len(seen), tally.unread, tally.summary()["failed"]) == (2, 3, 4)
    tally.refresh()
    assert (sorted(seen), tally.unread, tally.summary()["failed"]) == ([0, 1, 2, 3, 4], 0, 10)


def test_a_slice_counts_its_own_shards_only(tmp_path: Path) -> None:
    run = planned(tmp_path, 4 * 5, 9)  # shards 0…4 and 5…7, of which the last has one image
    for shard in (1, 2, 4, 5):
        write(str(tmp_path), shard)
    tally = RunCounts(run, shards=range(1, run.manifest.num_shards, 3))  # 1, 4, 7
    assert tally.refresh_listing() == {1, 4}
    assert (tally.num_shards, tally.num_images, tally.pending()) == (3, 9, [7])
    assert tally.refresh().summary()["left"] == 1
    assert tally.transient_shards == {1, 4}
    empty = RunCounts(run, shards=range(9, run.manifest.num_shards, 10)).refresh()
    assert (empty.num_images, empty.pending(), empty.summary()["done"]) == (0, [], 0)


def test_forgotten_shards_are_read_again(tmp_path: Path) -> None:
    tally = tally_of(tmp_path, 2)
    for shard in range(2):
        write(str(tmp_path), shard)
    tally.refresh()
    healthy = predictions_to_table([PREDICTIONS[0]] * 4)
    ledger.write_shard(str(tmp_path), 1, healthy, fingerprint="f", numerics="n", stage_s={"detect": 2.0})
    assert tally.refresh().failed_shards == {0, 1}
    tally.forget([1])
    assert (tally.unread, tally.done, tally.failed_shards) == (1, {0, 1}, {0})
    tally.refresh()
    assert (tally.counts["ok"], tally.counts["failed"], tally.failed_shards) == (5, 2, {0})
    assert tally.stage_s == {"decode": pytest.approx(0.1235), "detect": 2.0}


def test_a_file_that_is_taken_away_is_not_done_and_is_read_again_when_it_is_back(tmp_path: Path) -> None:
    for shard in range(2):
        write(str(tmp_path), shard)
    tally = tally_of(tmp_path, 2).refresh()
    Path(shard_url(str(tmp_path), 0)).unlink()
    assert (tally.refresh().pending(), tally.images_done, tally.counts["ok"]) == ([0], 4, 1)
    assert tally.images_fresh == 0
    write(str(tmp_path), 0)
    assert (tally.refresh().pending(), tally.counts["ok"], tally.images_fresh) == ([], 2, 0)


def test_a_file_that_goes_between_listing_and_reading_is_no_error(tmp_path: Path) -> None:
    write(str(tmp_path), 0)
    tally = tally_of(tmp_path, 1)
    tally.refresh_listing()
    Path(shard_url(str(tmp_path), 0)).unlink()
    tally.read_footers()
    assert tally.unread == 1
    assert tally.refresh().pending() == [0]


@pytest.mark.parametrize(
    ("num_shards", "fingerprint", "words"),
    [(1, "f", "the run has 1 shards"), (9, "g", "fingerprint"), (2, "f", "4 rows, but the manifest lists 2 images")],
)
def test_shards_of_another_run_are_refused(tmp_path: Path, num_shards: int, fingerprint: str, words: str) -> None:
    write(str(tmp_path), 1)
    with pytest.raises(IncompleteError, match=words) as caught:
        RunCounts(planned(tmp_path, 4 * num_shards - 2, fingerprint=fingerprint)).refresh()
    assert shard_url(str(tmp_path), 1) in str(caught.value)


def test_a_damaged_file_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally_module, "_CHUNK", 2)
    for shard in range(7):
        write(str(tmp_path), shard)
    for shard in (0, 1, 4):
        Path(shard_url(str(tmp_path), shard)).write_bytes(b"PAR1 no")
    tally = tally_of(tmp_path, 7)
    for _ in range(2):
        with pytest.raises(IncompleteError, match=shard_url(str(tmp_path), 0)):
            tally.refresh()
        assert (tally.unread, tally.counts["ok"]) == (3, 4)


def test_the_counts_are_exact_whoever_looks_while_shards_are_written(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    num_shards = 60
    tally, done = tally_of(tmp_path, num_shards), threading.Event()
    order = rng.sample(range(num_shards), num_shards)
    limits = [rng.choice([1, 3, 50, None]) for _ in range(3)]
    written: list[int] = []

    def look(limit: int | None) -> None:
        while not done.is_set():
            before = set(written)
            tally.refresh(limit)
            assert before.isdisjoint(tally.pending())

    with ThreadPoolExecutor(len(limits)) as pool:
        looking = [pool.submit(look, limit) for limit in limits]
        for shard in order:
            write(str(tmp_path), shard)
            written.append(shard)
            if rng.random() < 0.2:
                tally.forget(rng.sample(order, 3))
        done.set()
        for each in looking:
            each.result()
    tally.refresh()
    assert (tally.unread, tally.pending(), tally.summary()["done"]) == (0, [], 4 * num_shards)
    assert tally.counts == {"ok": 60, "empty": 60, "failed": 120, "transient": 60, "detections": 180, "masks": 120}
    assert tally.stage_s == {"decode": pytest.approx(60 * 0.1235)}


def wait_until(what: Any) -> None:
    end = time.monotonic() + 20
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_watcher_catches_up_with_footers_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("owlsam_ray.run.progress._FOOTERS_AT_ONCE", 2)
    for shard in range(9):
        write(str(tmp_path), shard)
    states: list[dict[str, Any]] = []
    tally = tally_of(tmp_path, 10)
    tally.refresh_listing()
    with ProgressWatcher(tally, interval_s=600, show=states.append) as watcher:
        wait_until(lambda: tally.unread == 0)
        assert not states
        write(str(tmp_path), 9)
        watcher.look()
    assert json.loads((tmp_path / PROGRESS_FILE).read_bytes()) == states[0]
    assert (states[0]["done"], states[0]["ok"], states[0]["shards_done"]) == (40, 10, 10)
    assert states[0]["images_per_s"] == pytest.approx(4 / states[0]["seconds"], rel=0.7)
    assert tally.images_fresh == 4


def test_the_watcher_looks_at_intervals_and_writes_the_file_it_was_told(tmp_path: Path) -> None:
    states: list[dict[str, Any]] = []
    tally = tally_of(tmp_path, 3, shards=range(1, 3, 2))
    with ProgressWatcher(tally, interval_s=0.02, show=states.append, file_name="progress-2-of-2.json"):
        write(str(tmp_path), 1)
        wait_until(lambda: states and states[-1]["left"] == 0)
    assert json.loads((tmp_path / "progress-2-of-2.json").read_bytes())["images"] == 4
    assert not (tmp_path / PROGRESS_FILE).exists()


def test_a_damaged_file_is_warned_of_and_raised_by_the_last_look(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(str(tmp_path), 0)
    write(str(tmp_path), 1)
    Path(shard_url(str(tmp_path), 0)).write_bytes(b"")
    tally = tally_of(tmp_path, 2)
    tally.refresh_listing()
    caplog.set_level(logging.WARNING)
    with ProgressWatcher(tally, interval_s=0.02, show=lambda _: None) as watcher:
        wait_until(lambda: "shard-00000000.parquet" in caplog.text)
        with pytest.raises(IncompleteError, match=r"shard-00000000\.parquet"):
            watcher.look()
    assert tally.counts["ok"] == 1


def test_leaving_does_not_wait_for_all_footers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("owlsam_ray.run.progress._FOOTERS_AT_ONCE", 1)
    seen: list[int] = []

    def slow(run_url: str, shard: int) -> ledger.ShardFooter:
        seen.append(shard)
        time.sleep(0.1)
        raise FileNotFoundError

    monkeypatch.setattr(tally_module, "read_footer", slow)
    for shard in range(40):
        write(str(tmp_path), shard)
    tally = tally_of(tmp_path, 40)
    tally.refresh_listing()
    with ProgressWatcher(tally, interval_s=600, show=lambda _: None):
        wait_until(lambda: seen)
    assert 1 <= len(seen) < 20


def test_no_row_is_counted_of_a_run_without_shards(tmp_path: Path) -> None:
    tally = tally_of(tmp_path, 2).refresh()
    assert tally.summary() == dict.fromkeys(tally.summary(), 0) | {"images": 8, "left": 8, "shards": 2}
    assert tally.stage_s == {}
