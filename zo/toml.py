"""TOML with every field documented, from a struct whose fields carry their own descriptions and ranges.

msgspec reads TOML; this writes the other way, so that a file a person opens explains itself and cannot disagree with
the code that checks it. It also turns what msgspec finds wrong into a sentence with the field, its value, and what
would be right.
"""

import re
import textwrap
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

# How msgspec ends a message: where in the value it found something wrong.
_PLACE: Final = re.compile(r" - at `\$([^`]*)`$")


def _description(hint: Any) -> str:
    return next((a.description for a in get_args(hint) if isinstance(a, Meta) and a.description), "")


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    # TOML's basic strings escape like JSON's, and the one character more that JSON lets pass.
    return msgspec.json.encode(value).decode().replace("\x7f", "\\u007f")


def documented_toml(value: msgspec.Struct, title: str, width: int = 100) -> str:
    """`value` as TOML text: one table for each nested struct, each field under a comment that explains it."""
    lines = [*(f"# {line}" for line in textwrap.wrap(title, width)), ""]

    def fields(struct: msgspec.Struct) -> None:
        hints = get_type_hints(type(struct), include_extras=True)
        plain = [n for n in struct.__struct_fields__ if not isinstance(getattr(struct, n), msgspec.Struct)]
        for name in plain:
            lines.extend(f"# {line}" for line in textwrap.wrap(_description(hints[name]), width))
            lines.append(f"{name} = {_literal(getattr(struct, name))}")
        for name in struct.__struct_fields__:
            nested = getattr(struct, name)
            if isinstance(nested, msgspec.Struct):
                summary = (type(nested).__doc__ or "").strip().splitlines()[0]
                lines.extend(["", f"# {summary}", f"[{name}]"])
                fields(nested)

    fields(value)
    return "\n".join(lines) + "\n"


def explain(error: msgspec.ValidationError, value: Any, kind: type[msgspec.Struct]) -> str:
    """What msgspec found wrong, in one line: the field, its value, what would be right, what the field is.

    Args:
        error: what msgspec raised.
        value: what was decoded, as plain dicts, lists and scalars.
        kind: the struct that it should have become.
    """
    place = _PLACE.search(str(error))
    what = _PLACE.sub("", str(error))
    path = place.group(1).lstrip(".") if place else ""
    hint: Any = kind
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", path):
        try:
            value = value[int(index)] if index else value[name]
        except (KeyError, IndexError, TypeError):
            return f"{path}: {what}"
        if name:
            hint = get_type_hints(_bare(hint), include_extras=True)[name]
    bare = _bare(hint)
    if what.startswith("Object contains unknown field"):
        what += f"; the fields are {', '.join(bare.__struct_fields__)}"
    if what.startswith("Invalid enum value") and get_origin(bare) is Literal:
        what = f"expected {' or '.join(repr(choice) for choice in get_args(bare))}"
    if not path or isinstance(value, dict):
        return f"{path}: {what}" if path else what
    description = _description(hint)
    return f"{path} = {value!r}: {what[0].lower()}{what[1:]}" + (f". {description}" if description else "")


def _bare(hint: Any) -> Any:
    """A type without its annotations."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint
