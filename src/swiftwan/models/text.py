"""Text to embeddings: transformers' UMT5 encoder, cleaned and padded as the official Wan code does it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

import ftfy
import torch
from torch import Tensor, nn

from swiftwan.errors import RequestError
from swiftwan.models.dit import TEXT_LENGTH


def clean_prompt(prompt: str) -> str:
    """Mend broken Unicode, unescape HTML twice and collapse white space (wan/modules/tokenizers.py)."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class TextEncoder:
    """A tokenizer and a UMT5 encoder.

    Args:
        tokenizer: of transformers.
        encoder: transformers' ``UMT5EncoderModel``.
    """

    def __init__(self, tokenizer: Any, encoder: nn.Module) -> None:
        self.tokenizer = tokenizer
        self.encoder = encoder

    def check(self, prompt: str) -> None:
        """Raise RequestError, saying what would be cut, if the prompt has more tokens than Wan attends to."""
        tokens = self.tokenizer(clean_prompt(prompt)).input_ids
        if len(tokens) > TEXT_LENGTH:
            lost = self.tokenizer.decode(tokens[TEXT_LENGTH - 1 :], skip_special_tokens=True)
            raise RequestError(
                f"the prompt is {len(tokens)} tokens long; Wan reads {TEXT_LENGTH}. It would be cut before: "
                f"'{lost[:60]}{'...' if len(lost) > 60 else ''}'. Shorten it."
            )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, S, text_dim) of prompts, S the longest; zero behind the end of each shorter one."""
        batch = self.tokenizer([clean_prompt(p) for p in prompts], padding=True, return_tensors="pt")
        device = next(self.encoder.parameters()).device
        mask = batch.attention_mask.to(device)
        hidden = self.encoder(batch.input_ids.to(device), mask).last_hidden_state
        return hidden * mask[..., None].to(hidden.dtype)
