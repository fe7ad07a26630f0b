"""Load YAML from untrusted run files: plain values, or one sentence that says what is wrong and where.

Beyond YAML's own rules, these are refused: duplicate keys, lists as keys, deep nesting, integers of hundreds of digits,
and aliases that expand to much more than was written. Merge keys (`<<`) work.
"""

from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from owlsam_ray.errors import one_line, shown

MAX_BYTES = 16 * 2**20
"""Maximum size of a run file."""
_MAX_DEPTH = 64
_MAX_UNFOLDED = 100_000
"""Maximum number of values that all aliases together expand to: a thousand aliases of a section of a hundred values."""
_MAX_NUMBER = 100
"""Maximum number of characters in a number."""
_MERGE = "tag:yaml.org,2002:merge"


def load_yaml(text: str) -> Any:
    """The value of a YAML text; None when the text is empty.

    Raises:
        ValueError: it is not valid, or exceeds the limits of a run file; says what and where, in one line.
    """
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{one_line(what or error)}{where}") from None
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        # Raised by PyYAML itself for a tag that does not fit its value: `!!omap 3`.
        raise ValueError(f"a value does not fit its tag: {one_line(error)}") from None


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses what PyYAML accepts silently, or never finishes on."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = self._unfolded = 0
        self._sizes: dict[Node, int] = {}
        """Number of values below each node, including what its aliases expand to."""

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            alias: Any = self.peek_event()
            node = super().compose_node(parent, index)
            size = self._sizes.get(node) if node is not None else 0
            if size is None:
                raise _error(f"the alias *{alias.anchor:.60} is inside the value that it names", alias.start_mark)
            self._unfolded += size
            if self._unfolded > _MAX_UNFOLDED:
                raise _error(f"its aliases expand to more than {_MAX_UNFOLDED:,} values", alias.start_mark)
            return node
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise _error(f"it is nested more than {_MAX_DEPTH} levels deep", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None:
            self._sizes[node] = 1 + sum(self._sizes[each] for each in _children(node))
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, ScalarNode):
                raise _error("a list or a section cannot be a key", key_node.start_mark)
            key = "<<" if key_node.tag == _MERGE else self.construct_object(key_node, deep=True)
            if key in seen:
                raise _error(f"key {shown(key)} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: ScalarNode) -> Any:
        """Construct an integer, a float, a bool or a date."""
        kind = node.tag.rsplit(":", 1)[-1]
        if len(str(node.value)) > _MAX_NUMBER:
            raise _error(
                f"a value of {len(node.value)} characters is too long for a value of type {kind}", node.start_mark
            )
        try:
            return yaml.SafeLoader.yaml_constructors[node.tag](self, node)
        except (ValueError, LookupError, AttributeError, OverflowError):
            raise _error(f"{shown(node.value)} is not a valid {kind}", node.start_mark) from None


for _tag in ("int", "float", "bool", "timestamp"):
    _UniqueKeyLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _UniqueKeyLoader.construct_number)


def _children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [each for pair in node.value for each in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _error(problem: str, mark: Any) -> ConstructorError:
    return ConstructorError(None, None, problem, mark)
