"""Settings that come later: left out where they stand at the value from before, and no new one without its marker."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
from pydantic import BaseModel, Field

from owlsam_ray.config.added_settings import marker_of, with_added, without_added
from owlsam_ray.config.base import Added, Section
from owlsam_ray.config.load import config_from_stored
from owlsam_ray.config.run import FREE_FIELDS, NON_LABEL_FIELDS, RunConfig
from owlsam_ray.config.vocabulary import Category, Exemplar
from owlsam_ray.errors import GuardError
from owlsam_ray.run.planned_settings import check_config
from owlsam_ray.run.record import RunRecord, canonical_hash
from owlsam_ray.vocabulary import Query

EARLIER = json.loads((Path(__file__).parents[1] / "fixtures" / "earlier" / "finished" / "run.json").read_text())
"""`run.json` of the first version whose runs are to go on: what it lists was there from the beginning."""


class _Item(Section):
    name: str
    weight: Annotated[float, Added(1.0)] = 1.0


class _Inner(Section):
    old: int = 1
    new: Annotated[str, Added("full")] = "full"


class _Later(Section):
    side: int = 7


class _Tree(Section):
    inner: _Inner = _Inner()
    items: tuple[_Item, ...] = ()
    named: dict[str, _Item] = Field(default={})
    sharper: Annotated[bool, Added(False)] = True  # its default is another value than before
    later: Annotated[_Later | None, Added(None)] = None


def test_added_settings_are_left_out_where_they_change_nothing() -> None:
    same = _Tree(sharper=False, items=(_Item(name="a"),), named={"b": _Item(name="b")})
    assert without_added(same) == {
        "inner": {"old": 1},
        "items": [{"name": "a"}],
        "named": {"b": {"name": "b"}},
    }
    other = _Tree(inner=_Inner(new="auto"), items=(_Item(name="a", weight=2.0),), later=_Later())
    assert without_added(other) == {
        "inner": {"old": 1, "new": "auto"},
        "items": [{"name": "a", "weight": 2.0}],
        "named": {},
        "sharper": True,
        "later": {"side": 7},
    }
    assert without_added(other, exclude={"inner", "items", "later"}) == {"named": {}, "sharper": True}


def test_what_stored_settings_lack_is_as_it_was_before() -> None:
    stored = {"inner": {"old": 5}, "items": [{"name": "a"}]}
    filled = with_added(_Tree, stored)
    assert filled == stored | {"inner": {"old": 5, "new": "full"}, "sharper": False, "later": None}
    assert _Tree.model_validate(filled).sharper is False
    assert stored == {"inner": {"old": 5}, "items": [{"name": "a"}]}
    assert with_added(_Tree, {"inner": {"new": "auto"}, "sharper": True, "later": {"side": 1}}) == {
        "inner": {"new": "auto"},
        "sharper": True,
        "later": {"side": 1},
    }
    assert with_added(_Tree, {"inner": 3})["inner"] == 3  # for validation to refuse


def _kinds_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _kinds_in(inner)


def _fields(kind: type[BaseModel], stored: Any, path: str = "") -> Iterator[tuple[str, Any, bool]]:
    """(path, field, whether the first version had it) of every field, into sections but not into lists of them."""
    for name, field in kind.model_fields.items():
        here = f"{path}{name}"
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _fields(inner, stored.get(name, {}), f"{here}.")
        else:
            yield here, field, name in stored


def test_every_setting_that_the_first_version_lacked_is_marked() -> None:
    """Fails for a new field without `Added`, which would refuse all earlier runs."""
    seen = 0
    for path, field, there in _fields(RunConfig, EARLIER["config"]):
        if path.split(".")[0] in FREE_FIELDS:
            continue
        assert there == (marker_of(field) is None), f"{path}: mark new fields (settings.Added), and only those"
        seen += 1
    assert seen >= 50


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        (Category, {"id", "name", "supercategory", "synonyms", "prompts", "frequency"}),
        (Query, {"label", "prompts", "exemplar"}),
        (Exemplar, {"category", "image", "box"}),
    ],
)
def test_entries_of_lists_keep_their_first_fields(kind: type[BaseModel], first: set[str]) -> None:
    """Stored entries are not filled, so an added field's default must be its value from before."""
    for name, field in kind.model_fields.items():
        marker = marker_of(field)
        assert (name in first) == (marker is None), name
        assert marker is None or field.default == marker.as_before


def test_the_earlier_fingerprint_is_the_hash_of_what_todays_settings_give() -> None:
    config = config_from_stored(EARLIER["config"])
    assert config.label_fields() == EARLIER["fingerprint_parts"]["config"]
    assert canonical_hash(EARLIER["fingerprint_parts"] | {"config": config.label_fields()}) == EARLIER["fingerprint"]


def _marked_paths() -> list[tuple[str, ...]]:
    return [
        tuple(path.split("."))
        for path, field, _ in _fields(RunConfig, {})
        if marker_of(field) is not None and path.split(".")[0] not in FREE_FIELDS
    ]


@pytest.mark.parametrize("path", _marked_paths(), ids=".".join)
def test_an_added_setting_changes_the_fingerprint_only_at_another_value(path: tuple[str, ...]) -> None:
    record = RunRecord.model_validate(EARLIER)
    before = record.stored_config()
    check_config(before, record)

    def with_value(value: Any) -> RunConfig:
        sections = [before]
        for name in path[:-1]:
            sections.append(getattr(sections[-1], name))
        for section, name in zip(reversed(sections), reversed(path), strict=True):
            value = section.model_copy(update={name: value})
        return value

    section: Any = before
    for name in path:
        section = getattr(section, name)
    field: Any = RunConfig
    for name in path[:-1]:
        field = field.model_fields[name].annotation
    marker = marker_of(field.model_fields[path[-1]])
    assert marker is not None
    assert json.loads(json.dumps(section)) == marker.as_before
    changed = with_value("something else")
    if path[0] not in NON_LABEL_FIELDS:
        assert canonical_hash(changed.label_fields()) != canonical_hash(before.label_fields())
    with pytest.raises(GuardError, match=rf"{'.'.join(path)}: .* -> 'something else'"):
        check_config(changed, record)
