"""Lines that other packages log as they are imported, about kernels that swiftwan never calls. All else passes."""

from __future__ import annotations

import logging

LINES = {
    # A wheel holds kernels of many GPUs, and tells each that this machine's loader cannot take.
    "torchao": "Failed to load ",
    # torchao 0.18 registers its enumerations in a way that torch 2.13 will do without.
    "torch.utils._pytree": "register_constant() on Enum subclasses is deprecated",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
"""What a line says, by the logger that says it."""


def silence() -> None:
    """Call before torchao or bitsandbytes may be imported; transformers and peft import them too."""
    for name, words in LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(words))


class _Without(logging.Filter):
    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()
