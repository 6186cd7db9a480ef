"""Law 4 at every write boundary: what a stop at any instant leaves on the disk is a whole ledger, and the run goes on.

A run is played once with real files. Before every SQL statement, and around every file that is put in place, the run
directory is copied as a crash would leave it, together with what the nodes know then. After that the run is played to
its end from each of these copies.
"""

import shutil
from collections import deque

import numpy as np
import pytest

import coordinator.archive
import transport.durable
from coordinator.archive import restore
from coordinator.audit import audit
from coordinator.config import ServiceConfig
from coordinator.rundir import RunDirectory
from coordinator.service import Service
from transport.messages import decode_from_coordinator, encode
from transport.session import End, Open, Session, StartOver, Transmit
from transport.sockets import Sent
from zo.replica import Replica
from zo.weights import zeros

ROUNDS = 6
NAMES = (b"a", b"b")


class Node:
    """A node's process: it may be copied, and then knows what it knew."""

    def __init__(self, key, manifest):
        self.key, self.manifest = key * 32, manifest
        self.replica = None
        self.report = None
        self.applied = []

    def copy(self):
        other = Node(self.key[:1], self.manifest)
        session = self.session.replica if hasattr(self, "session") else self.replica
        if session is not None:
            other.replica = Replica(self.manifest, session.weights.copy(), session.round, session.head)
        return other

    def connect(self, number):
        base, tokenizer = (
            bytes.fromhex(d) for d in (self.manifest.base.digest, self.manifest.base.tokenizer_digest)
        )
        saved = None if self.replica is None else (self.manifest, self.replica)
        self.session = Session(self.manifest.run_id, base, tokenizer, self.key[:1].decode(), saved)
        self.connection = self.key[:1] + bytes([number])
        self.up, self.end = deque(), None
        self.carry_out(self.session.on_link_up())

    def carry_out(self, effects):
        for effect in effects:
            match effect:
                case Transmit(message):
                    self.up.append(encode(message))
                case Open() if self.session.replica is None:
                    self.carry_out(self.session.opened(Replica(self.manifest, zeros(500)), 0.0))
                case StartOver(reason):
                    pytest.fail(reason)
                case End():
                    self.end = effect

    def probe(self):
        wanted = self.session.next_probe()
        if wanted is not None:
            rng = np.random.default_rng([wanted[0], self.key[0]])
            codes = rng.integers(-60, 60, 2).astype(np.int8)
            self.carry_out(self.session.on_probed(wanted[0], codes, 1.0, 0.0))


class Ends:
    """The coordinator's socket: frames go straight to the nodes."""

    def __init__(self, nodes):
        self.nodes = nodes

    def send(self, session, frame):
        for node in self.nodes:
            if node.connection == session:
                node.carry_out(node.session.on_message(decode_from_coordinator(frame), 0.0))
                return Sent.OK
        return Sent.GONE


def play(path, manifest, nodes, watch=lambda ledger: None):
    """Serve a run directory until the run is over and everyone has left."""
    directory = RunDirectory(path)
    with directory.lock(), directory.ledger(manifest) as ledger, directory.keyring() as keyring:
        for node in nodes:
            keyring.allow(node.key)
            if node.replica is not None:  # law 4: whatever a node has seen is in the ledger
                assert node.replica.round <= ledger.num_commits()
                assert node.replica.head == ledger.head_after(node.replica.round)
        restored = restore(directory, manifest, ledger, lambda done, total: None)
        watch(ledger)
        service = Service(
            directory, manifest, ServiceConfig(quorum=2), ledger, [restored], Ends(nodes), keyring
        )
        for number, node in enumerate(nodes):
            node.connect(number)
        for _ in range(200):
            for node in nodes:
                while node.up:
                    service._handle(node.connection, node.key, node.up.popleft())
                node.probe()
            service._carry_out(service.conductors.on_tick(0.0))
            service._save_status()
            service._save_snapshots_if_due()
            if all(node.end for node in nodes):
                break
        service._stop(lambda status, reason: None)
        service.close()
        assert all(node.end for node in nodes), [node.session.stage for node in nodes]
        return audit(manifest, directory.initial(manifest), ledger, lambda done, total: None)


@pytest.mark.parametrize("pipeline", [0, 1])
def test_a_stop_at_any_write_boundary_loses_nothing_and_repeats_nothing(
    make_manifest, tmp_path, monkeypatch, pipeline
):
    manifest = make_manifest(size=500, rounds=ROUNDS, digest_every=2, pipeline=pipeline)
    RunDirectory(tmp_path / "run").create(manifest, ServiceConfig(quorum=2), Replica(manifest, zeros(500)))
    monkeypatch.setattr(coordinator.archive, "is_due", lambda num_bytes, tail_bytes, *_: tail_bytes > 60)
    nodes = [Node(name, manifest) for name in NAMES]
    images = []

    def take_image(what):
        path = tmp_path / f"image-{len(images)}"
        shutil.copytree(tmp_path / "run", path)
        images.append((what, path, [node.copy() for node in nodes]))

    replace = transport.durable.os.replace

    def watched_replace(source, target):
        take_image(f"before the file {target.name}")
        replace(source, target)
        take_image(f"after the file {target.name}")

    monkeypatch.setattr(transport.durable.os, "replace", watched_replace)

    def watch(ledger):
        def before(statement):
            if not statement.lstrip().upper().startswith("SELECT"):
                take_image(statement)

        ledger._db.set_trace_callback(before)

    truth = play(tmp_path / "run", manifest, nodes, watch)
    monkeypatch.setattr(transport.durable.os, "replace", replace)
    whats = " ".join(what for what, _, _ in images)
    for part in (
        "BEGIN",
        "COMMIT",
        "commits",
        "checkpoints",
        "members",
        "events",
        "status",
        "before the file",
    ):
        assert part in whats, part
    assert len(images) > 50
    for what, path, known in images:
        proof = play(path, manifest, known)
        # The codes are a function of node and round, and everyone reports: there is only one truth.
        assert (proof.rounds, proof.head, proof.digest) == (truth.rounds, truth.head, truth.digest), what
        for node in known:
            assert node.session.replica.digest().hex() == truth.digest, what
        shutil.rmtree(path)
