"""`--set a.b=value` → a number, a word that YAML knows, a quoted text, a list or a section; else the text as it is.

YAML alone would cut `shots #2` at its hash, and read an unset shell variable as null.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml

from owlsam_ray.errors import ConfigError, shown

_KNOWN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float")}
_STRUCTURED = ("[", "{", '"', "'")
"""What lists, sections and quoted texts begin with."""
_COMMENT = re.compile(r"(^|\s)#")


def parse_override(text: str, load_yaml: Callable[[str], Any]) -> dict[str, Any]:
    """The tree that one `--set` stands for: sections down to the field.

    Args:
        text: `a.b=value`.
        load_yaml: of a YAML text, its value; raises a ValueError that says what is wrong.

    Raises:
        ConfigError: it has no key or no value, or its value is neither plain text nor valid YAML.
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
            f"--set {shown(text)}: the value is not valid YAML: {error}. A text that begins like a list, a section or "
            f"a quoted text is to be quoted: \"{name}='…'\""
        ) from None
    for part in reversed(parts):
        tree = {part: tree}
    return dict(tree)


def _value(text: str, load_yaml: Callable[[str], Any]) -> Any:
    """The value that a text stands for.

    Raises:
        ValueError: it begins like a list, a section or a quoted text, or has several lines, and is no valid YAML; or
            YAML would leave out a part of it.
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
