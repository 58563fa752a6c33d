"""The tokenizer gives the ids of transformers' AutoTokenizer, without what its import brings."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from swiftwan.errors import WeightsError
from swiftwan.models.text import clean_prompt
from swiftwan.weights.build import _tokenizer
from swiftwan.weights.find import locate
from swiftwan.weights.layout import Folder

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
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    metaspace = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), metaspace])
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS[:3] * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens([f"<extra_id_{number}>" for number in range(100)])
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@pytest.mark.parametrize("told", ["T5TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", None])
def test_its_ids_are_those_of_auto_tokenizer(told: str | None, tmp_path: Path) -> None:
    ends = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=umt5_like(), model_max_length=512, **ends).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | ({"tokenizer_class": told} if told else {})))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True), _tokenizer(tmp_path)
    for text in map(clean_prompt, TEXTS):
        ids = ours.encode(text).ids
        assert ids == theirs(text).input_ids
        assert ids[-1] == 1
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


def test_the_embedded_one_is_auto_tokenizer_s() -> None:
    pocket = locate("pocket")
    assert isinstance(pocket, Folder)
    theirs, ours = AutoTokenizer.from_pretrained(pocket.path / "tokenizer"), _tokenizer(pocket.path / "tokenizer")
    for text in TEXTS:
        assert ours.encode(text).ids == theirs(text).input_ids


def test_limits_that_a_file_sets_are_not_ours(tmp_path: Path) -> None:
    tokenizer = umt5_like()
    whole = tokenizer.encode(TEXTS[0]).ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert _tokenizer(tmp_path).encode(TEXTS[0]).ids == whole


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(WeightsError, match="tokenizer.json is damaged .*; download it again") as caught:
        _tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
