"""Which images are planned: selections, repeated images, extensions, and what a killed plan leaves."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import FailedImagesError, GuardError, IncompleteError, InputError
from owlsam_ray.ops.arrays import repeats
from owlsam_ray.plan import plan as plan_module
from owlsam_ray.plan.plan import Plan, plan_run
from owlsam_ray.run.guard import guard_labels, guard_numerics
from owlsam_ray.run.record import load_record
from owlsam_ray.run.run import open_run, open_stored_run

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}]


def write_coco(folder: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]] | None = None) -> Path:
    """A COCO file, and one of its images so that the root is believed."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image in images:
        path = folder / "images" / image["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    tree = {"images": images, "annotations": annotations or [], "categories": CATEGORIES}
    (folder / "list.json").write_text(json.dumps(tree))
    return folder


def numbered(count: int, *, folder: str = "a", first: int = 0) -> list[dict[str, Any]]:
    return [{"id": 100 + n, "file_name": f"{folder}/{n}.jpg"} for n in range(first, first + count)]


def coco_run(data: Path, run: Path, **plan: Any) -> RunConfig:
    source = {"source": "coco", "images": str(data / "images"), "annotations": str(data / "list.json")}
    return make_config(source, run, **plan)


def make_config(source: dict[str, Any], run: Path, **plan: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": str(run),
            "data": source,
            "vocabulary": {"categories": ["cat"]},
            "detector": {"weights": "w"},
            "segment": {"weights": "s.pt"},
            "plan": plan,
            "resources": {"shard_size": 4},
        }
    )


def names(plan: Plan) -> list[str]:
    return [name for table in plan.run.manifest.iter_images() for name in table["file_name"].to_pylist()]


def ids(plan: Plan) -> list[int]:
    return [number for table in plan.run.manifest.iter_images() for number in table["image_id"].to_pylist()]


def test_limit(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", numbered(30))
    assert names(plan_run(coco_run(data, tmp_path / "run", limit=11))) == [f"a/{n}.jpg" for n in range(11)]


def test_a_larger_sample_holds_the_smaller_one(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", numbered(60))
    chosen = {
        (count, seed): names(plan_run(coco_run(data, tmp_path / f"{count}-{seed}", sample=count, seed=seed)))
        for count in (10, 25, 100)
        for seed in (0, 1, 2**63 - 1)
    }
    for (count, seed), found in chosen.items():
        assert len(found) == min(count, 60)
        assert found == sorted(found, key=lambda name: int(name[2:-4])), "the listing's order"
        assert set(chosen[10, seed]) <= set(found)
    assert len({tuple(found) for (count, _), found in chosen.items() if count == 25}) == 3
    again = names(plan_run(coco_run(data, tmp_path / "again", sample=25, seed=1)))
    assert again == chosen[25, 1]


def test_a_sample_is_even() -> None:
    """Each of 40 images is in about a quarter of 400 samples of 10."""
    from owlsam_ray.sources.spool import digests_of, sample_mask

    digests = digests_of(pa.array([f"{n}.jpg" for n in range(40)]))
    hits = np.sum([sample_mask(digests, 10, seed) for seed in range(400)], axis=0)
    assert hits.sum() == 4000
    assert 60 < hits.min() <= hits.max() < 140  # 100 ± 4.6 standard deviations of 8.7


def test_splits_and_categories(tmp_path: Path) -> None:
    images = [*numbered(10, folder="train2017"), *numbered(10, folder="val2017", first=10)]
    annotations = [
        {"id": n, "image_id": 100 + n, "category_id": category, "bbox": [0, 0, 1, 1]}
        for n, category in ((1, 3), (2, 9), (12, 3), (13, 9))
    ]
    data = write_coco(tmp_path / "data", images, annotations)
    assert ids(plan_run(coco_run(data, tmp_path / "1", splits=["val2017"]))) == list(range(110, 120))
    assert ids(plan_run(coco_run(data, tmp_path / "2", categories=["cat"]))) == [101, 112]
    assert ids(plan_run(coco_run(data, tmp_path / "3", categories=[3, "dog"], splits=["val2017"]))) == [112, 113]
    assert ids(plan_run(coco_run(data, tmp_path / "4", categories=["dog"], limit=1))) == [102]
    with pytest.raises(InputError, match=r"plan\.categories names 'bird', which is not among the 2 categories"):
        plan_run(coco_run(data, tmp_path / "5", categories=["bird"]))
    with pytest.raises(InputError, match=r"none of 20 images matches plan\.splits=\['test'\]"):
        plan_run(coco_run(data, tmp_path / "6", splits=["test"]))
    folder = make_config({"source": "folder", "images": str(data / "images")}, tmp_path / "7", categories=["cat"])
    with pytest.raises(InputError, match="has none"):
        plan_run(folder)


def test_repeated_images(tmp_path: Path) -> None:
    images = [*numbered(6), {"id": 900, "file_name": "a/2.jpg"}, {"id": 901, "file_name": "b.jpg"}]
    data = write_coco(tmp_path / "data", images)
    with pytest.raises(InputError, match=r"'a/2\.jpg' is listed twice, as id 102 and as id 900"):
        plan_run(coco_run(data, tmp_path / "run"))
    assert load_record(str(tmp_path / "run")) is None
    plan = plan_run(coco_run(data, tmp_path / "run", duplicates="first"))
    assert (ids(plan), plan.repeated, plan.new) == ([100, 101, 102, 103, 104, 105, 901], 1, 7)
    limited = plan_run(coco_run(data, tmp_path / "limited", duplicates="first", limit=7))
    assert ids(limited) == ids(plan)


def test_repeated_ids_are_never_kept(tmp_path: Path) -> None:
    images = [*numbered(6), {"id": 103, "file_name": "ü.jpg"}, {"id": 104, "file_name": "x.jpg"}]
    data = write_coco(tmp_path / "data", images)
    for duplicates in ("refuse", "first"):
        with pytest.raises(InputError, match=r"2 problems[^ß]*id 103 is given to both 'a/3\.jpg' and 'ü\.jpg'"):
            plan_run(coco_run(data, tmp_path / "run", duplicates=duplicates))


def test_repeats_equal_a_loop() -> None:
    rng = np.random.default_rng(seed := 5)
    for _ in range(50):
        values = rng.integers(0, 12, size=rng.integers(0, 20))
        first: dict[int, int] = {}
        expected = [
            (place, first[value])
            for place, value in enumerate(values.tolist())
            if first.setdefault(value, place) != place
        ]
        later, earlier = repeats(values)
        assert list(zip(later.tolist(), earlier.tolist(), strict=True)) == expected, seed


def test_extend_adds_what_is_new(tmp_path: Path) -> None:
    data, run = write_coco(tmp_path / "data", numbered(10)), tmp_path / "run"
    config = coco_run(data, run)
    first = plan_run(config)
    assert plan_run(config, extend=True).new == 0
    write_coco(data, [*numbered(3, folder="b", first=50), *numbered(12)[2:]])  # two are gone, five are new
    assert plan_run(config).run.manifest == first.run.manifest, "without --extend the plan is kept"
    both = plan_run(config, extend=True)
    assert both.new == 5
    assert ids(both) == [*range(100, 110), 150, 151, 152, 110, 111]
    assert both.run.manifest.parts[0] == first.run.manifest.parts[0]
    record = load_record(str(run))
    assert record == both.run.record
    assert open_stored_run(str(run)).manifest == both.run.manifest
    assert plan_run(config).run.manifest == both.run.manifest


def test_extend_by_another_file(tmp_path: Path) -> None:
    config = coco_run(write_coco(tmp_path / "one", numbered(5)), tmp_path / "run")
    plan_run(config)
    other = coco_run(write_coco(tmp_path / "two", numbered(5, first=3)), tmp_path / "run")
    with pytest.raises(GuardError, match=r"data\.annotations"):
        plan_run(other)
    both = plan_run(other, extend=True)
    assert ids(both) == list(range(100, 108))
    assert [shard["uri"].to_pylist()[0].split("/")[-4] for shard in map(both.run.manifest.read_shard, (0, 2))] == [
        "one",
        "two",
    ]
    assert plan_run(other).new == 0
    labels = other.model_copy(update={"detector": other.detector.model_copy(update={"score_floor": 0.5})})
    with pytest.raises(GuardError, match=r"detector\.score_floor"):
        plan_run(labels, extend=True)


def test_extend_without_ids_goes_on_counting(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", numbered(3))
    config = make_config({"source": "folder", "images": str(data / "images")}, tmp_path / "run")
    assert ids(plan_run(config)) == [1, 2, 3]
    write_coco(data, [{"id": 1, "file_name": "a/0a.jpg"}])
    both = plan_run(config, extend=True)
    assert list(zip(ids(both), names(both), strict=True))[3:] == [(4, "a/0a.jpg")]


def test_extend_by_another_folder_goes_by_place(tmp_path: Path) -> None:
    """Names below another root say nothing: the same file is not planned twice, another file not taken for it."""
    for name in ("2024/a.jpg", "2024/b.jpg", "2025/a.jpg"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()

    def config(folder: str) -> RunConfig:
        return make_config({"source": "folder", "images": str(tmp_path / folder)}, tmp_path / "run")

    plan_run(config("data/2024"))
    with pytest.raises(
        GuardError, match=r"the name of 'a\.jpg', .*2025/a\.jpg, belongs to another image of the run \(id 1\)"
    ):
        plan_run(config("data/2025"), extend=True)
    both = plan_run(config("data"), extend=True)
    assert (both.new, names(both)) == (1, ["a.jpg", "b.jpg", "2025/a.jpg"])


def test_ids_that_an_extension_gives_are_new(tmp_path: Path) -> None:
    """A source with sparse ids, extended by one without: no id twice."""
    data = write_coco(tmp_path / "one", [{"id": number, "file_name": f"a/{number}.jpg"} for number in (3, 5, 2, 7)])
    plan_run(coco_run(data, tmp_path / "run"))
    (tmp_path / "two").mkdir()
    for name in "wxyz":
        (tmp_path / "two" / f"{name}.jpg").touch()
    both = plan_run(make_config({"source": "folder", "images": str(tmp_path / "two")}, tmp_path / "run"), extend=True)
    assert ids(both) == [3, 5, 2, 7, 8, 9, 10, 11]
    with pytest.raises(GuardError, match=r"the id of 'a/9\.jpg' \(id 9\)"):
        plan_run(
            coco_run(write_coco(tmp_path / "three", [{"id": 9, "file_name": "a/9.jpg"}]), tmp_path / "run"), extend=True
        )


def test_an_extension_and_an_attempt_keep_what_the_other_wrote(tmp_path: Path) -> None:
    data, run = write_coco(tmp_path / "data", numbered(5)), tmp_path / "run"
    old = plan_run(coco_run(data, run)).run
    write_coco(data, numbered(9))
    plan_run(coco_run(data, run), extend=True)
    # The attempt read run.json before the extension, and sets its fingerprint and numerics after it.
    guarded = guard_labels(old, {"config": {}})
    guard_numerics(guarded, {"device": "cpu"}, allow_change=False)
    extended = open_run(coco_run(data, run))
    assert extended is not None
    record = extended.record
    assert (record.num_parts, record.fingerprint, len(record.numerics)) == (2, guarded.record.fingerprint, 1)
    assert extended.manifest.num_images == 9
    write_coco(data, numbered(11))

    def meanwhile(what: str, done: int, total: int | None) -> None:
        if what == "planned" and not told:
            told.append(guard_numerics(extended, {"device": "cuda"}, allow_change=True))

    told: list[Any] = []
    plan_run(coco_run(data, run), extend=True, show=meanwhile)
    last = load_record(str(run))
    assert last is not None
    assert (last.num_parts, len(last.numerics)) == (3, 2)


def test_two_extensions_at_once_are_told(tmp_path: Path) -> None:
    data, run = write_coco(tmp_path / "data", numbered(5)), tmp_path / "run"
    plan_run(coco_run(data, run))
    write_coco(data, numbered(9))

    def meanwhile(what: str, done: int, total: int | None) -> None:
        if what == "listed" and not told:
            told.append(plan_run(coco_run(data, run, limit=6), extend=True))

    told: list[Any] = []
    with pytest.raises(GuardError, match="extended by another command meanwhile"):
        plan_run(coco_run(data, run), extend=True, show=meanwhile)
    assert open_stored_run(str(run)).manifest == told[0].run.manifest, "the other one's parts are left alone"


def test_categories_of_a_wrong_form_are_told(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", numbered(2))
    tree = json.loads((data / "list.json").read_text())
    for categories in (["dog"], [{"id": "a", "name": "dog"}], [{"name": "dog"}]):
        (data / "list.json").write_text(json.dumps(tree | {"categories": categories}))
        with pytest.raises(InputError, match=r"categories\[0\] of the dataset needs an integer id and a name"):
            plan_run(coco_run(data, tmp_path / "run", categories=["dog"]))


def test_splits_that_are_not_there_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_coco(tmp_path / "data", [*numbered(3, folder="val"), *numbered(3, folder="train", first=5)])
    assert plan_run(coco_run(data, tmp_path / "1", splits=["val", "tezt"])).new == 3
    assert "no image is in split 'tezt'; the splits are 'train', 'val'" in caplog.text
    with pytest.raises(InputError, match="The splits are 'train', 'val'"):
        plan_run(coco_run(data, tmp_path / "2", splits=["tezt"]))


def test_a_full_temporary_directory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    data = write_coco(tmp_path / "data", numbered(2))
    monkeypatch.setattr(pa.ipc, "new_file", full)
    with pytest.raises(IncompleteError, match=r"no room for the listing in the temporary directory .* set TMPDIR"):
        plan_run(coco_run(data, tmp_path / "run"))


def test_extend_from_a_sample_to_everything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, run = write_coco(tmp_path / "data", numbered(40)), tmp_path / "run"
    small = plan_run(coco_run(data, run, sample=5, seed=3))
    larger = plan_run(coco_run(data, run, sample=12, seed=3), extend=True)
    assert (small.new, larger.new) == (5, 7)
    alone = plan_run(coco_run(data, tmp_path / "alone", sample=12, seed=3))
    assert set(ids(larger)) == set(ids(alone))
    assert plan_run(coco_run(data, run)).new == 0
    assert "the run keeps its planned selection, plan.sample=12, plan.seed=3; `owlsam plan --extend`" in caplog.text
    assert plan_run(coco_run(data, run), extend=True).new == 28


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (
            [{"id": 777, "file_name": "a/1.jpg"}],
            r"the name of 'a/1\.jpg' \(id 777\), .* another image of the run \(id 101",
        ),
        (
            [{"id": 101, "file_name": "new.jpg"}],
            r"the id of 'new\.jpg' \(id 101\), .* another image of the run \(id 101",
        ),
    ],
)
def test_extend_refuses_a_contradiction(tmp_path: Path, images: list[dict[str, Any]], words: str) -> None:
    data = write_coco(tmp_path / "data", numbered(5))
    before = plan_run(coco_run(data, tmp_path / "run"))
    write_coco(data, images)
    with pytest.raises(GuardError, match=words):
        plan_run(coco_run(data, tmp_path / "run"), extend=True)
    assert load_record(str(tmp_path / "run")) == before.run.record


def test_a_file_of_names_that_changes_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "names.txt"
    file.write_text("cat\ncar\n")
    config = coco_run(write_coco(tmp_path / "data", numbered(2)), tmp_path / "run")
    config = config.model_copy(update={"vocabulary": config.vocabulary.model_copy(update={"categories": str(file)})})
    plan = plan_run(config)
    assert plan_run(config).new == 0
    file.write_text("cat\nwolf\n")
    with pytest.raises(GuardError, match=r"other categories \(2 -> 2\); the first that differs: .*car.*wolf"):
        plan_run(config)
    file.unlink()
    assert plan_run(config).run.record == plan.run.record
    assert "keeps its planned vocabulary" in caplog.text


def test_nothing_to_extend(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no plan to extend"):
        plan_run(coco_run(write_coco(tmp_path / "data", numbered(1)), tmp_path / "run"), extend=True)


def test_extend_refuses_another_vocabulary(tmp_path: Path) -> None:
    def with_dataset_names(config: RunConfig) -> RunConfig:
        return config.model_copy(update={"vocabulary": config.vocabulary.model_copy(update={"categories": "dataset"})})

    config = with_dataset_names(coco_run(write_coco(tmp_path / "one", numbered(2)), tmp_path / "run"))
    plan_run(config)
    data = write_coco(tmp_path / "two", numbered(2, first=7))
    tree = json.loads((data / "list.json").read_text())
    tree["categories"][1]["name"] = "wolf"
    (data / "list.json").write_text(json.dumps(tree))
    with pytest.raises(GuardError, match=r"other categories \(2 -> 2\); the first that differs: .*dog.*wolf"):
        plan_run(with_dataset_names(coco_run(data, tmp_path / "run")), extend=True)


def test_a_killed_extension_leaves_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run = write_coco(tmp_path / "data", numbered(5)), tmp_path / "run"
    first = plan_run(coco_run(data, run))
    write_coco(data, numbered(9))
    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "save_record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            plan_run(coco_run(data, run), extend=True)
    assert (run / "manifest" / "part-0001.json").exists()
    assert plan_run(coco_run(data, run)).run.manifest == first.run.manifest
    assert plan_run(coco_run(data, run), extend=True).new == 4


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    data = write_coco(tmp_path / "data", numbered(9))
    plan_run(coco_run(data, tmp_path / "run"), show=lambda *state: told.append(state))
    assert ("listed", 9) in [state[:2] for state in told]
    assert ("planned", 9, 9) in told


def draw(data: Path) -> None:
    """Real pictures for all files but the last two: one is damaged, one is gone."""
    files = sorted((data / "images").rglob("*.jpg"), key=lambda path: int(path.stem))
    for path in files[:-2]:
        Image.new("RGB", (8, 6), (200, 30, 30)).save(path)
    files[-2].write_bytes(files[0].read_bytes()[:200])
    files[-1].unlink()


@pytest.mark.parametrize(
    ("mode", "reasons"), [("exists", {"9.jpg": "missing"}), ("decode", {"8.jpg": "truncated", "9.jpg": "missing"})]
)
def test_verify(tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, reasons: dict[str, str]) -> None:
    data, run = write_coco(tmp_path / "data", numbered(10)), tmp_path / "run"
    draw(data)
    config = coco_run(data, run, verify=mode)
    with pytest.raises(FailedImagesError, match=f"{len(reasons)} of 10 images would fail .* nothing is planned"):
        plan_run(config)
    assert load_record(str(run)) is None
    lines = [json.loads(line) for line in (run / "verify.jsonl").read_text().splitlines()]
    assert {line["file_name"][2:]: line["reason"].split(":")[0] for line in lines} == reasons
    lenient = config.model_copy(update={"reduce": config.reduce.model_copy(update={"max_failed": 2})})
    plan = plan_run(lenient)
    assert plan.new == 10, "they are planned all the same: one image, one row"
    assert "They are planned, and become failed rows" in caplog.text


def test_a_planned_run_keeps_its_own_endings(tmp_path: Path) -> None:
    """The default was shorter when this run was planned; what stands in the run file counts as ever."""
    for name in ("a.jpg", "b.jfif"):
        (tmp_path / "i").mkdir(exist_ok=True)
        (tmp_path / "i" / name).touch()
    source = {"source": "folder", "images": str(tmp_path / "i")}
    run = tmp_path / "run"
    assert names(plan_run(make_config(source | {"suffixes": [".jpg"]}, run))) == ["a.jpg"]
    config = make_config(source, run)
    assert plan_run(config).new == 0
    assert plan_run(config, extend=True).new == 0
    record = load_record(str(run))
    assert record is not None
    assert record.stored_config().data.suffixes == (".jpg",)
    with pytest.raises(GuardError, match=r"data\.suffixes"):
        plan_run(make_config(source | {"suffixes": [".jfif"]}, run))
    wider = make_config(source | {"suffixes": [".jpg", ".jfif"]}, run)
    assert names(plan_run(wider, extend=True)) == ["a.jpg", "b.jfif"]
    assert names(plan_run(make_config(source, tmp_path / "new"))) == ["a.jpg", "b.jfif"]
