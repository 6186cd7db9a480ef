"""Catching up: which way is quicker, and a download that goes on where it stopped."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.catchup import PIECES_AHEAD, Download, Way, choose
from transport.messages import PIECE_BYTES, Offer
from zo.snapshot import content_address

OFFER = Offer(
    content=bytes(16),
    round=900,
    num_bytes=100_000,
    tail_bytes=10_000,
    tail_codes=400,
    replay_bytes=100_000,
    replay_codes=4_000,
    can_replay=True,
)
FAST = 1e30


def offer(**change):
    return msgspec.structs.replace(OFFER, **change)


# ---- which way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replay_bytes", "way"), [(109_999, Way.REPLAY), (110_000, Way.REPLAY), (110_001, Way.SNAPSHOT)]
)
def test_with_a_fast_kernel_the_bytes_decide_and_replay_wins_a_tie(replay_bytes, way):
    assert choose(offer(replay_bytes=replay_bytes), 0, 1000, 1000.0, FAST)[0] is way


@pytest.mark.parametrize(("replay_codes", "way"), [(399, Way.REPLAY), (400, Way.REPLAY), (401, Way.SNAPSHOT)])
def test_with_a_fast_link_the_work_decides(replay_codes, way):
    assert choose(offer(replay_codes=replay_codes), 0, 1000, FAST, 1e6)[0] is way


def test_bytes_and_work_are_weighed_in_seconds():
    # 10,000 bytes more at 1,000 B/s are 10 s; 3,600 codes of 1,000 parameters at 360,000 a second are 10 s
    assert choose(OFFER, 0, 1000, 1000.0, 360_000.0)[0] is Way.REPLAY
    assert choose(OFFER, 0, 1000, 1000.0, 359_000.0)[0] is Way.SNAPSHOT
    assert choose(OFFER, 0, 1000, 1001.0, 360_000.0)[0] is Way.SNAPSHOT


def test_what_is_here_already_need_not_be_fetched():
    assert choose(OFFER, 0, 1000, 1000.0, FAST)[0] is Way.REPLAY
    assert choose(OFFER, 10_001, 1000, 1000.0, FAST)[0] is Way.SNAPSHOT


def test_past_a_revert_only_a_snapshot_leads_on():
    way, reason = choose(offer(can_replay=False, replay_bytes=1), 0, 1000, 1000.0, FAST)
    assert way is Way.SNAPSHOT
    assert reason == "the ledger takes rounds back, which takes a snapshot"


def test_the_reason_has_both_costs():
    _, reason = choose(OFFER, 0, 1000, 1000.0, 1e6)
    assert reason == "replay 100,000 B, 104.0 s; snapshot and tail 110,000 B, 110.4 s; link 1,000 B/s"


# ---- the download -------------------------------------------------------------------------------------------------

DATA = bytes(i * 7 % 251 for i in range(10 * PIECE_BYTES + 123))
CONTENT = content_address(DATA)


def piece(offset):
    return offset, len(DATA), DATA[offset : offset + PIECE_BYTES]


def fetched(download):
    """Everything that a coordinator answers, in order, until nothing more is asked for; the number of requests."""
    requests = list(download.wanted())
    for offset in requests:
        download.add(*piece(offset))
        requests += download.wanted()
    return len(requests)


def test_a_download_asks_for_one_piece_then_for_a_few_ahead():
    download = Download(CONTENT)
    assert download.wanted() == [0]
    assert download.wanted() == []
    assert download.add(*piece(0)) == DATA[:PIECE_BYTES]
    assert download.wanted() == [PIECE_BYTES * n for n in range(1, 1 + PIECES_AHEAD)]
    download.add(*piece(PIECE_BYTES))
    assert download.wanted() == [PIECE_BYTES * (1 + PIECES_AHEAD)]


def test_a_download_asks_for_each_piece_once_and_then_is_complete():
    download = Download(CONTENT)
    assert fetched(download) == 11
    assert download.is_complete
    assert download.is_intact
    assert bytes(download.data) == DATA


@given(st.integers(0, len(DATA)))
def test_a_download_goes_on_after_any_byte(kept):
    download = Download(CONTENT, DATA[:kept])
    assert fetched(download) <= 1 + (len(DATA) - kept) // PIECE_BYTES + 1
    assert download.is_complete
    assert download.is_intact


@given(st.integers(1, 10))
def test_requests_that_a_broken_connection_took_with_it_are_made_again(answered):
    download = Download(CONTENT)
    requests = list(download.wanted())
    for number in range(answered):
        download.add(*piece(requests[number]))
        requests += download.wanted()
    download.rewind()
    assert download.wanted()[0] == len(download.data) == answered * PIECE_BYTES
    download.rewind()
    fetched(download)
    assert download.is_intact


def test_pieces_that_do_not_come_next_are_not_taken():
    download = Download(CONTENT)
    assert download.add(*piece(PIECE_BYTES)) == b""
    assert download.add(*piece(0)) == DATA[:PIECE_BYTES]
    assert download.add(*piece(0)) == b""  # once more
    assert bytes(download.data) == DATA[:PIECE_BYTES]


@given(st.lists(st.integers(1, 2 * PIECE_BYTES), min_size=1, max_size=50))
def test_pieces_of_any_size_lead_to_the_end(sizes):
    """As of a coordinator of another version, whose pieces are smaller or larger."""
    download = Download(CONTENT)
    requests = list(download.wanted())
    for number in range(4000):
        if number == len(requests):
            break
        offset = requests[number]
        download.add(offset, len(DATA), DATA[offset : offset + sizes[number % len(sizes)] + 5000])
        requests += download.wanted()
    assert download.is_complete
    assert download.is_intact


def test_no_more_is_taken_than_there_is():
    download = Download(content_address(b"abc"))
    assert download.add(0, 3, b"abcdef") == b"abc"
    assert download.is_complete
    assert download.is_intact


def test_an_empty_or_damaged_download_is_not_intact():
    download = Download(CONTENT)
    assert not download.is_complete
    assert not download.is_intact
    damaged = Download(CONTENT, b"x" + DATA[1:PIECE_BYTES])
    fetched(damaged)
    assert damaged.is_complete
    assert not damaged.is_intact


def test_more_on_disk_than_there_is_counts_as_complete_and_damaged():
    download = Download(CONTENT, DATA + b"and more")
    (offset,) = download.wanted()
    assert download.add(*piece(offset)) == b""
    assert download.is_complete
    assert not download.is_intact
