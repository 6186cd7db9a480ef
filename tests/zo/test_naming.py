"""Whose directions a run's codes are for, by its policy."""

import numpy as np
import pytest

from zo.directions import GROUP_0, INITIAL, MAX_NODE, SEED_POOL, SHARED, Direction
from zo.naming import naming, spoken


def test_private_directions_have_the_nodes_number(make_manifest):
    names = naming(make_manifest())
    assert names.voice(5) == 5
    assert names.of_round(5, range(6, 8), 2) == [Direction(5, 6, 2), Direction(5, 7, 2)]


def test_shared_directions_are_the_same_for_all(make_manifest):
    names = naming(make_manifest(policy="shared"))
    assert (
        names.of_round(5, range(6, 8)) == names.of_round(9, range(6, 8)) == [(SHARED, 6, 0), (SHARED, 7, 0)]
    )


def test_groups_share_within_and_differ_across(make_manifest):
    names = naming(make_manifest(policy="groups", groups=3))
    assert [names.voice(node) - GROUP_0 for node in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert names.of_round(1, range(2)) == names.of_round(4, range(2)) != names.of_round(2, range(2))


def test_names_are_an_array_for_the_kernel(make_manifest):
    names = naming(make_manifest()).names(np.array([3, 3, MAX_NODE]), np.array([0, 2**32 - 1, 7]), 1)
    assert names.dtype == np.uint32
    assert names.tolist() == [[3, 0, 1], [3, 2**32 - 1, 1], [MAX_NODE, 7, 1]]


@pytest.mark.parametrize(
    ("fields", "allowed", "refused", "called"),
    [
        ({}, (0, 5, MAX_NODE), (SHARED,), "everyone is no participant of a run with policy = 'private'"),
        ({}, (0,), (3, GROUP_0 + 2), "group 2 is no participant"),
        ({"policy": "shared"}, (SHARED,), (4,), "4 is no participant of a run with policy = 'shared'"),
        (
            {"policy": "groups", "groups": 3},
            (GROUP_0, GROUP_0 + 2),
            (GROUP_0 + 3,),
            "group 3 is no participant",
        ),
        ({"policy": "groups", "groups": 3}, (), (GROUP_0, SHARED), "everyone is no participant"),
        ({"policy": "groups", "groups": 3}, (), (2, GROUP_0), "2 is no participant"),
    ],
)
def test_who_may_be_in_a_commit(make_manifest, fields, allowed, refused, called):
    names = naming(make_manifest(**fields))
    names.check(allowed)
    names.check(())
    with pytest.raises(ValueError, match=called):
        names.check(refused)


def test_the_reserved_numbers_do_not_meet():
    assert MAX_NODE < GROUP_0 < GROUP_0 + 252 < INITIAL < SHARED < SEED_POOL
    assert GROUP_0 + 253 == INITIAL
    assert [spoken(each) for each in (0, MAX_NODE, GROUP_0, GROUP_0 + 252, SHARED)] == [
        "0",
        str(MAX_NODE),
        "group 0",
        "group 252",
        "everyone",
    ]
