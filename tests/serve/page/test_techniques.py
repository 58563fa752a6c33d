from swiftwan.plan import parse
from swiftwan.serve.page import techniques
from swiftwan.techniques import TECHNIQUES


def test_everything_is_offered_but_what_a_page_cannot_choose() -> None:
    left = set(TECHNIQUES) - {parse(spec).name for spec in techniques.OFFERED}
    # The server's own number format, files that a client may not name, and what always runs.
    assert left == {"dtype", "lora", "prompt-cache"}
    assert sorted(techniques.reasons()) == sorted(map(techniques.head, techniques.OFFERED))


def test_each_value_has_its_own_reason() -> None:
    told = techniques.reasons()
    assert told["attention:cudnn"] == "the same softmax over all tokens, by another kernel"
    assert told["attention:fp8"] == parse("attention:fp8").reason != told["attention:cudnn"]
    assert told["offload:model"] != told["offload:blocks"]
