"""Beside transformers' own CLIP: its logits are the score times a learned factor."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from swiftwan.measure.clip_score import ClipScorer, load_clip, pixels
from swiftwan.measure.missing import Missing

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


class Words(dict):
    def to(self, device):
        return self


def tokenize(prompts, *, truncation, max_length, return_tensors):
    assert truncation
    assert max_length == 77
    return Words(input_ids=torch.tensor([[1, 5, 9, 98]]), attention_mask=torch.ones(1, 4, dtype=torch.long))


@pytest.fixture(scope="module")
def model():
    return CLIPModel(
        CLIPConfig(text_config=TEXT | {"eos_token_id": 98}, vision_config=VISION, projection_dim=16)
    ).eval()


def test_the_score_is_the_models_logit_without_its_factor(model) -> None:
    frames = torch.randint(0, 256, (20, 28, 28, 3), dtype=torch.uint8)
    with torch.no_grad():
        output = model(
            **tokenize([""], truncation=True, max_length=77, return_tensors="pt"), pixel_values=pixels(frames, 28)
        )
        wanted = (output.logits_per_image / model.logit_scale.exp()).mean().item()

    assert ClipScorer(model, tokenize)(frames, "a dog") == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("size", [(50, 70), (70, 50), (28, 28), (16, 24)])
def test_pixels_are_those_of_clips_own_processor(size) -> None:
    frame = torch.randint(0, 256, (*size, 3), dtype=torch.uint8)
    smooth = torch.nn.functional.avg_pool2d(frame.permute(2, 0, 1).float(), 5, 1, 2).permute(1, 2, 0).to(torch.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)
    wanted = torch.as_tensor(processor(smooth.numpy(), return_tensors="pt").pixel_values)

    # Pillow computes in 8-bit fixed point: a step or two of 256, which is 0.015 each after normalising
    assert (pixels(smooth[None], 28) - wanted).abs().max() < 0.04


def test_weights_that_are_not_there_are_missing_with_the_reason(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SWIFTWAN_CLIP", str(tmp_path / "nothing"))
    found = load_clip(torch.device("cpu"))
    assert isinstance(found, Missing)
    assert "neither here nor to be had" in found.reason


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch) -> None:
    def nothing(*_, **__):
        raise OSError("cannot be reached")

    monkeypatch.delenv("SWIFTWAN_CLIP", raising=False)
    asked = []
    monkeypatch.setattr("transformers.CLIPModel.from_pretrained", lambda *_, **how: asked.append(how) or nothing())
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", nothing)
    assert "openai/clip-vit-large-patch14" in load_clip(torch.device("cpu")).reason
    assert [how["local_files_only"] for how in asked] == [True]
