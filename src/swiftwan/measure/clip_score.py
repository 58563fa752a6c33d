"""CLIP score (arXiv 2104.08718, as seed reports use it): how well frames match their prompt.

The cosine between CLIP's embedding of the text and of each frame, mean over the frames; about 0.2 for a frame that
has nothing to do with the words and 0.3 or more for one that shows them. No factor, no clipping.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate

from swiftwan.measure.hub import read_from_hub
from swiftwan.measure.missing import Missing

MODEL = "openai/clip-vit-large-patch14"
PLACE = "SWIFTWAN_CLIP"
"""Environment variable that names another CLIP: a hub id or a folder."""

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_FRAMES_AT_ONCE = 16


class ClipScorer:
    """Scores clips against a prompt.

    Args:
        model: transformers' ``CLIPModel``.
        tokenizer: its own; longer prompts are cut at the 77 tokens that CLIP reads.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @torch.no_grad()
    def __call__(self, frames: Tensor, prompt: str) -> float:
        """Score a clip, uint8 (F, H, W, 3)."""
        device = self.model.device
        length = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer([prompt], truncation=True, max_length=length, return_tensors="pt").to(device)
        text = self.model.get_text_features(**words).pooler_output
        size = self.model.config.vision_config.image_size
        scores = []
        for some in frames.split(_FRAMES_AT_ONCE):
            images = self.model.get_image_features(pixel_values=pixels(some.to(device), size)).pooler_output
            scores.append(cosine_similarity(images, text))
        return torch.cat(scores).mean().item()


def pixels(frames: Tensor, size: int) -> Tensor:
    """Frames as CLIP reads them, float32 (F, 3, size, size): shorter side to ``size`` (bicubic), middle, normalised."""
    images = frames.permute(0, 3, 1, 2).float()
    height, width = images.shape[2:]
    scale = size / min(height, width)
    # The longer side is cut off, not rounded, as CLIP's own code does it.
    target = (size, int(width * scale)) if height <= width else (int(height * scale), size)
    images = interpolate(images, target, mode="bicubic", antialias=True).round().clamp(0, 255)
    top, left = (images.shape[2] - size) // 2, (images.shape[3] - size) // 2
    images = images[:, :, top : top + size, left : left + size] / 255
    return (images - images.new_tensor(_MEAN).view(1, 3, 1, 1)) / images.new_tensor(_STD).view(1, 3, 1, 1)


def load_clip(device: torch.device) -> ClipScorer | Missing:
    """OpenAI's CLIP ViT-L/14, or what ``SWIFTWAN_CLIP`` names, from the hub or its cache."""
    from transformers import AutoTokenizer, CLIPModel

    name = os.environ.get(PLACE) or MODEL

    def read(local_files_only: bool) -> ClipScorer:
        model: Any = CLIPModel.from_pretrained(name, use_safetensors=True, local_files_only=local_files_only)
        return ClipScorer(
            model.to(device).eval(), AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)
        )

    return read_from_hub(name, read)
