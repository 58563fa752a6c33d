import pytest
import torch

from swiftwan.ops.attention import sdpa
from swiftwan.ops.flash4 import package
from swiftwan.ops.sparse import block_means, select_blocks, sparse_flash4, sparse_flex, sparse_reference, tile_order

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def qkv(tokens, heads=2, width=16, **options):
    return (torch.randn(2, tokens, heads, width, **options) for _ in range(3))


@pytest.mark.parametrize("grid", [(3, 8, 8), (21, 30, 52), (1, 5, 3), (4, 1, 17)])
def test_an_order_holds_each_token_once_and_the_first_frame_first(grid):
    order = tile_order(*grid, device=torch.device("cpu"))
    frames, height, width = grid
    assert torch.equal(order.sort().values, torch.arange(frames * height * width))
    assert (order[: height * width] < height * width).all()


def test_a_block_is_a_tile_where_the_grid_divides():
    order = tile_order(5, 16, 16, device=torch.device("cpu"))
    block = order[256 : 256 + 128]  # behind the first frame's
    frame, row, column = block // 256, block % 256 // 16, block % 16
    assert (frame.unique().tolist(), row.max().item(), column.max().item()) == ([1, 2], 7, 7)


@pytest.mark.parametrize("tokens", [64, 70, 10])
def test_means_are_those_of_each_block(tokens):
    x = torch.randn(2, tokens, 3, 8)
    expected = torch.stack([part.mean(1) for part in x.split(16, dim=1)], dim=2)
    assert torch.allclose(block_means(x, 16), expected, atol=1e-6)


@pytest.mark.parametrize("tokens", [96, 100])
def test_everything_kept_is_dense_attention(tokens):
    q, k, v = qkv(tokens)
    blocks = select_blocks(q, k, 1.0, 16)
    assert torch.allclose(sparse_reference(q, k, v, blocks, 16), sdpa(q, k, v), atol=1e-5)


def test_the_blocks_that_matter_are_found_with_the_own_one():
    q, k, v = qkv(64)
    k = k * 0.01
    k[:, 32:48] = q.mean((1,), keepdim=True) * 50  # block 2 draws every query
    blocks = select_blocks(q, k, 0.5, 16)
    assert blocks.shape == (2, 2, 4, 2)
    own = torch.arange(4).view(1, 1, 4, 1)
    assert (blocks == own).any(-1).all()
    assert (blocks == 2).any(-1).float().mean() > 0.7
    assert torch.equal(blocks, blocks.sort(-1).values)


def test_a_block_sees_its_keys_only():
    q, k, v = qkv(50)
    blocks = torch.tensor([[0, 1], [1, 3], [0, 2], [2, 3]], dtype=torch.int32).expand(2, 2, 4, 2)
    out = sparse_reference(q, k, v, blocks, 16)
    seen = torch.cat((k[:, 16:32], k[:, 48:50]), 1), torch.cat((v[:, 16:32], v[:, 48:50]), 1)
    assert torch.allclose(out[:, 16:32], sdpa(q[:, 16:32], *seen), atol=1e-5)


@pytest.mark.gpu
@on_gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of cutlass-dsl 4.8 and of torch 2.11's inductor
@pytest.mark.parametrize("tokens", [1024, 1000, 4090])
@pytest.mark.parametrize("kernel", [sparse_flash4, sparse_flex])
def test_fast_kernels_agree_with_the_reference(kernel, tokens):
    if kernel is sparse_flash4:
        pytest.importorskip("flash_attn.cute")
        package()
    q, k, v = qkv(tokens, 3, 128, device="cuda", dtype=torch.bfloat16)
    blocks = select_blocks(q, k, 0.3)
    fast = (kernel if kernel is sparse_flash4 else kernel())(q, k, v, blocks, 128)
    exact = sparse_reference(q.float(), k.float(), v.float(), blocks, 128)
    plain = sparse_reference(q, k, v, blocks, 128)
    assert (fast.float() - exact).norm() <= 1.5 * (plain.float() - exact).norm() + 1e-6
