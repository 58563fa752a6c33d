import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_that_go_ahead_run():
    pytest.importorskip("triton")
    from swiftwan.ops import ahead

    assert ahead._first_kernels(torch.device("cuda")) == 0.0
