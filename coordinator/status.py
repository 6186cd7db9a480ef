"""What a run tells about itself: the type behind `status --json`, stored in the ledger once a second."""

from typing import Final

import msgspec

from coordinator.ledger import Ledger
from zo.manifest import Manifest

_ALERTS_SHOWN: Final = 6


class MemberStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One node."""

    node: int
    name: str
    key: str
    """Its public key, hexadecimal."""
    presence: str
    round: int
    """Commits it is known to have applied in this session."""
    digest_round: int | None
    digest: str | None
    """The last digest it reported, and of which round."""
    loss: float | None
    """The recent mean loss it reported, if the manifest has nodes share it."""
    latency_s: float | None
    quarantined: bool
    """Whether it is refused until `zo-coordinator release`."""
    divergences: int
    """How often its digest differed from the ledger's."""
    messages_up: int
    payload_bytes_up: int
    zmtp_bytes_up: int
    messages_down: int
    payload_bytes_down: int
    zmtp_bytes_down: int


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """One run. "Up" is from nodes to the coordinator. Counts go on over restarts of the coordinator."""

    run: str
    name: str
    serving: bool
    """Whether a coordinator said so at `updated_at`."""
    round: int
    """Commits in the ledger."""
    rounds: int
    digest: str
    """Digest of the weights after `digest_round` commits."""
    digest_round: int
    live: int
    members: list[MemberStatus]
    payload_bytes_up: int
    payload_bytes_down: int
    zmtp_bytes_up: int
    zmtp_bytes_down: int
    loss: float | None
    """Mean of the losses that members reported last."""
    rounds_per_s: float
    malformed_frames: int
    updated_at: float
    """Seconds since the epoch."""
    alerts: list[str] = []
    """The newest events about nodes whose weights differed: which, at which round, and the first wrong one."""


def stored_status(ledger: Ledger) -> Status | None:
    """The newest status that a coordinator wrote; None if none did, or one of another version in another form."""
    stored = ledger.status()
    try:
        return None if stored is None else msgspec.json.decode(stored, type=Status)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def read_status(manifest: Manifest, ledger: Ledger) -> Status:
    """The newest status in a ledger; for a run that was never served, what its files say.

    Raises:
        LedgerError: the ledger is damaged.
    """
    alerts = [f"round {event.round}: {event.text}" for event in ledger.alerts(_ALERTS_SHOWN)]
    status = stored_status(ledger)
    if status is not None:
        return msgspec.structs.replace(status, round=ledger.num_commits(), alerts=alerts)
    checkpoint = ledger.last_checkpoint()
    return Status(
        run=manifest.run_id.hex(),
        name=manifest.run.name,
        serving=False,
        round=ledger.num_commits(),
        rounds=manifest.run.rounds,
        digest=checkpoint.digest.hex() if checkpoint else "",
        digest_round=checkpoint.round if checkpoint else 0,
        live=0,
        members=[],
        payload_bytes_up=0,
        payload_bytes_down=0,
        zmtp_bytes_up=0,
        zmtp_bytes_down=0,
        loss=None,
        rounds_per_s=0.0,
        malformed_frames=0,
        updated_at=0.0,
        alerts=alerts,
    )
