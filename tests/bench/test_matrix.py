import pytest

from swiftwan.bench.matrix import Cell, named_matrices, read_matrix
from swiftwan.errors import RequestError

SMALL = """
models = ["pocket"]
[requests.a]
prompt = "a red circle moves left over a blue background"
seed = 7
[plans.peer]
peer = "diffusers"
[plans.fast]
with = ["batched-cfg"]
request = { scheduler = "dpm++" }
"""


def write(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


def test_every_named_matrix_can_be_read() -> None:
    assert named_matrices() == ["pocket", "seed-001"]
    for name in named_matrices():
        assert read_matrix(name).cells()


def test_the_report_of_seed_001_has_its_twelve_rows_and_its_settings() -> None:
    matrix = read_matrix("seed-001")
    plans = {plan.name for plan in matrix.plans}
    assert len(plans - {"diffusers-bf16", "diffusers-bf16-compiled", "swiftwan"}) == 12
    first = matrix.cells()[0]
    assert first.is_baseline
    assert (first.plan.peer, first.plan.dtype) == ("diffusers", "fp32")
    assert first.request["seed"] == 33
    assert first.request["guidance_scale"] == 6.0


def test_a_cell_is_every_combination_and_survives_json(tmp_path) -> None:
    cells = read_matrix(write(tmp_path, SMALL)).cells()
    assert [cell.name for cell in cells] == ["pocket / a / peer", "pocket / a / fast"]
    assert cells[1].request["scheduler"] == "dpm++"
    assert "scheduler" not in cells[0].request
    assert [Cell.from_json(cell.to_json()) for cell in cells] == cells


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('models = ["pocket"]', "", "has no 'models'"),
        ('models = ["pocket"]', "models = 3", "models is 3; it must be a list"),
        ("seed = 7", "sed = 7", "has no field 'sed'. Did you mean 'seed'?"),
        ("seed = 7", 'seed = "x"', "seed is 'x'"),
        ('peer = "diffusers"', 'peer = "difusers"', "Did you mean 'diffusers'?"),
        ('peer = "diffusers"', 'peer = "diffusers"\nwith = ["x"]', "has both a peer and techniques"),
        ('with = ["batched-cfg"]', "compile = true", "for swiftwan say with"),
        ('with = ["batched-cfg"]', 'wiht = ["batched-cfg"]', "has no 'wiht'. Did you mean 'with'?"),
        (
            'with = ["batched-cfg"]',
            'with = ["batched-cgf"]',
            "plan 'fast': unknown technique 'batched-cgf'. Did you mean",
        ),
        ('with = ["batched-cfg"]', 'with = ["quantize:int5"]', "plan 'fast': quantize"),
        ('with = ["batched-cfg"]', 'with = "atuo"', "plan 'fast': unknown plan 'atuo'. Did you mean 'auto'?"),
        ('models = ["pocket"]', 'models = ["pocket"]\nmetrics = ["pnsr"]', "unknown metric 'pnsr'"),
        ('models = ["pocket"]', 'models = ["pocket"]\nbaseline = "pear"', "baseline is 'pear'. Did you mean 'peer'?"),
        ('models = ["pocket"]', 'models = ["pocket"]\nrounds = 0', "rounds is 0; it must be 1 or more"),
        ('models = ["pocket"]', "models = [", "is no TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, old, new, told) -> None:
    with pytest.raises(RequestError) as caught:
        read_matrix(write(tmp_path, SMALL.replace(old, new)))
    assert told in str(caught.value)


def test_an_unknown_matrix_names_the_nearest() -> None:
    with pytest.raises(RequestError, match="Did you mean 'pocket'?"):
        read_matrix("poket")
