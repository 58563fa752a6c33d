import io

import numpy as np
import pytest
import torch
from PIL import Image

from swiftwan import Engine, TextToVideo
from swiftwan.pipelines.result import StepEvent
from swiftwan.serve.jobs.preview import MAX_CELLS, Glimpse, preview_jpeg


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("pocket", plan=[], device="cpu")


def test_two_points_of_a_straight_path_give_its_end() -> None:
    clean, flow = torch.randn(2, 1, 4, 3, 2, 2)
    glimpse = Glimpse()
    for sigma in (0.9, 0.6):
        assert glimpse.take() is None
        glimpse.see(clean + sigma * flow, 1000 * sigma)
    estimate = glimpse.take()
    assert estimate is not None
    torch.testing.assert_close(estimate, clean, atol=1e-5, rtol=1e-4)


def test_the_estimate_comes_closer_to_a_runs_latents_and_ends_there(engine: Engine) -> None:
    glimpse = Glimpse()

    def on_step(event: StepEvent) -> None:
        if event.latents is not None:
            assert event.timestep is not None
            glimpse.see(event.latents, event.timestep)
            estimates.append(glimpse.take())

    estimates: list[torch.Tensor | None] = []
    request = TextToVideo("a red circle over a blue background", num_frames=5, num_inference_steps=20, seed=3)
    latents = engine.run(request, on_step=on_step).latents
    assert estimates[0] is None
    errors = [float((estimate - latents).square().mean().sqrt()) for estimate in estimates[1:] if estimate is not None]
    assert len(errors) == 19
    assert errors[9] < 0.5 * errors[0]
    assert errors[-1] == 0


@pytest.mark.parametrize(("cells", "pixels"), [((16, 16), (128, 128)), ((60, 120), (8 * MAX_CELLS, 4 * MAX_CELLS))])
def test_a_preview_is_a_small_jpeg_whatever_the_video(
    engine: Engine, cells: tuple[int, int], pixels: tuple[int, int]
) -> None:
    latents = torch.randn(1, engine.facts.known.vae.z_dim, 3, *cells)
    picture = preview_jpeg(engine.parts.vae, latents)
    assert picture is not None
    assert Image.open(io.BytesIO(picture)).size == pixels


def test_it_shows_the_first_frame_as_it_will_be(engine: Engine) -> None:
    request = TextToVideo("a red circle moves left over a blue background", num_frames=9, num_inference_steps=4, seed=3)
    result = engine.run(request)
    picture = preview_jpeg(engine.parts.vae, result.latents)
    assert picture is not None
    seen = torch.from_numpy(np.array(Image.open(io.BytesIO(picture)))).float()
    assert float((seen - result.frames[0]).abs().mean()) < 3, "but for what JPEG loses"


def test_without_memory_to_spare_there_is_no_preview(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine.parts.vae, "stream_frames", no_memory)
    assert preview_jpeg(engine.parts.vae, torch.randn(1, 16, 1, 4, 4)) is None
