"""Scorers of the pocket world: how well a frame fits its words, as CLIP tells it, and how far two frames look apart,
as LPIPS does. Small, trained on that world alone (``train/pocket_scorers.py``), and worth nothing outside it.

One trunk sees frames. Its last features, pooled, meet the words in one space (arXiv 2103.00020); its features at four
sizes, each scaled to length 1 over the channels, are compared place by place with learned weights (arXiv 1801.03924)::

    score(frame, prompt) = cosine of their embeddings
    distance(x, y)       = sum over 4 sizes of the mean over places of  w_l^2 . (f_l(x) - f_l(y))^2

A single frame shows no motion, so the score does not see it (``pocket/judge.py`` does). Distances are in units of the
mean distance between frames of two unrelated scenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from swiftwan.pocket.scenes import BACKGROUNDS, COLOURS, MOTIONS, RADII, SHAPES, Scene

FILE = Path(__file__).parent / "scorers.safetensors"
SIDE = 128
"""Shorter side of the pictures that the trunk sees."""
WIDTHS = (24, 48, 96, 128)
EMBEDDING = 96
TEXT_WORDS = 24
"""Longest prompt of the world, with room."""

_PHRASES = (*COLOURS, *SHAPES, *MOTIONS, *BACKGROUNDS, *RADII, "a an and over background")
VOCABULARY = {word: i for i, word in enumerate(sorted({w for phrase in _PHRASES for w in phrase.split()}), 1)}
"""Number of each word of the world; 0 is none."""

_FRAMES_AT_ONCE = 64


class _Stage(nn.Module):
    """Half the size, then a residual layer."""

    def __init__(self, wide: int, out: int) -> None:
        super().__init__()
        self.shrink = nn.Conv2d(wide, out, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(8, out)
        self.mix = nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.shrink(x))
        return x + F.gelu(self.mix(self.norm(x)))


class PocketScorers(nn.Module):
    """Both scorers. N pictures of (3, H, W) in -1 to 1; embeddings have length 1."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, *WIDTHS)
        self.trunk = nn.ModuleList(_Stage(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.picture_head = nn.Linear(2 * WIDTHS[-1], EMBEDDING)
        self.words = nn.Embedding(len(VOCABULARY) + 1, EMBEDDING)
        self.places = nn.Parameter(torch.randn(TEXT_WORDS, EMBEDDING) * 0.1)
        layer = nn.TransformerEncoderLayer(EMBEDDING, 4, 2 * EMBEDDING, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.reader = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.text_head = nn.Linear(EMBEDDING, EMBEDDING)
        self.log_sharpness = nn.Parameter(torch.tensor(2.5))
        self.weights = nn.ParameterList(nn.Parameter(torch.full((width,), 0.5)) for width in WIDTHS)

    def features(self, pictures: Tensor) -> list[Tensor]:
        """What the trunk makes of pictures at each of its four sizes."""
        found = []
        for stage in self.trunk:
            pictures = stage(pictures)
            found.append(pictures)
        return found

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """Embeddings (N, D)."""
        last = self.features(pictures)[-1]
        pooled = torch.cat((last.mean((2, 3)), last.amax((2, 3))), dim=1)
        return F.normalize(self.picture_head(pooled), dim=1)

    def embed_texts(self, words: Tensor) -> Tensor:
        """Embeddings (N, D) of prompts as :func:`words_of` gives them, (N, TEXT_WORDS)."""
        nothing = words == 0
        read = self.reader(self.words(words) + self.places, src_key_padding_mask=nothing)
        mean = read.masked_fill(nothing[..., None], 0).sum(1) / (~nothing).sum(1, keepdim=True)
        return F.normalize(self.text_head(mean), dim=1)

    def distances(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        """Distances (N,) of pictures whose :meth:`features` these are."""
        total = torch.zeros(len(x[0]), device=x[0].device)
        for weight, a, b in zip(self.weights, x, y, strict=True):
            apart = (_unit(a) - _unit(b)).square().mean((2, 3))
            total = total + apart @ weight.square()
        return total

    # Clips: uint8 (F, H, W, 3)

    @torch.no_grad()
    def clip_score(self, frames: Tensor, scene: Scene) -> float:
        """Mean over the frames of the cosine between frame and prompt, -1 to 1."""
        text = self.embed_texts(words_of([scene]).to(self.places.device))
        return torch.cat([self.embed_pictures(some) @ text[0] for some in self._pictures(frames)]).mean().item()

    @torch.no_grad()
    def distance(self, frames: Tensor, reference: Tensor) -> float:
        """Mean distance of two clips' frames; 0 is equal, 1 as far as unrelated scenes."""
        pairs = zip(self._pictures(frames), self._pictures(reference), strict=True)
        return torch.cat([self.distances(self.features(x), self.features(y)) for x, y in pairs]).mean().item()

    def temporal(self, frames: Tensor) -> float:
        """Mean distance of consecutive frames."""
        return self.distance(frames[1:], frames[:-1])

    def _pictures(self, frames: Tensor) -> list[Tensor]:
        device = self.places.device
        return [
            shrunk(some.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1) for some in frames.split(_FRAMES_AT_ONCE)
        ]


def _unit(features: Tensor) -> Tensor:
    features = features.float()
    return features / (features.norm(dim=1, keepdim=True) + 1e-6)


def shrunk(pictures: Tensor) -> Tensor:
    """Pictures (N, 3, H, W) at the size that the trunk knows: shorter side 128."""
    height, width = pictures.shape[2:]
    scale = SIDE / min(height, width)
    size = (round(height * scale), round(width * scale))
    return pictures if size == (height, width) else F.interpolate(pictures, size, mode="bilinear", antialias=True)


def words_of(scenes: Sequence[Scene]) -> Tensor:
    """Prompts as numbers of words, (N, TEXT_WORDS)."""
    numbers = torch.zeros(len(scenes), TEXT_WORDS, dtype=torch.long)
    for row, scene in zip(numbers, scenes, strict=True):
        words = [VOCABULARY[word] for word in scene.prompt.split()]
        row[: len(words)] = torch.tensor(words)
    return numbers


def load_scorers(device: torch.device) -> PocketScorers:
    """The scorers that come with the package."""
    model = PocketScorers()
    model.load_state_dict({name: weight.float() for name, weight in load_file(FILE).items()})
    return model.to(device).eval().requires_grad_(False)
