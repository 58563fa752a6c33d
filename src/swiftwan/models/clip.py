"""The vision tower of CLIP (arXiv 2103.00020) as Wan2.1-I2V uses it: all but its last layer.

Parameter names are those of transformers' ``CLIPVisionModel``. Wan reads what goes into the last layer
(``hidden_states[-2]``), so that layer, the norm behind it and the projection are neither loaded nor run.

Shapes: N images, L tokens (a class token and the patches), D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftwan.errors import WeightsError
from swiftwan.models.config import ClipConfig

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that CLIP was trained on, in [0, 1]."""

_ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


class Embeddings(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2 + 1, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embedding.weight


class SelfAttention(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Layers(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers - 1)])


class ImageEncoder(nn.Module):
    """Images to the tokens that Wan2.1's cross-attention reads.

    Raises:
        WeightsError: the config asks for an activation that no CLIP of Wan has.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        if config.hidden_act not in _ACTIVATIONS:
            raise WeightsError(
                f"the image encoder's config.json has hidden_act '{config.hidden_act}'; swiftwan knows "
                f"{' and '.join(_ACTIVATIONS)}. Is this a Wan checkpoint?"
            )
        self.config = config
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)  # transformers' spelling
        self.encoder = Layers(config)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 images (N, height, width, 3) -> tokens (N, L, D): 257 tokens for ViT-H."""
        weight = self.embeddings.patch_embedding.weight
        pixels = torch.stack([pixels_of(image, self.config.image_size) for image in images])
        x = self.pre_layrnorm(self.embeddings(pixels.to(weight.device, weight.dtype)))
        for layer in self.encoder.layers:
            x = layer(x)
        return x


def pixels_of(image: Tensor, size: int) -> Tensor:
    """An image, uint8 (H, W, 3), as CLIP sees it: (3, size, size) float32, the shorter edge scaled, the middle cut out.

    Scaled by PIL's bicubic filter on 8-bit values, as CLIP was trained (github.com/openai/CLIP, clip/clip.py).
    """
    import numpy as np
    from PIL import Image

    height, width = image.shape[:2]
    shorter = min(height, width)
    scaled = Image.fromarray(image.contiguous().numpy()).resize(
        (int(size * width / shorter), int(size * height / shorter)), Image.Resampling.BICUBIC
    )
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    square = np.asarray(scaled.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    return ((torch.from_numpy(square) - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)
