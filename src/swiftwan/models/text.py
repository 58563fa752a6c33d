"""Text to embeddings: cleaned and tokenized as the official Wan code does it, then UMT5's encoder."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from threading import Event
from typing import Any

import ftfy
import torch
from torch import Tensor, nn

from swiftwan.errors import RequestError
from swiftwan.models.dit import TEXT_LENGTH
from swiftwan.prompt_cache import PromptCache, digest


def clean_prompt(prompt: str) -> str:
    """Mend broken Unicode, unescape HTML twice and collapse white space (wan/modules/tokenizers.py)."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class TextEncoder:
    """A tokenizer and a UMT5 encoder, which is loaded when a prompt is not in the cache.

    Args:
        load_tokenizer: makes a ``tokenizers.Tokenizer``; the encoder loads meanwhile.
        load: makes a :class:`swiftwan.models.umt5.UMT5Encoder` on a device, in its dtype; may ask now and then whether
            it is still wanted, and raise Cancelled where it is not.
        identity: names weights and tokenizer by content, for the cache.
        device, dtype: where the embeddings go, and their format.

    Attributes:
        runs_on: where the encoder works.
        rests_on: where it is loaded to; elsewhere if a technique brings it there piece by piece.
        stays_loaded: whether it waits for the next prompt in memory.
        after_load: changes to make to a freshly loaded encoder.
    """

    def __init__(
        self,
        load_tokenizer: Callable[[], Any],
        load: Callable[[torch.device, Callable[[], bool]], nn.Module],
        *,
        identity: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.identity = identity
        self.device = device
        self.dtype = dtype
        self.cache: PromptCache | None = None
        self.after_load: list[Callable[[nn.Module], None]] = []
        self.runs_on = device
        self.rests_on = device
        self.stays_loaded = True
        self._load = load
        self._load_tokenizer = load_tokenizer
        self._loading: Future[nn.Module] | None = None
        self._given_up = Event()

    def expect(self, prompts: Iterable[str]) -> None:
        """Begin to load the encoder, in a thread, if one of these is not in the cache: 11 GB, beside imports and the
        kernels that a first run compiles or loads."""
        if self.is_loaded or self._loading is not None or self.knows(prompts):
            return
        self._given_up = given_up = Event()
        thread = ThreadPoolExecutor(1)
        self._loading = thread.submit(self._load, self.rests_on, lambda: not given_up.is_set())
        thread.shutdown(wait=False)

    def give_up(self) -> None:
        """End what :meth:`expect` began: a process waits for its threads, and there may be 11 GB to read yet."""
        self._given_up.set()

    @cached_property
    def tokenizer(self) -> Any:
        return self._load_tokenizer()

    @cached_property
    def encoder(self) -> nn.Module:
        loading, self._loading = self._loading, None
        try:
            encoder = self._load(self.rests_on, lambda: True) if loading is None else loading.result()
        except BaseException:  # Ctrl-C, above all
            self.give_up()
            raise
        for change in self.after_load:
            change(encoder)
        return encoder

    @property
    def is_loaded(self) -> bool:
        return "encoder" in self.__dict__

    def check(self, prompt: str) -> None:
        """Raise RequestError, saying what would be cut, if the prompt has more tokens than Wan attends to."""
        tokens = self.tokenizer.encode(clean_prompt(prompt)).ids
        if len(tokens) > TEXT_LENGTH:
            lost = self.tokenizer.decode(tokens[TEXT_LENGTH - 1 :], skip_special_tokens=True)
            raise RequestError(
                f"the prompt is {len(tokens)} tokens long; Wan reads {TEXT_LENGTH}. It would be cut before: "
                f"'{lost[:60]}{'...' if len(lost) > 60 else ''}'. Shorten it."
            )

    def release(self) -> None:
        """The prompts of a run are encoded; give the memory back unless told to wait for the next."""
        if not self.stays_loaded and self.is_loaded:
            del self.encoder
            if self.runs_on.type == "cuda":
                torch.cuda.empty_cache()

    def encode(self, prompt: str) -> Tensor:
        """Embeddings (1, S, text_dim) of a prompt's S tokens, from the cache where it has them."""
        text = clean_prompt(prompt)
        if self.cache is None:
            return self._encode(text)
        key = self._key(text)
        found = self.cache.get(key, self.device)
        if found is None:
            found = self._encode(text)
            self.cache.put(key, found)
        return found

    def knows(self, prompts: Iterable[str]) -> bool:
        """Whether the cache has all of them, so that the encoder is not loaded for their sake."""
        cache = self.cache
        return cache is not None and all(
            cache.get(self._key(clean_prompt(prompt)), self.device) is not None for prompt in prompts
        )

    @torch.no_grad()
    def _encode(self, text: str) -> Tensor:
        ids = torch.tensor([self.tokenizer.encode(text).ids], device=self.runs_on)
        hidden: Tensor = self.encoder(ids, torch.ones_like(ids))
        return hidden.to(self.device)

    def _key(self, text: str) -> str:
        on_gpu = self.runs_on.type == "cuda"
        return digest(
            {
                "text": text,
                "encoder": self.identity,
                "dtype": str(self.dtype),
                "device": torch.cuda.get_device_name(self.runs_on) if on_gpu else self.runs_on.type,
                "torch": torch.__version__,
                "length": TEXT_LENGTH,
            }
        )
