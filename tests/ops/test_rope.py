import pytest
import torch

from swiftwan.ops.rope import apply_rope, rope_tables


def rotated_by_complex_numbers(x, frames, height, width):
    """The definition, in complex float64: at position p, pair j turns by p * theta ** (-2j / dim)."""
    head_dim = x.shape[-1]
    side = 2 * (head_dim // 6)
    turn = []
    for position in torch.cartesian_prod(torch.arange(frames), torch.arange(height), torch.arange(width)).double():
        angles = [
            p * 10_000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            for p, dim in zip(position, (head_dim - 2 * side, side, side), strict=True)
        ]
        turn.append(torch.polar(torch.ones(head_dim // 2, dtype=torch.float64), torch.cat(angles)))
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.stack(turn)[:, None]).flatten(-2)


@pytest.mark.parametrize(("dtype", "worst"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize(("head_dim", "grid"), [(24, (1, 3, 2)), (128, (3, 2, 4)), (64, (2, 5, 1))])
def test_matches_its_definition(dtype, worst, head_dim, grid):
    x = torch.randn(2, grid[0] * grid[1] * grid[2], 3, head_dim).to(dtype)
    got = apply_rope(x, rope_tables(head_dim, *grid, device=torch.device("cpu")))
    assert got.dtype == dtype
    error = (got.double() - rotated_by_complex_numbers(x, *grid)).abs().max()
    assert error < worst, f"largest error {error:.1e}"
