"""Building blocks of all sections of the run file: base class, common types, the marker of added fields."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    model_validator,
)

from owlsam_ray.config.rules import Rule

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]

Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]

Auto = Literal["auto"]

PositiveInt = Annotated[int, Field(ge=1)]

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """A frozen section that refuses unknown keys, and combinations of settings that break one of its rules."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    RULES: ClassVar[tuple[Rule, ...]] = ()
    """Rules across several fields, in the order in which they are checked."""

    @model_validator(mode="after")
    def _keeps_its_rules(self) -> Self:
        for rule in self.RULES:
            problem = rule.problem_of(self)
            if problem is not None:
                raise ValueError(problem)
        return self


@dataclass(frozen=True, slots=True)
class Added:
    """Marks a field that was added after runs were stored: `Annotated[Kind, Added(value)] = default`.

    Every new field that can change labels, or the set of images, needs it (a test checks all fields): without the
    marker, all earlier runs would be refused. See `added_settings`.
    """

    as_before: Any
    """The value that labels as the code did without the field, in plain JSON. The default may differ from it."""


SectionT = TypeVar("SectionT", bound=Section)

KINDS = ("<text>", "<list>", "<mapping>")
"""Tags for the kinds of value that a union accepts. pydantic inserts them into the location of an error, although they
are not fields. Field names cannot look like this."""


def _by_kind(wanted: str) -> Discriminator:
    """Choose the branch of a union by a value's kind, so that only its errors are reported; `wanted` if none fits."""

    def kind(value: Any) -> str:
        if isinstance(value, str):
            return "<text>"
        if isinstance(value, (list, tuple)):
            return "<list>"
        return "<mapping>" if isinstance(value, (Mapping, BaseModel)) else "none of these"

    return Discriminator(kind, custom_error_type="kind", custom_error_message=f"Input should be {wanted}")


MEGABYTE = 10**6
