from swiftwan.serve.page import chart


def test_an_area_rises_with_its_values_and_says_what_it_shows() -> None:
    svg = chart.area([(0.0, 1.0), (60.0, 4.0)], unit="GB", said='"GB" in use')
    assert 'aria-label="&quot;GB&quot; in use"' in svg
    assert "60 s ago" in svg
    line = svg.partition('class="line" points="')[2].partition('"')[0].split()
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line)
    assert x0 < x1
    assert y0 > y1  # SVG counts down


def test_bars_have_one_a_value() -> None:
    svg = chart.bars([0.5, 1.0, 0.25], unit="s", said="steps")
    assert svg.count("<rect") == 3
    assert "<title>step 2: 1 s</title>" in svg


def test_without_values_there_are_words() -> None:
    assert "Waiting" in chart.area([(0.0, 1.0)], unit="GB", said="")
    assert "Shown when" in chart.bars([], unit="s", said="")
