import pytest

from swiftwan.plan import parse
from swiftwan.serve.page import techniques
from swiftwan.techniques import TECHNIQUES


def test_everything_is_offered_but_what_a_page_cannot_choose() -> None:
    left = set(TECHNIQUES) - {parse(spec).name for spec in techniques.OFFERED}
    # The server's own number format, files that a client may not name, and what always runs.
    assert left == {"dtype", "lora", "prompt-cache"}
    assert sorted(techniques.reasons()) == sorted(map(techniques.head, techniques.OFFERED))


@pytest.mark.parametrize(
    ("ticked", "line", "after"),
    [
        (["fused"], "", "fused"),
        (["quantize:fp8", "fused"], "quantize:fp8:keep=2", "quantize:fp8:keep=2 fused"),
        ([], "quantize:fp8:keep=2 lora:x=0.5", "lora:x=0.5"),
        (["step-cache"], "", "step-cache:threshold=0.1"),
    ],
)
def test_ticks_add_and_remove_and_what_was_typed_stays(ticked: list[str], line: str, after: str) -> None:
    assert techniques.line_of(ticked, line) == after


def test_a_typed_line_ticks_its_boxes() -> None:
    groups = dict(
        zip((kind for kind, _ in techniques.by_kind()), techniques.ticks_of("fused tf32 lora:x"), strict=True)
    )
    assert groups == {"exact": ["fused"], "near": ["tf32"], "approximate": [], "retrained": []}
