from xml.etree import ElementTree

import pytest

from swiftwan.bench.charts import Series, figure, lines, scatter, ticks


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.13, 0.29, [0.1, 0.15, 0.2, 0.25, 0.3]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1, 3, [1.0, 1.5, 2.0, 2.5, 3.0]),
    ],
)
def test_ticks_are_round_and_hold_the_values(low, high, wanted) -> None:
    found = ticks(low, high)
    assert found == pytest.approx(wanted)
    assert found[0] <= low
    assert found[-1] >= high


def test_values_that_hardly_differ_get_an_axis_that_shows_it() -> None:
    found = ticks(0.99999, 0.99999)
    assert found[0] < 0.999 + 1e-9
    assert len({f"{tick:.6g}" for tick in found}) == len(found)


def test_a_chart_names_its_lines_axes_and_marks() -> None:
    marks = [(0, 1, "text<"), (2, 3, "VAE")]
    svg = lines([Series("a<b", 0, [(0, 1), (2, 3)], marks), Series("c", 1, [(0, 2)], marks[:1])], x="seconds", y="GB")
    assert "a&lt;b: VAE" in svg
    for word in ("a&lt;b", "text&lt;", "VAE"):
        assert svg.count(f"</svg> {word}</li>") == 1, "the legend tells each line and each kind of mark once"
    assert svg.count("M-4 0a4") == 3, "both lines' text and the legend's"
    assert 'aria-label="GB against seconds"' in svg


def test_a_figure_is_a_file_of_its_own() -> None:
    svg = ElementTree.fromstring(figure([Series("a<b", 0, [(0, 1), (2, 3)])], x="frames", y="seconds"))
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    words = [node.text for node in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a<b", "frames", "seconds"} <= set(words)
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}circle"))) == 2
    assert [node.tag.rpartition("}")[2] for node in svg][:2] == ["style", "rect"], "the ground hides nothing"


def test_the_ninth_line_is_dashed_and_colours_are_the_same_everywhere() -> None:
    assert 'stroke-dasharray="6 3"' in lines([Series("ninth", 8, [(0, 1), (1, 1)])], x="x", y="y")
    assert "#d55e00" in scatter([Series("second", 1, [(1, 1)])], [(1, 1)], x="x", y="y")


def test_counts_have_whole_ticks() -> None:
    assert ticks(1, 2, whole=True) == [1, 2]
    assert ticks(1, 50, whole=True) == [0, 10, 20, 30, 40, 50]
    assert ">1.2<" not in lines([Series("s", 0, [(1.0, 1.0), (2.0, 2.5)])], x="step", y="ms")
