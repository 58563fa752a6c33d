"""CLIP's vision tower against transformers' own."""

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from swiftwan.errors import WeightsError
from swiftwan.models.clip import ImageEncoder
from swiftwan.models.config import ClipConfig
from swiftwan.weights.build import parameter_count
from swiftwan.weights.load import randomize

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize(("height", "width"), [(90, 70), (56, 56), (33, 120)])
def test_tokens_equal_those_of_transformers(activation, height, width):
    sizes = SIZES | {"hidden_act": activation}
    peer = CLIPVisionModel(CLIPVisionConfig(**sizes)).eval()
    ours = ImageEncoder(ClipConfig(**sizes)).eval()
    ours.load_state_dict({name: value for name, value in peer.state_dict().items() if name in ours.state_dict()})
    images = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    pixels = processor(images=[Image.fromarray(image.numpy()) for image in images], return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = peer(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(ours.encode(images), expected, atol=2e-5)


def test_an_unknown_activation_is_refused():
    with pytest.raises(WeightsError, match="hidden_act 'relu'; swiftwan knows gelu and quick_gelu"):
        ImageEncoder(ClipConfig(**SIZES, hidden_act="relu"))


def test_vit_h_without_its_last_layer():
    # 632 M published (huggingface.co/laion/CLIP-ViT-H-14): a layer of 19.7 M and two norms are not loaded.
    assert parameter_count(ClipConfig()) == pytest.approx(630.8e6 - 19.7e6, rel=1e-3)


def test_random_weights_keep_their_size():
    with torch.device("meta"):
        encoder = ImageEncoder(ClipConfig(**SIZES)).eval()
    randomize(encoder, device="cpu", dtype=torch.float32)
    tokens = encoder.encode(torch.randint(0, 256, (1, 56, 56, 3), dtype=torch.uint8))
    assert tokens.shape == (1, 17, 32)
    assert 0.3 < tokens.std() < 30
