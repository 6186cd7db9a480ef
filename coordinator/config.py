"""How this coordinator is operated: what may change between two `serve`s of one run, unlike the manifest."""

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from transport.messages import MAX_COORDINATOR_FRAME_BYTES
from transport.ticket import DEFAULT_PORT
from zo.manifest import Manifest
from zo.packing import most_bytes
from zo.toml import explain

_BYTES_PER_NODE: Final = 10
"""Of a participant's number, twice: it may be late."""
_BYTES_BESIDE: Final = 256


class ConfigError(ValueError):
    """A service configuration that cannot be right."""


class ServiceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fields of coordinator.toml."""

    host: Annotated[
        str, Meta(min_length=1, description='Address to listen on; "*" for all. Command line: --host.')
    ] = "*"
    port: Annotated[
        int, Meta(ge=0, le=65535, description="TCP port; 0 lets the system choose one. Command line: --port.")
    ] = DEFAULT_PORT
    advertise: Annotated[
        str,
        Meta(
            description="Host name or address to print in the ticket, where nodes see another than this machine does "
            "(behind NAT, in a container). Empty: found out."
        ),
    ] = ""
    quorum: Annotated[int, Meta(ge=1, le=4096, description="Least number of reports that make a round.")] = 1
    patience: Annotated[
        float,
        Meta(
            ge=1,
            le=1000,
            description="A round waits for a node that is up to this many times slower than the typical one. "
            "Reports of slower nodes count when they come in time, but nobody waits for them.",
        ),
    ] = 4.0
    max_wait_s: Annotated[
        float,
        Meta(
            gt=0,
            le=86400,
            description="Longest wait for a missing report once a quorum has come, in seconds.",
        ),
    ] = 60.0
    max_share: Annotated[
        float,
        Meta(
            ge=1,
            le=1000,
            description="No node's codes in a round may be longer, in the Euclidean norm, than this many times those "
            "of the median participant; longer ones are scaled down to it. 1000: as good as no cap.",
        ),
    ] = 2.0
    audit_every: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="Rounds between two public audits on average, at random, where the manifest has rows for them; "
            "0: none.",
        ),
    ] = 16
    quarantine_out_of_line: Annotated[
        bool,
        Meta(
            description="Shut out a node whose codes are statistically out of line (of one sign, at the limit, or no "
            "votes), or whose answers to public audits are far from the others', until `zo-coordinator release`. "
            "False: only say so."
        ),
    ] = False
    capacity: Annotated[int, Meta(ge=1, le=4096, description="Most nodes that may ever join this run.")] = (
        1024
    )


def parse_config(text: str) -> ServiceConfig:
    """The configuration written as TOML.

    Raises:
        ConfigError: not TOML, a field unknown or out of range; the message names it.
    """
    try:
        return msgspec.toml.decode(text, type=ServiceConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(explain(error, msgspec.toml.decode(text), ServiceConfig)) from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"not TOML: {error}") from error


def validate(config: ServiceConfig) -> ServiceConfig:
    """The same configuration, its ranges checked.

    Raises:
        ConfigError: a field is out of range; the message names it.
    """
    plain = msgspec.to_builtins(config)
    try:
        return msgspec.convert(plain, ServiceConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(explain(error, plain, ServiceConfig)) from error


def check_capacity(config: ServiceConfig, manifest: Manifest) -> None:
    """Check that a quorum can come together, and that a commit of everyone is not larger than nodes accept.

    Raises:
        ConfigError: it cannot, or it is; the message says what would do.
    """
    if config.quorum > config.capacity:
        raise ConfigError(
            f"quorum = {config.quorum} and capacity = {config.capacity}: no round would ever have so many nodes; "
            "lower the quorum, or raise the capacity"
        )
    if manifest.directions.are_combined:
        return  # a commit does not grow with the nodes, and one of all groups is far from that
    per_node = most_bytes(manifest.samples_per_round, manifest.codes.bits) + _BYTES_PER_NODE
    most = (MAX_COORDINATOR_FRAME_BYTES - _BYTES_BESIDE) // per_node
    if config.capacity > most:
        raise ConfigError(
            f"capacity = {config.capacity}: a commit of so many nodes with {manifest.samples_per_round} directions "
            f"each is larger than the {MAX_COORDINATOR_FRAME_BYTES:,} bytes that a node accepts; choose at most {most}"
        )
