"""The page that the benchmark of attacks writes; what it measures is measured by hand."""

from benchmarks.attacks import ATTACKS, Stopwatch, markdown
from transport.keys import new_key_pair
from transport.ticket import Ticket

ROW = {
    "what": "half-open connections",
    "number": 10_000,
    "rounds": 200,
    "median_s": 0.04,
    "p99_s": 0.06,
    "longest_s": 0.1,
    "coordinator_bytes": 180e6,
}


def test_a_row_says_how_much_slower_than_quiet():
    figures = {
        "command": "python -m benchmarks.attacks",
        "commit": "abc",
        "cores": 2,
        "cpu": "a processor",
        "nodes": 4,
        "seconds": 20.0,
        "quiet_p99_s": 0.05,
        "rows": [ROW],
    }
    row = "| 10,000 half-open connections | 200 | 40 ms | 60 ms | 1.20 | 100 ms | 180 MB |"
    assert row in markdown(figures)


def test_it_is_quiet_before_and_after_every_attack():
    keys = new_key_pair()
    ticket = Ticket("127.0.0.1", 1, bytes(16), keys.public)
    phases = Stopwatch(ticket, keys, 0, 1.0, None)._phases
    assert phases[::2] == ["quiet"] * (len(ATTACKS) + 1)
    assert phases[1::2] == list(ATTACKS)
