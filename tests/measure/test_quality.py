import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from swiftwan.errors import RequestError
from swiftwan.measure.missing import Missing
from swiftwan.measure.quality import METRICS, Material, check_metrics, psnr_db, relative_distance, score, ssim
from swiftwan.pocket.scenes import parse_prompt
from swiftwan.pocket.world import draw


def clips(frames=3, height=24, width=40, noise=20):
    a = torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8)
    return a, (a.int() + torch.randint(-noise, noise + 1, a.shape)).clamp(0, 255).to(torch.uint8)


def test_psnr_is_torchmetrics_mean_over_frames() -> None:
    a, b = clips()
    wanted = [peak_signal_noise_ratio(x.double(), y.double(), data_range=255) for x, y in zip(a, b, strict=True)]
    assert psnr_db(a, b) == pytest.approx(torch.stack(wanted).mean().item(), abs=1e-5)


def test_ssim_is_torchmetrics_inside_its_mirrored_border() -> None:
    a, b = clips()
    _, image = structural_similarity_index_measure(
        a.permute(0, 3, 1, 2).double(), b.permute(0, 3, 1, 2).double(), data_range=255.0, return_full_image=True
    )
    assert ssim(a, b) == pytest.approx(image[..., 5:-5, 5:-5].mean().item(), abs=1e-9)


def test_equal_clips() -> None:
    a, _ = clips()
    assert psnr_db(a, a) == 100
    assert ssim(a, a) == pytest.approx(1)
    assert relative_distance(a.float(), a.float()) == 0


def test_clips_of_two_sizes_and_small_frames_are_refused() -> None:
    a, b = clips(height=8)
    with pytest.raises(RequestError, match="11 pixels"):
        ssim(a, b)
    with pytest.raises(RequestError, match="only clips of one size"):
        psnr_db(a, b[:2])


def test_an_unknown_metric_names_the_nearest() -> None:
    check_metrics(METRICS)
    with pytest.raises(RequestError, match="unknown metric 'pnsr'. Did you mean 'psnr'?"):
        check_metrics(["pnsr"])


def test_a_clip_of_the_world_is_judged_and_what_is_missing_says_why(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("SWIFTWAN_LPIPS", str(tmp_path / "none.safetensors"))
    monkeypatch.setenv("SWIFTWAN_CLIP", str(tmp_path / "none"))
    prompt = "a red circle moves left over a blue background"
    scene = parse_prompt(prompt)
    frames = ((draw([scene], seed=3)[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
    material = Material(frames, prompt, Missing("the reference failed"), torch.device("cpu"))

    found = score(material, METRICS)

    assert list(found) == [field for field, _ in METRICS.values()]
    assert found["judge_percent"] == 100
    assert found["psnr_db"] == Missing("the reference failed")
    assert "no LPIPS weights" in found["temporal_lpips"].reason
    assert "neither here" in found["clip_score"].reason
    assert found["pocket_clip_score"] > 0.3
    assert found["pocket_perceptual"] == Missing("the reference failed")


def test_a_prompt_of_another_world_is_not_judged() -> None:
    frames, _ = clips()
    found = score(Material(frames, "a dog", frames, torch.device("cpu")), ["judge", "psnr"])
    assert found == {"judge_percent": Missing("the prompt is not of the pocket world"), "psnr_db": 100}


def test_a_metric_that_cannot_compare_is_missing_not_an_error() -> None:
    frames, _ = clips()
    found = score(Material(frames, "a dog", frames[:1], torch.device("cpu")), ["psnr"])
    assert "only clips of one size" in found["psnr_db"].reason
