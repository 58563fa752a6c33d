"""The tokenizer is the one that transformers' AutoTokenizer finds, without what its import brings."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from swiftwan.weights.build import _tokenizer

TEXTS = [
    "a ginger cat walks along a stone wall in the evening sun",
    "Ein K\u00e4tzchen l\u00e4uft \u00fcber die Stra\u00dfe, 80 % Nebel!",
    "\u4e00\u53ea\u732b\u5728\u5899\u4e0a\u8d70 .",
    "tabs\tand <extra_id_0> tokens </s> odd",
    "  two  spaces",
    "",
]


def umt5_like() -> Tokenizer:
    """Unigram over white space and metaspace, ending a text as UMT5's published file does."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    metaspace = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS[:3] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize(
    "told", ["T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", None]
)
def test_it_is_that_of_the_class_that_the_folder_names(told: str | None, tmp_path: Path) -> None:
    ends = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=umt5_like(), model_max_length=512, **ends).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | ({"tokenizer_class": told} if told else {})))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True), _tokenizer(tmp_path)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours(text).input_ids[-1] == 1
