"""Parse `--set a.b=value`: the value is a number, a YAML keyword, quoted text, a list or section, or plain text.

Plain YAML would cut `shots #2` at the hash, and read an unset shell variable as null.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml

from owlsam_ray.errors import ConfigError, shown

_KNOWN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")}
_STRUCTURED = ("[", "{", '"', "'")
"""Prefixes of lists, sections and quoted text."""
_COMMENT = re.compile(r"(^|\s)#")


def parse_override(text: str, load_yaml: Callable[[str], Any]) -> dict[str, Any]:
    """The tree that one `--set` describes: sections down to the field.

    Args:
        text: `a.b=value`.
        load_yaml: returns the value of a YAML text; raises a ValueError that says what is wrong.

    Raises:
        ConfigError: the key or the value is missing, or the value is neither plain text nor valid YAML.
    """
    key, separator, value = text.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {shown(text)} is not of the form section.field=value")
    name = shown(key.strip())[1:-1]
    if not value.strip():
        raise ConfigError(
            f"--set {name}= has no value (an unset shell variable?): write {name}=null for the default, "
            f"\"{name}=''\" for an empty text, or leave it out"
        )
    try:
        tree = _value(value, load_yaml)
    except ValueError as error:
        raise ConfigError(
            f"--set {shown(text)}: the value is not valid YAML: {error}. Quote a text that begins like a list, a "
            f"section or a quoted text: \"{name}='…'\""
        ) from None
    for part in reversed(parts):
        tree = {part: tree}
    return dict(tree)


def _value(text: str, load_yaml: Callable[[str], Any]) -> Any:
    """Parse the text of a value.

    Raises:
        ValueError: the text begins like a list, a section or quoted text, or has several lines, and is not valid YAML;
            or YAML would drop a part of it.
    """
    bare = text.strip()
    if bare.startswith(_STRUCTURED) or "\n" in bare:
        tree = load_yaml(bare)
        node = yaml.compose(bare, Loader=yaml.SafeLoader)
        behind = bare[node.end_mark.index :] if node is not None else bare
        if behind.strip() or ("\n" in bare and _COMMENT.search(bare)):
            raise ValueError("a # begins a comment there, and what follows would be lost")
        return tree
    known = any(
        tag in _KNOWN and pattern.match(bare)
        for tag, pattern in yaml.SafeLoader.yaml_implicit_resolvers.get(bare[0], [])
    )
    return load_yaml(bare) if known else text
