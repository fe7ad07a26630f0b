"""Names against pictures: each category is asked as it should be, by objects that nothing covers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from owlsam_ray.ops.masks import tight_box
from owlsam_ray.sources import drawing
from owlsam_ray.sources.drawing import CATEGORIES, Split, draw
from tests.bench.exemplars import GROUPS, MIN_SIDE, choose, compare, main, table, vocabularies, write_exemplars

IMAGES, SEED = 6, 5


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    return compare(IMAGES, seed=SEED)


@pytest.fixture(scope="module")
def chosen() -> dict[int, tuple[int, int]]:
    return choose(1001)


def test_chosen_objects_are_large_and_whole(
    chosen: dict[int, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their masks have the area that was drawn before anything could cover it."""
    place, areas = drawing._place, []

    def noted(*arguments: Any, **options: Any) -> Any:
        placed = place(*arguments, **options)
        if placed is not None:
            areas.append(np.count_nonzero(placed[2] >= 0.5))
        return placed

    monkeypatch.setattr(drawing, "_place", noted)
    assert list(chosen) == list(range(len(CATEGORIES)))
    some_are_covered = False
    for label, (index, position) in chosen.items():
        areas.clear()
        found = draw(1001, Split.TEST, index)
        assert found.labels[position] == label
        x0, y0, x1, y1 = tight_box(found.masks[position])
        assert (x1 - x0) * (y1 - y0) >= MIN_SIDE**2
        visible = found.masks.sum(axis=(1, 2)).tolist()
        assert visible[position] == areas[position]
        some_are_covered |= visible != areas
    assert some_are_covered


@pytest.mark.slow
def test_a_category_is_asked_by_its_name_or_by_one_picture(tmp_path: Path, chosen: dict[int, tuple[int, int]]) -> None:
    exemplars = write_exemplars(1001, tmp_path)
    asked = vocabularies(exemplars)
    assert list(asked) == ["name", "picture"]
    assert [query.prompts for query in asked["name"].queries] == [(category.name,) for category in CATEGORIES]
    assert all(query.exemplar is None for query in asked["name"].queries)
    assert [query.prompts for query in asked["picture"].queries] == [()] * len(CATEGORIES)
    assert [query.exemplar for query in asked["picture"].queries] == list(exemplars)
    assert asked["name"].query_labels == asked["picture"].query_labels == tuple(range(len(CATEGORIES)))
    for category, exemplar, (index, position) in zip(CATEGORIES, exemplars, chosen.values(), strict=True):
        assert exemplar.category == category.name
        shown = draw(1001, Split.TEST, index)
        assert exemplar.box == tight_box(shown.masks[position])
        with Image.open(exemplar.image) as image:
            assert (np.asarray(image) == shown.pixels).all()


@pytest.mark.slow
def test_both_ways_give_numbers_for_every_group(compared: dict[str, Any]) -> None:
    labels = [label for index in range(IMAGES) for label in draw(SEED, Split.TEST, index).labels.tolist()]
    drawn = [CATEGORIES[label].supercategory for label in labels]
    assert list(compared["groups"]) == list(GROUPS)
    for group, row in compared["groups"].items():
        assert row["objects"] == drawn.count(group) > 0
        for way in ("name", "picture"):
            assert 0 <= row["box AP"][way] <= row["box AP50"][way] <= 1
    seen = compared["groups"]["seen pair"]
    assert min(seen["box AP50"].values()) > 0.7
    assert seen["box AP"]["name"] != seen["box AP"]["picture"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(compared: dict[str, Any]) -> None:
    assert compare(IMAGES, seed=SEED) | {"seconds": 0} == compared | {"seconds": 0}


@pytest.mark.slow
def test_the_table_has_a_row_for_each_group(compared: dict[str, Any]) -> None:
    rows = [line for line in table(compared).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(GROUPS)
    assert {row.count("|") for row in rows} == {7}


def test_the_command_prints_the_table_and_a_dash_where_nothing_was_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--images", "1", "--seed", "0"])
    printed = capsys.readouterr().out
    assert printed.startswith("1 drawn test pictures of seed 0, exemplars of seed 1000")
    assert "| withheld shape | 0 | – | – | – | – |" in printed


@pytest.mark.parametrize("arguments", [["--images", "0"], ["--seed", "-1"]])
def test_no_picture_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "at least one picture" in capsys.readouterr().err
