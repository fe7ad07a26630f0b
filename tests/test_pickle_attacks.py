"""Files that hold a pickle which runs code, in every place that a stranger's file can come in: none of it runs.

The type that Ray Data registers is registered here as well, so that what is tested is not only that our processes
forget it.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from owlsam_ray.cli.main import main
from owlsam_ray.errors import GuardError, ImageError, IncompleteError, InputError
from owlsam_ray.fetch.images import fetch_rows, fetch_shard
from owlsam_ray.run.failure_counts import find_failures
from owlsam_ray.run.manifest import Manifest, load_manifest
from owlsam_ray.run.shards import encode_shard, load_shard, shard_url
from owlsam_ray.schema import MANIFEST_SCHEMA, PREDICTION_SCHEMA

PICKLED = "ray.data.arrow_pickled_object"


class Touch:
    """What a stranger would pickle: loading it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """The folder that exists once code of a stranger has run; the type that runs it is known to this process."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    from owlsam_ray.storage.arrow_types import forget_ray_types

    forget_ray_types()
    pa.register_extension_type(ArrowPythonObjectType())
    path = tmp_path / "code-has-run"
    yield path
    forget_ray_types()
    assert not path.exists()


def pickled(marker: Path, rows: int = 1) -> pa.Array:
    return pa.array([pickle.dumps(Touch(marker))] * rows, pa.large_binary())


def field(name: str) -> pa.Field:
    """As Ray writes it: the type stands in the field's metadata."""
    kind = {b"ARROW:extension:name": PICKLED.encode(), b"ARROW:extension:metadata": b""}
    return pa.field(name, pa.large_binary(), metadata=kind)


def run_file(folder: Path, columns: str) -> Path:
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (20, 10), "blue").save(folder / "images" / "a.png")
    path = folder / "run.yaml"
    path.write_text(
        f"data: {{source: table, files: {folder}/t.parquet, images: {folder}/images, columns: {columns}}}\n"
        "vocabulary: {categories: [square]}\ndetector: {model: fake}\nsegment: {model: fake}\n"
    )
    return path


def write_table(folder: Path, marker: Path) -> None:
    nested = pa.StructArray.from_arrays([pickled(marker)], fields=[field("caption")])
    schema = pa.schema([pa.field("uri", pa.string()), field("caption"), pa.field("more", nested.type)])
    pq.write_table(pa.table([pa.array(["a.png"]), pickled(marker), nested], schema=schema), folder / "t.parquet")


def test_the_attack_would_work(tmp_path: Path, marker: Path) -> None:
    """With nothing in between: the file is read, and code runs."""
    other = tmp_path / "other"
    write_table(tmp_path, other)
    pq.ParquetFile(tmp_path / "t.parquet").read().column("caption").to_pylist()
    assert other.exists()


@pytest.mark.parametrize("column", ["caption", "more", "more.caption"])
def test_annotate_refuses_a_table_with_pickles(
    tmp_path: Path, marker: Path, capfd: pytest.CaptureFixture[str], column: str
) -> None:
    write_table(tmp_path, marker)
    run = run_file(tmp_path, f"{{uri: uri, extra: [{column}]}}")
    assert main(["annotate", str(run), "--run", str(tmp_path / "run")]) == 2
    said = capfd.readouterr().err
    inside = f"has no column '{column}' (columns.extra): 'more' holds the extension type '{PICKLED}'"
    whole = f"column '{column}' (columns.extra) has the Arrow extension type '{PICKLED}'"
    assert (inside if column == "more.caption" else whole) in said
    assert "t.parquet" in said


def test_a_column_of_pickles_that_nobody_asked_for_does_not_matter(tmp_path: Path, marker: Path) -> None:
    write_table(tmp_path, marker)
    assert main(["plan", str(run_file(tmp_path, "{uri: uri}")), "--run", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("column", ["caption", "more.caption"])
def test_images_that_are_pickles_are_refused_by_plan_and_failed_rows_of_fetch(
    tmp_path: Path, marker: Path, capfd: pytest.CaptureFixture[str], column: str
) -> None:
    write_table(tmp_path, marker)
    run = run_file(tmp_path, f"{{bytes: {column}}}")
    assert main(["plan", str(run), "--run", str(tmp_path / "run")]) == 2
    assert PICKLED in capfd.readouterr().err
    row = {
        "uri": str(tmp_path / "t.parquet"),
        "container": "parquet",
        "member": column,
        "offset": 0,
        "length": None,
    }
    (outcome,) = fetch_rows([row], threads=1, max_bytes=10**6)
    assert isinstance(outcome, ImageError)
    assert outcome.reason == f"bad_table: column {column} holds the extension type '{PICKLED}', not bytes"


def manifest_with_pickles(run: Path, marker: Path, at: str) -> None:
    """Put pickles into the manifest of a planned run; all hashes fit, since a stranger makes them as well."""
    path = run / "manifest" / "part-0000.parquet"
    table = pq.read_table(path)
    fields = [field(each.name) if each.name == at else each for each in MANIFEST_SCHEMA]
    columns = [pickled(marker, len(table)) if each.name == at else table[each.name].combine_chunks() for each in fields]
    pq.write_table(pa.table(columns, schema=pa.schema(fields)), path)
    part = json.loads((run / "manifest" / "part-0000.json").read_text())
    part["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (run / "manifest" / "part-0000.json").write_text(json.dumps(part))


@pytest.mark.parametrize("at", ["extra", "uri", "image_id"])
def test_a_manifest_with_pickles_is_refused(
    tmp_path: Path, marker: Path, capfd: pytest.CaptureFixture[str], at: str
) -> None:
    pq.write_table(pa.table({"uri": ["a.png"]}), tmp_path / "t.parquet")
    run_yaml, run = run_file(tmp_path, "{uri: uri}"), tmp_path / "run"
    assert main(["plan", str(run_yaml), "--run", str(run)]) == 0
    manifest_with_pickles(run, marker, at)
    capfd.readouterr()
    of_file = [str(run_yaml), "--run", str(run)]
    for command, expected in (
        (["annotate", *of_file], 3),
        (["reduce", *of_file], 3),
        (["verify", str(run)], 5),  # whatever is damaged
    ):
        code = main(command)
        said = capfd.readouterr().err
        assert code == expected, said
        assert f"its column {at} holds the extension type '{PICKLED}'" in said
    with pytest.raises(GuardError, match="is not a manifest"):
        load_manifest(str(run), verify=True)
    # A fetch task gets the manifest from the driver, and reads the file by itself.
    unlooked = load_manifest(str(run), verify=False)
    assert unlooked is not None
    for read in (
        lambda: fetch_shard(unlooked, 0, threads=1, max_file_mb=1),
        lambda: list(unlooked.iter_names()),
        lambda: list(unlooked.iter_images()),
        lambda: unlooked.images_digest(),
    ):
        with pytest.raises(GuardError, match=f"its column {at} holds the extension type"):
            read()


def test_a_shard_with_pickles_is_refused(tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = PREDICTION_SCHEMA.empty_table()
    columns = [pa.nulls(1, each.type) for each in PREDICTION_SCHEMA]
    fields = list(PREDICTION_SCHEMA)
    place = PREDICTION_SCHEMA.get_field_index("reason")
    columns[place], fields[place] = pickled(marker), field("reason")
    columns[0] = pa.array([1], pa.int64())
    columns[1] = pa.array(["failed"])
    evil = pa.table(columns, schema=pa.schema(fields))
    monkeypatch.setattr("owlsam_ray.run.shards.PREDICTION_SCHEMA", evil.schema)
    monkeypatch.setattr("owlsam_ray.run.shards._footer_of", lambda _: FOOTER)
    data = bytes(encode_shard(0, evil, fingerprint="f", numerics="n", stage_s={}))
    monkeypatch.undo()
    url = Path(shard_url(str(tmp_path), 0))
    url.parent.mkdir()
    url.write_bytes(data)
    with pytest.raises(IncompleteError, match="its columns are not those of schema version 1"):
        load_shard(str(tmp_path), 0)
    found = find_failures(Manifest(str(tmp_path), ()), [0])
    assert (rows.num_rows, found.quarantined) == (0, [])


FOOTER: dict[str, Any] = {
    "schema_version": 1,
    "num_rows": 1,
    "counts": {"ok": 0, "empty": 0, "failed": 1},
    "transient": 0,
    "failures": {"quarantined x": 1},
    "num_detections": 0,
    "num_masks": 0,
}


def test_an_extension_type_that_this_process_does_not_know_is_refused_as_well(tmp_path: Path) -> None:
    """`plan` alone imports no Ray: what it refuses must not depend on that."""
    kind = {b"ARROW:extension:name": b"someones.own", b"ARROW:extension:metadata": b""}
    schema = pa.schema([pa.field("uri", pa.string()), pa.field("x", pa.int64(), metadata=kind)])
    pq.write_table(pa.table([pa.array(["a.png"]), pa.array([1])], schema=schema), tmp_path / "t.parquet")
    from owlsam_ray.config.load import load_config
    from owlsam_ray.sources import list_images

    config = load_config([run_file(tmp_path, "{uri: uri, extra: [x]}")])
    with pytest.raises(InputError, match=r"has the Arrow extension type 'someones\.own'"):
        list(list_images(config.data).tables)


@pytest.mark.slow
def test_tasks_and_actors_of_ray_do_not_know_the_type() -> None:
    import ray

    def registered() -> list[str]:
        import owlsam_ray.annotate.pipeline  # noqa: F401 (as every task and actor of the graph does)

        known = []
        for name in (PICKLED, "ray.data.arrow_tensor", "ray.data.arrow_tensor_v2"):
            try:
                pa.unregister_extension_type(name)
                known.append(name)
            except pa.ArrowKeyError:
                pass
        return known

    class Actor:
        def registered(self) -> list[str]:
            return registered()

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    try:
        assert ray.get(ray.remote(registered).remote()) == []
        assert ray.get(ray.remote(Actor).remote().registered.remote()) == []
        assert registered() == []
    finally:
        ray.shutdown()
