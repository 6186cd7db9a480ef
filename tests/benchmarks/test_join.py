"""The join benchmark on a short run: real processes and sockets, equal digests, and the keys that its JSON promises."""

import json
import socket
import time

import pytest

from benchmarks import join, long_run
from benchmarks.slow_link import SlowLink
from coordinator.audit import audit


def test_a_run_made_fast_is_a_run(tmp_path):
    """Chain, steps, digests, costs and snapshots are those of a coordinator: the audit finds nothing."""
    directory = long_run.init_run(tmp_path / "run", 480, quorum=4)
    written = []
    digest = long_run.fill(directory, 320, 4, written.append)
    assert written == [320]
    manifest = directory.manifest()
    with directory.ledger(manifest, read_only=True) as ledger:
        proof = audit(manifest, directory.initial(manifest), ledger, lambda done, total: None)
        assert proof.digest == digest.hex()
        assert (proof.rounds, proof.digests_proven) == (320, 20)
        frames = list(ledger.frames())
        assert ledger.cost_since(100) == (sum(map(len, frames[100:])), 4 * 220)
        assert directory.newest(manifest, ledger)[0].round == directory.snapshots().stored()[-1].round > 0


def test_commits_end_where_a_digest_is_recorded(tmp_path):
    directory = long_run.init_run(tmp_path / "run", 480, quorum=4)
    with pytest.raises(ValueError, match="must be a multiple of 16"):
        long_run.fill(directory, 321, 4, lambda done: None)


def test_json_is_one_object_with_the_promised_keys(capsys, tmp_path):
    assert join.main(["--commits", "2000", "--quick", "--json", "--out", str(tmp_path / "out")]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["commits"] == 2000
    assert figures["digest_equal"] is True
    assert 0 < figures["bytes"] < join.TARGET_BYTES
    assert figures["seconds"] > 0
    assert figures["restart_seconds"] > 0
    newcomer, away, slow = figures["rows"]
    assert away["payload_down"] < newcomer["payload_down"]
    assert slow["seconds"] > 8 * slow["zmtp_down"] / 1_000_000  # no faster than the link
    for row in figures["rows"]:
        assert row["payload_down"] < row["zmtp_down"] <= row["kernel_down"] < 1.1 * row["zmtp_down"] + 1000
    assert json.loads((tmp_path / "out" / "join.json").read_text()) == figures
    table = (tmp_path / "out" / "join.md").read_text()
    assert table.count("| equal |") == 3


def test_a_slow_link_lets_everything_through_at_its_pace():
    sent = bytes(range(256)) * 40
    with socket.create_server(("127.0.0.1", 0)) as server, SlowLink(server.getsockname()[1], 800_000) as link:
        near = socket.create_connection(("127.0.0.1", link.port))
        far, _ = server.accept()
        begin = time.monotonic()
        with near, far:
            near.sendall(sent)
            received = b""
            while len(received) < len(sent):
                received += far.recv(65536)
        assert received == sent
        assert time.monotonic() - begin >= 0.09  # 10,240 bytes at 100,000 a second


def test_impossible_arguments_are_usage_errors():
    with pytest.raises(SystemExit, match="2"):
        join.main(["--commits", "0"])


def test_a_different_digest_is_a_failure(monkeypatch, capsys):
    row = dict.fromkeys(("payload_down", "zmtp_down", "kernel_down", "kernel_up"), 1) | {
        "what": "newcomer",
        "seconds": 1.0,
        "digest_equal": False,
    }
    found = dict.fromkeys(("commits", "nodes", "directions", "parameters", "ledger_bytes", "num_cores"), 1)
    found |= {"rows": [row], "digest_equal": False, "snapshots": [], "load_average": 0.5}
    found |= {"restarts": [1.0], "restart_seconds": 1.0, "restart_cpu_seconds": None}
    found |= dict.fromkeys(("command", "cpu", "commit"), "")
    monkeypatch.setattr(join, "measure", lambda *_: found)
    assert join.main([]) == 1
    assert "DIFFERENT" in capsys.readouterr().out
