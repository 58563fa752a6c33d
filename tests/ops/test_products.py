import os

import pytest

from swiftwan.ops.products import SETTINGS, fills_one_round, without_workspace


def test_products_take_no_workspace_unless_the_user_said_how_much(monkeypatch):
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # so that it is as it was behind the test
        monkeypatch.delenv(name)
    without_workspace()
    assert {name: os.environ[name] for name in SETTINGS} == SETTINGS

    monkeypatch.setenv("CUBLASLT_WORKSPACE_SIZE", "4096")
    monkeypatch.delenv("TORCH_CUBLASLT_UNIFIED_WORKSPACE")
    without_workspace()
    assert os.environ["CUBLASLT_WORKSPACE_SIZE"] == "4096"
    assert "TORCH_CUBLASLT_UNIFIED_WORKSPACE" not in os.environ


@pytest.mark.parametrize(
    ("rows", "columns", "taken"),
    [
        (3120, 1536, True),  # two pictures: 120 tall tiles, 300 square ones
        (1560, 1536, False),  # one: square ones take two rounds, less than two and a half
        (3120, 4608, False),
        (3120, 8960, False),
        (32760, 1536, False),
        (3520, 1536, True),  # 11 x 12 = 132
        (3521, 1536, False),
    ],
)
def test_tall_tiles_are_for_what_they_do_in_one_round_instead_of_three(rows, columns, taken):
    assert fills_one_round(rows, columns, processors=132) is taken
