"""TOML with every field documented, from a struct whose fields carry their own descriptions and ranges.

msgspec reads TOML; this writes the other way, so that a file a person opens explains itself and cannot disagree with
the code that checks it.
"""

import textwrap
from typing import Any, get_args, get_type_hints

import msgspec
from msgspec import Meta


def _description(hint: Any) -> str:
    return next((a.description for a in get_args(hint) if isinstance(a, Meta) and a.description), "")


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    # TOML's basic strings escape like JSON's.
    return msgspec.json.encode(value).decode()


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
