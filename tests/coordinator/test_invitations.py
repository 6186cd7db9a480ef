"""Who may have a key admitted."""

import pytest

from coordinator.invitations import (
    NOBODY,
    Invitation,
    KeyState,
    Standing,
    outsider,
    parse_duration,
    redemption,
    rotation,
)

OPEN = Invitation(number=1, uses_left=1, expires_at=100.0)
MEMBER = Standing(KeyState.ADMITTED, b"me")


def ask(invitation=OPEN, said_run=b"run", of_new_key=NOBODY, num_admitted=3, capacity=4, now=99.0):
    standing = Standing(invitation=invitation)
    return redemption(standing, said_run, b"run", of_new_key, num_admitted, capacity, now)


@pytest.mark.parametrize(
    "invitation", [OPEN, Invitation(1, None, 100.0), Invitation(1, 1, None), Invitation(1, None, None)]
)
def test_an_open_invitation_lets_a_key_in(invitation):
    assert ask(invitation) is None
    assert invitation.is_open(99.0)


@pytest.mark.attack
@pytest.mark.parametrize(
    ("change", "cause", "reason"),
    [
        ({"invitation": None}, "invitation", "not that of an invitation"),
        ({"said_run": b"other"}, "run", "the ticket is for run 6f74686572"),
        ({"now": 100.0}, "invitation", "has expired"),
        ({"invitation": Invitation(1, 0, None)}, "invitation", "used up or was withdrawn"),
        ({"num_admitted": 4}, "full", "4 keys may join this run, its capacity is 4"),
        ({"of_new_key": Standing(KeyState.REVOKED, b"me")}, "revoked", "was revoked"),
        ({"of_new_key": Standing(KeyState.REPLACED, b"me")}, "revoked", "rotated out"),
        ({"of_new_key": Standing(invitation=OPEN)}, "invitation", "may join only by"),
    ],
)
def test_why_a_key_is_not_let_in(change, cause, reason):
    refused = ask(**change)
    assert refused.cause == cause
    assert reason in refused.reason


def test_a_key_that_is_in_costs_no_use_whatever_became_of_the_invitation():
    assert ask(Invitation(1, 0, 1.0), of_new_key=MEMBER, num_admitted=4) is None


def test_a_node_may_come_under_a_key_that_nobody_has_used():
    assert rotation(MEMBER, NOBODY, 1) is None
    assert rotation(MEMBER, Standing(KeyState.ADMITTED, b"me"), 64) is None  # asked again
    assert "64 keys" in rotation(MEMBER, NOBODY, 64).reason


@pytest.mark.attack
@pytest.mark.parametrize(
    ("standing", "of_new_key", "cause"),
    [
        (Standing(KeyState.REVOKED, b"me"), NOBODY, "revoked"),
        (Standing(KeyState.REPLACED, b"me"), NOBODY, "revoked"),
        (Standing(invitation=OPEN), NOBODY, "invitation"),
        (MEMBER, Standing(KeyState.ADMITTED, b"you"), "key"),
        (MEMBER, Standing(KeyState.REVOKED, b"me"), "key"),
        (MEMBER, Standing(invitation=OPEN), "key"),
    ],
)
def test_who_may_not_rotate_to_what(standing, of_new_key, cause):
    assert rotation(standing, of_new_key, 1).cause == cause


def test_an_outsider_is_told_why():
    assert "was revoked" in outsider(Standing(KeyState.REVOKED, b"me")).reason


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("12h", 43200), ("2d", 172800), (" 1w ", 604800)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "d", "0d", "-1d", "2 d", "1.5h", "2y"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="looks like 90s, 30m, 12h, 2d or 1w, got"):
        parse_duration(text)
