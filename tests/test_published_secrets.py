"""Every way out of the program, for URLs with user info and signatures: nothing of both comes through."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from owlsam_ray import storage
from owlsam_ray.cli import main as cli
from owlsam_ray.config.inference import DecodeConfig
from owlsam_ray.errors import FailureClass, ImageError, InputError
from owlsam_ray.fetch.images import fetch_rows
from owlsam_ray.fetch.packed import image_error
from owlsam_ray.plan.image_check import verify_images
from owlsam_ray.records import Prediction
from owlsam_ray.reduce.labels import images_of
from owlsam_ray.run.attempts import Slice
from owlsam_ray.run.claim import claim
from owlsam_ray.schema import PREDICTION_SCHEMA, predictions_to_table
from owlsam_ray.sources.listing import listing_table
from owlsam_ray.storage import StoragePolicy

URL = "http://ann:hunter2@127.0.0.1:1/a.png?X-Amz-Signature=f00d"
SHOWN = "http://***@127.0.0.1:1/a.png?***"


@pytest.fixture(autouse=True)
def quick_policy() -> Iterator[None]:
    storage.configure(StoragePolicy(retries=0, timeout_s=2))
    yield
    storage.configure(StoragePolicy())


def is_clean(text: str) -> bool:
    return "hunter2" not in text and "f00d" not in text


@pytest.mark.parametrize("container", [None, "tar", "parquet"])
def test_reasons_of_failed_images(container: str | None) -> None:
    row = {"uri": URL, "container": container, "member": "image", "offset": 0, "length": 10}
    (outcome,) = fetch_rows([row], threads=1, max_bytes=100)
    assert isinstance(outcome, ImageError)
    assert outcome.reason.startswith("fetch_failed: ClientConnectorError: ")
    assert outcome.reason.endswith(f"({SHOWN}, 1 try)")
    assert is_clean(outcome.reason)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(5, f"cut while reading {URL}"), f"fetch_failed: cut while reading {SHOWN}"),
        (PermissionError(13, f"{URL} is not for you"), f"forbidden: {SHOWN} is not for you"),
        (InputError(f"cannot open '{URL}'"), f"bad_uri: cannot open '{SHOWN}'"),
    ],
)
def test_errors_of_any_library_behind_an_image(error: OSError | InputError, reason: str) -> None:
    assert image_error(error).reason == reason


def test_unknown_schemes_and_urls_with_a_nul() -> None:
    for url, shown in (("nope://ann:hunter2@h/x?sig=f00d", "nope://***@h/x?***"), (f"{URL}\0", SHOWN)):
        with pytest.raises(InputError) as caught:
            storage.read_bytes(url)
        assert str(caught.value).startswith(f"cannot open {shown!r}: ")
        assert is_clean(str(caught.value))


def test_rows_of_shards() -> None:
    failed = Prediction(image_id=1, failure=(f"model_error: no answer of {URL}", FailureClass.PERMANENT))
    table = predictions_to_table([failed])
    assert table["reason"].to_pylist() == [f"model_error: no answer of {SHOWN}"]


def test_lines_of_a_verification() -> None:
    table = listing_table({"file_name": ["a.png"], "uri": [URL]})
    for mode in ("exists", "decode"):
        out = io.BytesIO()
        found = verify_images([table], mode, out, threads=1, decode=DecodeConfig())
        line = json.loads(out.getvalue())
        assert found.failed == 1
        assert line["uri"] == SHOWN
        assert is_clean(out.getvalue().decode())


def test_labels_of_runs_that_were_planned_with_secrets() -> None:
    extra = '{"coco_url": "http://ann:hunter2@h/a.png?id=17", "note": ["http://h/?sig=f00d", 1.50]}'
    plain = '{"coco_url": "http://h/a.png?id=17",   "n": 1e5}'
    sources = pa.table(
        {
            "image_id": [1, 2],
            "file_name": ["h/a.png?X-Amz-Signature=f00d", "b.png"],
            "uri": [URL, "http://h/b.png?id=2"],
            "container": pa.array([None, None], pa.string()),
            "extra": [extra, plain],
        }
    )
    empty: dict[str, Any] = {field.name: pa.nulls(2, field.type) for field in PREDICTION_SCHEMA}
    rows = pa.table(empty | {"status": ["failed", "ok"], "reason": [f"fetch_failed: ({URL}, 7 tries)", None]})
    found = images_of(sources, rows, 1, np.zeros(2, np.float32)).to_pydict()
    assert found["file_name"] == ["h/a.png?X-Amz-Signature=***", "b.png"]
    assert found["uri"] == ["http://127.0.0.1:1/a.png?X-Amz-Signature=***", "http://h/b.png?id=2"]
    assert found["reason"] == [f"fetch_failed: ({SHOWN}, 7 tries)", None]
    assert found["extra"] == ['{"coco_url": "http://h/a.png?id=17", "note": ["http://h/?sig=***", 1.5]}', plain]


def test_signs_of_life(tmp_path: Path) -> None:
    def end() -> None:
        with claim(str(tmp_path), scope="label", part=Slice.parse("1/1"), heartbeat_s=60, takeover_s=60) as attempt:
            attempt.set_report(last_error=f"no answer of {URL}")
            attempt.record.state = "running"
            attempt.save()
            assert f"no answer of {SHOWN}" in _written(tmp_path)
            raise InputError(f"cannot open {URL}")

    with pytest.raises(InputError):
        end()
    assert f"cannot open {SHOWN}" in _written(tmp_path)
    assert is_clean(_written(tmp_path))


def _written(run: Path) -> str:
    return "".join(path.read_text() for path in (run / "attempts").iterdir() if path.is_file())


def test_the_line_of_json_and_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stats", URL]) in (2, 5)
    shown = capsys.readouterr()
    assert SHOWN in json.loads(shown.out)["error"]
    assert SHOWN in shown.err
    assert is_clean(shown.out + shown.err)


def test_tracebacks_of_a_bug(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError(f"no answer of {URL}")

    monkeypatch.setitem(cli._WITHOUT_RUN, "stats", fail)
    assert cli.main(["stats", "file.json"]) == 5
    shown = capsys.readouterr()
    assert json.loads(shown.out)["error"] == f"RuntimeError: no answer of {SHOWN}"
    assert f"RuntimeError: no answer of {SHOWN}" in shown.err
    assert is_clean(shown.out + shown.err)
