"""The commands of `zo-coordinator` about who may join: invite, allow, revoke, members. They work while it serves."""

import secrets
import sys
import time
from typing import Annotated, Final

import msgspec
import typer
from rich.table import Table

from coordinator.cli_app import JsonOption, RunArgument, app, epilog, err, failures_explained, out
from coordinator.config import ServiceConfig
from coordinator.display import duration, plain
from coordinator.invitations import InvitationError, KeyState, parse_duration
from coordinator.keyring import Keyring
from coordinator.rundir import RunDirectory
from transport.keys import invitation_keys, standing_token
from transport.ticket import TOKEN_BYTES, Ticket, reachable_host
from zo.manifest import Manifest

_MOST: Final = 2**31 - 1
"""Uses or invitations: more than any run has, and no more than SQLite counts."""
AgentsOption = Annotated[
    str | None,
    typer.Option("--agents", metavar="N,N", help="The agents that it may train, as 1,3.", show_default="all"),
]


class MemberRecord(msgspec.Struct, frozen=True):
    """One line of `members`: a key that may join, or might once."""

    node: int | None
    """Its number; None if it has not joined yet."""
    name: str
    key: str
    """Public, hexadecimal."""
    state: str
    since: float
    """Seconds since the epoch."""
    invitation: int | None
    """Number of the one that let it in; None if a person named the key."""
    agents: list[int] | None
    """Those that it may train; None for all."""


class InvitationRecord(msgspec.Struct, frozen=True):
    """One line of `members`: an invitation that is open."""

    number: int
    uses_left: int | None
    expires_at: float | None
    agents: list[int] | None


class Members(msgspec.Struct, frozen=True):
    """What `members --json` prints."""

    keys: list[MemberRecord]
    invitations: list[InvitationRecord]


@app.command(
    short_help="Make a ticket for a new node.", epilog=epilog("zo-coordinator invite my-run --expires 2d")
)
def invite(
    run: RunArgument,
    uses: Annotated[int, typer.Option(metavar="N", min=1, max=_MOST, help="How many nodes it lets in.")] = 1,
    expires: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="After 90s, 30m, 12h, 2d or 1w.", show_default="never"),
    ] = None,
    agents: AgentsOption = None,
) -> None:
    """Print a ticket that lets new nodes in. Its token is shown once, and kept nowhere.

    The run may be served meanwhile; the ticket works at once.
    """
    with failures_explained():
        directory = RunDirectory(run)
        manifest = directory.manifest()
        allowed = _agents(agents, manifest)
        lasts_s = None if expires is None else parse_duration(expires)
        keys = directory.keys()
        token = secrets.token_bytes(TOKEN_BYTES)
        with directory.keyring() as keyring:
            host, port = keyring.address() or _configured(directory.config())
            expires_at = None if lasts_s is None else time.time() + lasts_s
            made = keyring.invite(invitation_keys(token).public, uses, expires_at, allowed)
        print(Ticket(host, port, manifest.run_id, keys.public, token), flush=True)
        until = "" if lasts_s is None else f", for {duration(lasts_s)}"
        err.print(f"invitation {made.number}: lets {_nodes(uses)} in{until}", style="dim", highlight=False)


@app.command(short_help="Let a key in.", epilog=epilog("zo-coordinator allow my-run 52fdfc07…"))
def allow(
    run: RunArgument,
    key: Annotated[
        str,
        typer.Argument(metavar="KEY", help="A node's public key: 64 hexadecimal digits.", show_default=False),
    ],
    agents: AgentsOption = None,
) -> None:
    """Let a node in by its public key, without a token; also one that was revoked."""
    with failures_explained():
        directory = RunDirectory(run)
        allowed = _agents(agents, directory.manifest())
        public = _key(key)
        with directory.keyring() as keyring:
            if keyring.standing(public).invitation is not None:
                raise InvitationError("this is the key of an invitation, not of a node")
            if keyring.standing(public).state is KeyState.REPLACED:
                raise InvitationError("this key was rotated out: its node has another; `members` lists it")
            keyring.allow(public, allowed)
        out.print(f"{key} may join", highlight=False, soft_wrap=True)


@app.command(short_help="Shut a node out.", epilog=epilog("zo-coordinator revoke my-run 3"))
def revoke(
    run: RunArgument,
    node: Annotated[
        str | None,
        typer.Argument(metavar="NODE", help="A node's number, or its public key.", show_default=False),
    ] = None,
    invitation: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, max=_MOST, help="Close this invitation, from `members`.", show_default=False
        ),
    ] = None,
) -> None:
    """Shut a node out, or close an invitation. A run that is served does so within a second.

    What the node did stays in the ledger; `retract` takes it back.
    """
    with failures_explained():
        if (node is None) == (invitation is None):
            raise InvitationError("name a NODE, or an invitation with --invitation")
        directory = RunDirectory(run)
        with directory.keyring() as keyring:
            if invitation is not None:
                if not keyring.withdraw(invitation):
                    raise InvitationError(f"there is no invitation {invitation}; `members` lists them")
                out.print(f"invitation {invitation} is closed", highlight=False)
                return
            assert node is not None
            identity = _identity(node, directory, keyring)
            if keyring.is_revoked(identity):
                raise InvitationError(f"{node} may not join as it is")
            keyring.revoke(identity)
            out.print(f"{node} may join no more", highlight=False, soft_wrap=True)
            standing = invitation_keys(standing_token(directory.keys().secret)).public
            if keyring.lets_in(standing, time.time()):
                number = keyring.standing(standing).invitation
                assert number is not None
                err.print(
                    "note: whoever has the ticket that serve prints may come with a new key; "
                    f"`zo-coordinator revoke {run} --invitation {number.number}` closes it",
                    style="yellow",
                    highlight=False,
                    soft_wrap=True,
                )


@app.command(short_help="List who may join.", epilog=epilog("zo-coordinator members my-run"))
def members(run: RunArgument, json: JsonOption = False) -> None:
    """List the keys that may join or might once, and the invitations that are open."""
    with failures_explained():
        directory = RunDirectory(run)
        with (
            directory.ledger(directory.manifest(), read_only=True) as ledger,
            directory.keyring(read_only=True) as keyring,
        ):
            enrolled = {each.key: each for each in ledger.nodes()}
            now = time.time()
            found = Members(
                [
                    MemberRecord(
                        node=enrolled[record.identity].node if record.identity in enrolled else None,
                        name=enrolled[record.identity].name if record.identity in enrolled else "",
                        key=record.key.hex(),
                        state=record.state.value,
                        since=record.since,
                        invitation=record.invitation,
                        agents=None if record.agents is None else sorted(record.agents),
                    )
                    for record in keyring.records()
                ],
                [
                    InvitationRecord(
                        each.number,
                        each.uses_left,
                        each.expires_at,
                        None if each.agents is None else sorted(each.agents),
                    )
                    for each in keyring.invitations()
                    if each.is_open(now)
                ],
            )
        if json:
            sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
        else:
            _show(found, now)


def _show(found: Members, now: float) -> None:
    if found.keys:
        table = Table("node", "name", "state", "let in by", "agents", "key", box=None, pad_edge=False)
        for each in found.keys:
            how = "a person" if each.invitation is None else f"invitation {each.invitation}"
            number = "" if each.node is None else str(each.node)
            table.add_row(number, plain(each.name), each.state, how, _shown(each.agents), each.key)
        out.print(table, highlight=False, soft_wrap=True)
    else:
        out.print("nobody may join yet", highlight=False)
    for invitation in found.invitations:
        uses = "any number of nodes" if invitation.uses_left is None else _nodes(invitation.uses_left)
        at = invitation.expires_at
        until = "" if at is None else f", for another {duration(at - now)}"
        whom = "" if invitation.agents is None else f", for the agents {_shown(invitation.agents)}"
        out.print(f"invitation {invitation.number}: lets {uses} in{whom}{until}", highlight=False)


def _shown(agents: list[int] | None) -> str:
    return "all" if agents is None else ",".join(map(str, agents))


def _nodes(number: int) -> str:
    return "one node" if number == 1 else f"{number} nodes"


def _configured(config: ServiceConfig) -> tuple[str, int]:
    """Where a run that was never served will be."""
    if config.port == 0:
        raise InvitationError("port = 0 in coordinator.toml: serve the run once, so that its port is known")
    return config.advertise or reachable_host(config.host), config.port


def _agents(text: str | None, manifest: Manifest) -> frozenset[int] | None:
    if text is None:
        return None
    if manifest.agents.assignment != "by-node":
        raise InvitationError("in this run every node trains every agent: leave --agents out")
    parts = [part.strip() for part in text.split(",")]
    last = manifest.agents.count - 1
    if not all(part.isascii() and part.isdecimal() and int(part) <= last for part in parts):
        raise InvitationError(f"--agents takes numbers from 0 to {last} with commas between, got {text!r}")
    return frozenset(map(int, parts))


def _key(text: str) -> bytes:
    try:
        public = bytes.fromhex(text)
    except ValueError:
        public = b""
    if len(public) != 32 or len(text) != 64:
        raise InvitationError(
            f"a public key has 64 hexadecimal digits, got {len(text)} characters: {text[:70]!r}"
        )
    return public


def _identity(text: str, directory: RunDirectory, keyring: Keyring) -> bytes:
    """The identity of a node, from its number or any of its keys."""
    if text.isascii() and text.isdecimal() and len(text) < 10:
        with directory.ledger(directory.manifest(), read_only=True) as ledger:
            for each in ledger.nodes():
                if each.node == int(text):
                    return each.key
        raise InvitationError(f"there is no node {text}; `members` lists them")
    identity = keyring.standing(_key(text)).identity
    if not identity:
        raise InvitationError(f"the key {text} was never let in; `members` lists those that were")
    return identity
