import pytest
import torch

from swiftwan.errors import RequestError
from swiftwan.models.config import POCKET
from swiftwan.models.dit import WanTransformer
from swiftwan.train.flow import Batch, Levels, bell, loss, shares, spread


def drawn(levels, count=200_000):
    torch.manual_seed(torch.seed() % 1000)
    u = torch.rand(count) if levels.distribution == "uniform" else torch.sigmoid(torch.randn(count))
    level = levels.shift * u / (1 + (levels.shift - 1) * u)
    return level[(level >= levels.low) & (level <= levels.high)]


@pytest.mark.parametrize(
    "levels",
    [Levels(), Levels("uniform", 1.0), Levels("uniform", 5.0), Levels(shift=5.0, low=0.875), Levels(high=0.9)],
    ids=str,
)
def test_quantiles_are_those_of_the_distribution_with_the_rest_rejected(levels):
    places = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.95])
    expected = torch.quantile(drawn(levels)[:100_000], places)
    torch.testing.assert_close(levels.quantile(places), expected, atol=0.012, rtol=0)
    assert levels.share_below(levels.low) <= levels.share_below(levels.high)


def test_the_boundary_splits_all_draws_between_two_experts():
    whole = Levels(shift=5.0)
    below = whole.share_below(0.875)
    assert below == pytest.approx((drawn(whole) < 0.875).float().mean().item(), abs=0.01)


def test_the_ends_are_finite():
    level = Levels().quantile(torch.tensor([0.0, 1.0]))
    assert level.tolist() == [0.0, 1.0]


def test_a_shift_of_nothing_is_refused():
    with pytest.raises(RequestError, match="above 0"):
        Levels(shift=0.0)


def test_batches_in_a_row_cover_the_levels_evenly():
    places = sorted(spread(7, n) for n in range(50))
    gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
    assert max(gaps) < 2.7 / 50
    assert spread(7, 3) == spread(7, 3) != spread(8, 3)
    assert shares(0.7, 4).tolist() == pytest.approx([0.7, 0.95, 0.2, 0.45])


def test_the_bell_has_mean_one_and_ends_at_nothing():
    level = (torch.arange(10_000) + 0.5) / 10_000
    assert bell(level).mean().item() == pytest.approx(1, abs=1e-3)
    assert bell(torch.tensor([0.0, 1.0])).abs().max() < 1e-6


class Perfect:
    """Knows the flow; says what it was asked."""

    def __init__(self, flow):
        self.flow = flow

    def condition(self, text, shape, image):
        return None

    def __call__(self, noisy, timestep, condition):
        self.noisy, self.timestep = noisy, timestep
        return self.flow


def test_a_perfect_model_has_no_loss_and_a_given_frame_does_not_count():
    latents, noise = torch.randn(2, 16, 3, 4, 4), torch.randn(2, 16, 3, 4, 4)
    flow = noise - latents
    flow[0, :, 0] = 9.0
    model = Perfect(flow)
    batch = Batch(latents, torch.zeros(2, 4, 8), given=torch.tensor([True, False]))
    assert loss(model, batch, torch.tensor([0.3, 0.8]), noise) < 1e-10
    torch.testing.assert_close(model.timestep, torch.tensor([[0.0, 300.0], [800.0, 800.0]]))
    assert torch.equal(model.noisy[0, :, 0], latents[0, :, 0])
    torch.testing.assert_close(model.noisy[1], 0.2 * latents[1] + 0.8 * noise[1])


def test_the_loss_is_the_mean_square_and_its_weight_the_bell():
    latents, noise = torch.randn(2, 16, 3, 4, 4), torch.randn(2, 16, 3, 4, 4)
    model, batch = Perfect(torch.zeros_like(latents)), Batch(latents, torch.zeros(2, 4, 8))
    level = torch.tensor([0.3, 0.8])
    each = (noise - latents).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(loss(model, batch, level, noise), each.mean())
    torch.testing.assert_close(loss(model, batch, level, noise, "bell"), (each * bell(level)).mean())


def test_channels_go_beside_the_noise():
    latents, channels = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 20, 2, 4, 4)
    model = Perfect(torch.zeros_like(latents))
    loss(model, Batch(latents, torch.zeros(1, 4, 8), channels), torch.tensor([0.5]), torch.randn_like(latents))
    assert torch.equal(model.noisy[:, 16:], channels)


def test_padded_text_changes_nothing():
    torch.manual_seed(0)
    model = WanTransformer(POCKET.transformer).eval().requires_grad_(False)
    latents, noise, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 2, 4, 4), torch.randn(1, 5, 192)
    level = torch.tensor([0.4])
    short = loss(model, Batch(latents, text), level, noise)
    padded = loss(model, Batch(latents, torch.nn.functional.pad(text, (0, 0, 0, 11))), level, noise)
    torch.testing.assert_close(short, padded, rtol=1e-5, atol=1e-6)
