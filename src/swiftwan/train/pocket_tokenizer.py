"""The pocket model's tokenizer: lower-cased byte-level BPE, trained on every prompt the world can say.

Each word of the world becomes one token; any other text still tokenizes, down to its bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from swiftwan.pocket.scenes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES

VOCABULARY = 448
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def corpus() -> Iterator[str]:
    """Sentences that hold each word of the world often enough to become a token."""
    for colour, shape, motion, background in itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS):
        article = "an" if colour == "orange" else "a"
        yield f"{article} {colour} {shape} {motion} over a {background} background"
        yield f"a small {colour} {shape} {motion} and a large {colour} {shape} {motion} over a {background} background"


def build():  # type: ignore[no-untyped-def]
    """Train the tokenizer; a transformers ``PreTrainedTokenizerFast`` that ends a prompt as T5 does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=512
    )
