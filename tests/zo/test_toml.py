"""Documented TOML, and the sentences made from what msgspec finds wrong."""

import tomllib
from typing import Annotated, Literal

import msgspec
import pytest
from msgspec import Meta

from zo.toml import documented_toml, explain


class Inner(msgspec.Struct, frozen=True):
    """The inside. Its second sentence is not shown."""

    ratios: Annotated[tuple[float, ...], Meta(description="Some ratios.")] = (0.5, 1e-05)
    mode: Annotated[Literal["fast", "slow"], Meta(description="How it goes.")] = "fast"


class Outer(msgspec.Struct, frozen=True):
    """The outside."""

    inner: Inner = Inner()
    text: Annotated[
        str, Meta(description="Any text at all, " + "explained at length " * 8 + "to the end.")
    ] = 'say "hello",\n\t\\ \x00 \x7f é 🐝'
    on: Annotated[bool, Meta(description="Whether it is on.")] = True
    bare: int = 3


def test_a_struct_as_documented_toml():
    lines = documented_toml(Outer(text="x"), "What this file is.", width=40).splitlines()
    assert lines[:2] == ["# What this file is.", ""]
    assert lines[-7:] == [
        "",
        "# The inside. Its second sentence is not shown.",
        "[inner]",
        "# Some ratios.",
        "ratios = [0.5, 1e-05]",
        "# How it goes.",
        'mode = "fast"',
    ]
    assert "on = true" in lines
    # a field of the outside stands before the first table, or TOML would count it to the table
    assert lines.index("bare = 3") < lines.index("[inner]")
    assert all(len(line) <= 42 for line in lines if line.startswith("#") and "inside" not in line)


def test_toml_reads_back_what_was_written_control_characters_and_all():
    text = documented_toml(Outer(), "Title.")
    assert tomllib.loads(text)["text"] == Outer().text
    assert msgspec.toml.decode(text, type=Outer) == Outer()


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        ({"inner": {"mode": "quick"}}, "inner.mode = 'quick': expected 'fast' or 'slow'. How it goes."),
        (
            {"inner": {"ratios": [0.5, "x"]}},
            "inner.ratios[1] = 'x': expected `float`, got `str`. Some ratios.",
        ),
        ({"bare": 1.5}, "bare = 1.5: expected `int`, got `float`"),
        ({"inner": 3}, "inner = 3: expected `object`, got `int`"),
        ([], "Expected `object`, got `array`"),
    ],
)
def test_explain_names_field_value_and_what_would_be_right(plain, expected):
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(plain, Outer)
    assert explain(caught.value, plain, Outer) == expected


def test_explain_survives_a_place_that_is_not_in_the_value():
    error = msgspec.ValidationError("Something - at `$.inner.mode`")
    assert explain(error, {}, Outer) == "inner.mode: Something"
