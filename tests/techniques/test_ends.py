from types import SimpleNamespace

import pytest
import torch

from swiftwan.techniques.ends import Ends, OtherAtEnds


class Branch(SimpleNamespace):
    """Stands for a Condition: told apart by identity."""

    __hash__ = object.__hash__


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [(0, 0, [0, 0, 0, 0, 0]), (2, 0, [1, 1, 0, 0, 0]), (1, 2, [1, 0, 0, 1, 1]), (9, 9, [1, 1, 1, 1, 1])],
)
def test_each_branch_is_counted_by_itself(first, last, expected):
    ends = Ends(first, last)
    branches = Branch(calls=5), Branch(calls=5)
    seen = []
    for _ in range(5):
        for branch in branches:
            ends(None, (None, None, branch))
            seen.append(ends.now)
    assert seen[::2] == seen[1::2] == [bool(now) for now in expected]


def test_a_run_of_unknown_length_has_no_last_calls():
    ends, branch = Ends(1, 3), Branch(calls=0)
    told = []
    for _ in range(3):
        ends(None, (None, None, branch))
        told.append(ends.now)
    assert told == [True, False, False]


def test_a_new_run_begins_afresh():
    ends = Ends(1)
    for _ in range(2):
        branch = Branch(calls=2)
        ends(None, (None, None, branch))
        assert ends.now
        ends(None, (None, None, branch))
        assert not ends.now


def test_kernels_give_way_at_the_ends():
    ends = Ends(1)
    attend = OtherAtEnds(lambda q, k, v: q, lambda q, k, v: v, ends)
    q, v = torch.zeros(1), torch.ones(1)
    branch = Branch(calls=4)
    ends(None, (None, None, branch))
    assert attend(q, q, v) is v
    ends(None, (None, None, branch))
    assert attend(q, q, v) is q
