"""Types of Arrow files from outside: which are plain, and what differs from a schema."""

import pyarrow as pa
import pytest

from owlsam_ray.storage.arrow_types import extension_of, forget_ray_types, holds_bytes, misfit_of, shown_type

METADATA = {b"ARROW:extension:name": b"someones.own"}
UNKNOWN = pa.field("x", pa.binary(), metadata=METADATA)


class Own(pa.ExtensionType):
    def __init__(self) -> None:
        super().__init__(pa.int64(), "tests.own")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "Own":
        return Own()


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (pa.field("x", pa.int64()), None),
        (pa.field("x", pa.struct([pa.field("a", pa.list_(pa.string()))])), None),
        (pa.field("x", pa.dictionary(pa.int8(), pa.binary())), None),
        (pa.field("x", pa.json_()), None),
        (pa.field("x", pa.list_(pa.uuid())), None),
        (UNKNOWN, "someones.own"),
        (pa.field("x", Own()), "tests.own"),
        (pa.field("x", pa.list_(Own())), "tests.own"),
        (pa.field("x", pa.large_list(UNKNOWN)), "someones.own"),
        (pa.field("x", pa.struct([pa.field("a", pa.struct([UNKNOWN]))])), "someones.own"),
        (pa.field("x", pa.map_(pa.string(), UNKNOWN)), "someones.own"),
        (pa.field("x", pa.dictionary(pa.int8(), Own())), "tests.own"),
        (pa.field("x", pa.int64(), metadata={b"ARROW:extension:name": b"arrow.py_type"}), "arrow.py_type"),
    ],
)
def test_extension_types_are_found_at_any_depth(field: pa.Field, expected: str | None) -> None:
    assert extension_of(field) == expected


WANTED = pa.schema([pa.field("a", pa.int64(), nullable=False), pa.field("b", pa.string()), pa.field("c", pa.binary())])


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (WANTED, None),
        (pa.schema([("a", pa.int64()), ("b", pa.string()), ("c", pa.binary())], metadata={"k": "v"}), None),
        (pa.schema([("a", pa.int64()), ("c", pa.binary())]), None),
        (pa.schema([("a", pa.int64()), ("b", pa.string())]), "its columns are not a, b, c"),
        (pa.schema([("a", pa.int64()), ("a", pa.int64()), ("b", pa.string())]), "its columns are not a, b, c"),
        (pa.schema([("a", pa.int32()), ("b", pa.string()), ("c", pa.binary())]), "its column a holds int32, not int64"),
        (
            pa.schema([("a", pa.int64()), ("b", pa.string()), UNKNOWN.with_name("c")]),
            "its column c holds the extension type 'someones.own', not binary",
        ),
        (
            pa.schema([("a", Own()), ("b", pa.string()), ("c", pa.binary())]),
            "its column a holds the extension type 'tests.own', not int64",
        ),
    ],
)
def test_what_differs_from_a_schema(found: pa.Schema, expected: str | None) -> None:
    assert misfit_of(found, WANTED, may_lack=("b",)) == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (pa.binary(), True),
        (pa.large_binary(), True),
        (pa.binary_view(), True),
        (pa.binary(3), True),
        (pa.dictionary(pa.int32(), pa.binary()), True),
        (pa.string(), False),
        (pa.struct([("bytes", pa.binary())]), False),
        (pa.list_(pa.binary()), False),
        (pa.map_(pa.string(), pa.binary()), False),
    ],
)
def test_which_columns_hold_bytes(kind: pa.DataType, expected: bool) -> None:
    assert holds_bytes(pa.field("x", kind)) is expected
    assert holds_bytes(UNKNOWN.with_type(kind)) is False


def test_a_type_is_shown_in_few_words() -> None:
    assert shown_type(pa.field("x", pa.struct([(f"field{n}", pa.int64()) for n in range(9999)]))).startswith("struct<")
    assert len(shown_type(pa.field("x", pa.struct([(f"field{n}", pa.int64()) for n in range(9999)])))) == 200


def test_types_of_ray_are_forgotten_once_and_again() -> None:
    forget_ray_types()
    forget_ray_types()
    with pytest.raises(pa.ArrowKeyError):
        pa.unregister_extension_type("ray.data.arrow_pickled_object")
