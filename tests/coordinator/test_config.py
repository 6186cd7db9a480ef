"""The service configuration: defaults that hold, and sentences for values that cannot."""

import msgspec
import pytest

from coordinator.config import ConfigError, ServiceConfig, parse_config, validate
from zo.toml import documented_toml


def test_the_defaults_are_valid_and_survive_their_toml():
    config = ServiceConfig()
    assert validate(config) == config
    assert parse_config(documented_toml(config, "Title.")) == config
    assert parse_config("") == config


def test_every_field_is_explained():
    lines = documented_toml(ServiceConfig(), "Title.").splitlines()
    fields = [index for index, line in enumerate(lines) if " = " in line]
    assert len(fields) == len(ServiceConfig.__struct_fields__)
    assert all(lines[index - 1].startswith("# ") for index in fields)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("host", "", "`str` of length >= 1"),
        ("port", -1, "`int` >= 0"),
        ("port", 65536, "`int` <= 65535"),
        ("quorum", 0, "`int` >= 1"),
        ("quorum", 4097, "`int` <= 4096"),
        ("patience", 0.5, "`float` >= 1.0"),
        ("patience", 1001.0, "`float` <= 1000.0"),
        ("max_wait_s", 0.0, "`float` > 0.0"),
        ("max_wait_s", float("nan"), "`float` > 0.0"),
        ("max_wait_s", 86401.0, "`float` <= 86400.0"),
        ("capacity", 0, "`int` >= 1"),
        ("capacity", 4097, "`int` <= 4096"),
        ("port", "http", "`int`, got `str`"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_field(field, value, expected):
    config = msgspec.structs.replace(ServiceConfig(), **{field: value})
    for check in (lambda: validate(config), lambda: parse_config(documented_toml(config, "Title."))):
        with pytest.raises(ConfigError) as caught:
            check()
        assert f"{field} = {value!r}: expected {expected}" in str(caught.value)


def test_what_is_no_configuration():
    with pytest.raises(ConfigError, match="not TOML"):
        parse_config("quorum = ")
    with pytest.raises(ConfigError, match=r"unknown field `quorom`; the fields are host, port, .*quorum"):
        parse_config("quorom = 2")
