"""What every section of the run file is made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
)

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]

Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]

Auto = Literal["auto"]

PositiveInt = Annotated[int, Field(ge=1)]

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """Frozen, and refuses keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, slots=True)
class Added:
    """Marks a field that came after runs were stored: `Annotated[Kind, Added(value)] = default`.

    Every new field that can change labels, or which images there are, needs it (a test walks them): without, all
    earlier runs would be refused. See `added_settings`.
    """

    as_before: Any
    """The value that labels as the code did without the field, as plain JSON has it. The default may be another one."""


SectionT = TypeVar("SectionT", bound=Section)

KINDS = ("<text>", "<list>", "<mapping>")
"""Tags of what a value may be: pydantic puts them into the place of an error, where they are no field. No field can be
called so."""


def _by_kind(wanted: str) -> Discriminator:
    """Which branch of a union a value is meant for, so that only its errors are told; `wanted` if it is for none."""

    def kind(value: Any) -> str:
        if isinstance(value, str):
            return "<text>"
        if isinstance(value, (list, tuple)):
            return "<list>"
        return "<mapping>" if isinstance(value, (Mapping, BaseModel)) else "none of these"

    return Discriminator(kind, custom_error_type="kind", custom_error_message=f"Input should be {wanted}")


MEGABYTE = 10**6
