"""Latents and text embeddings, made once and kept by content.

A key is a digest of all that decides a tensor's bits: the clip's bytes, which of its frames, the shape, the encoder's
weights. So a clip that changed is encoded again, and nothing stale is ever read. Shards are safetensors that
appear whole or not at all; a run that is stopped while it encodes goes on behind the last one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from swiftwan.errors import OutputError, RequestError, WeightsError
from swiftwan.inputs import cover, fitted, video_frames
from swiftwan.models.config import KnownModel
from swiftwan.models.text import clean_prompt
from swiftwan.pipelines.start import as_video
from swiftwan.train.buckets import Item
from swiftwan.weights import check
from swiftwan.weights.build import Parts
from swiftwan.weights.write import write_json, write_tensors

log = logging.getLogger(__name__)

SHARD_BYTES = 128 * 2**20
"""What a stopped run may have to encode again: about thirty items of 832x480x81."""

_STAMP = "cache.json"


class Cache:
    """Tensors by key, in a folder.

    Args:
        folder: made if it is not there.
        identity: names the encoders; a folder of others is refused.

    Raises:
        RequestError: the folder is another model's cache.
        OutputError: it cannot be written.
    """

    def __init__(self, folder: Path, identity: dict[str, str]) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        self._new: dict[str, Tensor] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _stamp(folder / _STAMP, identity)
            for path in sorted(folder.glob("*.safetensors")):
                self._open(path)
        except OSError as error:
            raise OutputError(f"cannot use {folder} as a cache: {error.strerror}; give another --cache.") from None

    def __contains__(self, key: str) -> bool:
        return key in self._files or key in self._new

    def __getitem__(self, key: str) -> Tensor:
        tensor: Tensor = self._new[key] if key in self._new else self._files[key].get_tensor(key)
        return tensor

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep a tensor; it is on the disk after :meth:`flush`, or when a shard is full."""
        self._new[key] = tensor.cpu().contiguous()
        if sum(t.nbytes for t in self._new.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is new.

        Raises:
            OutputError: the disk is full; shards written before stay.
        """
        if not self._new:
            return
        name = hashlib.sha256("".join(sorted(self._new)).encode()).hexdigest()[:16]
        path = self.folder / f"{name}.safetensors"
        write_tensors(path, self._new, way_out="free room and run the same command again: it goes on from here")
        self._new = {}
        self._open(path)

    def _open(self, path: Path) -> None:
        try:
            check.check_file(path)
        except WeightsError as problem:
            log.warning("%s; what it held is encoded again", problem)
            path.unlink()
            return
        file = safe_open(path, framework="pt", device="cpu")
        self._files |= dict.fromkeys(file.keys(), file)


def _stamp(path: Path, identity: dict[str, str]) -> None:
    if not path.is_file():
        write_json(path, identity)
        return
    stamped = check.read_json(path) or {}
    if stamped != identity:
        theirs, ours = stamped.get("model"), identity["model"]
        raise RequestError(
            f"{path.parent} is a cache of '{theirs}', not of '{ours}' as it is loaded; give another --cache."
        )


# Encoding


@dataclass(frozen=True)
class Sample:
    """The keys of what one item trains on: latents, and for models that begin with an image its channels and tokens."""

    latents: str
    text: str
    image: str | None = None
    image_tokens: str | None = None


class Encoders:
    """The parts of a model that turn pixels and words into what its transformer sees.

    Args:
        parts: their text encoder is let go of by :meth:`release`.
        device: where they work.
    """

    def __init__(self, known: KnownModel, parts: Parts, device: torch.device) -> None:
        self.known, self.parts, self.device = known, parts, device
        self._vae = _digest_of(parts.vae, known.vae.to_json())

    @property
    def identity(self) -> dict[str, str]:
        return {"model": self.known.name, "vae": self._vae, "text": self.parts.text.identity}

    def sample(self, item: Item) -> Sample:
        """The keys of an item; nothing is encoded."""
        what = {"clip": item.clip.sha256, "indices": item.indices, "size": str(item.bucket), "vae": self._vae}
        begins = self.known.image_start == "channels"
        return Sample(
            latents=_key(what, "latents"),
            text=self.text_key(item.caption),
            image=_key(what, "image") if begins else None,
            image_tokens=_key(what, "image tokens") if begins and self.parts.image_encoder is not None else None,
        )

    def text_key(self, caption: str) -> str:
        return _key({"text": clean_prompt(caption), "encoder": self.parts.text.identity}, "text")

    def fill(self, cache: Cache, items: Sequence[Item], on_item: Callable[[int, int], None]) -> int:
        """Encode what the cache lacks, captions first, and the empty caption; returns how many items were encoded.

        Args:
            on_item: told how many are done, of how many.
        """
        for caption in dict.fromkeys(("", *(item.caption for item in items))):
            if (key := self.text_key(caption)) not in cache:
                cache.put(key, self.parts.text.encode(caption)[0])
        self.release()
        missing = [item for item in items if not self._has(cache, self.sample(item))]
        for done, item in enumerate(missing, 1):
            self._encode(cache, item)
            on_item(done, len(missing))
        cache.flush()
        return len(missing)

    def release(self) -> None:
        """Let the text encoder go: the largest part beside the transformer."""
        self.parts.text.stays_loaded = False
        self.parts.text.release()

    def leave(self) -> None:
        """Let the others go to host memory; nothing can be encoded or decoded on the device after that."""
        self.parts.vae.to("cpu")
        if self.parts.image_encoder is not None:
            self.parts.image_encoder.to("cpu")

    @staticmethod
    def _has(cache: Cache, sample: Sample) -> bool:
        return all(key in cache for key in (sample.latents, sample.image, sample.image_tokens) if key)

    def _encode(self, cache: Cache, item: Item) -> None:
        frames, sample = pixels(item), self.sample(item)
        video = as_video(frames).to(self.device)
        cache.put(sample.latents, self.parts.vae.encode(video)[0].half())
        if sample.image is not None:
            gray = torch.zeros_like(video[:, :, 1:])
            cache.put(sample.image, self.parts.vae.encode(torch.cat((video[:, :, :1], gray), dim=2))[0].half())
        if sample.image_tokens is not None and self.parts.image_encoder is not None:
            cache.put(sample.image_tokens, self.parts.image_encoder.encode(frames[:1])[0])


def pixels(item: Item) -> Tensor:
    """uint8 (F, H, W, 3) of an item, covering its bucket's size.

    Raises:
        RequestError: the clip changed or vanished since it was checked.
    """
    import numpy as np

    size = item.bucket.width, item.bucket.height
    if item.clip.is_image:
        return fitted("image", item.clip.path, size)[0][None]
    wanted, frames = set(item.indices), {}
    for number, image in enumerate(video_frames(item.clip.path)):
        if number in wanted:
            frames[number] = torch.from_numpy(np.array(cover(image, size)[0]))
        if number >= max(wanted):
            break
    if wanted - frames.keys():
        raise RequestError(f"'{item.clip.path}' has fewer frames than when it was checked; start again.")
    return torch.stack([frames[number] for number in item.indices])


def _key(what: dict[str, Any], kind: str) -> str:
    return hashlib.sha256(json.dumps(what | {"kind": kind}, sort_keys=True).encode()).hexdigest()


def _digest_of(module: nn.Module, config: dict[str, Any]) -> str:
    """Of weights as they are loaded, so of their dtype too."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for tensor in _in_order(module.state_dict().items()):
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _in_order(tensors: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
    return [tensor for _, tensor in sorted(tensors, key=lambda pair: pair[0])]
