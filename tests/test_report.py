"""The page and the tables of the documents show what the files say: losses, wrong results and gaps as well."""

import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import pytest
from rich.console import Console

from trimask.benchmarks import tables
from trimask.benchmarks.charts.bars import ratios, stages
from trimask.benchmarks.charts.lines import growth
from trimask.benchmarks.charts.markup import node, render
from trimask.benchmarks.charts.plots import style_of
from trimask.benchmarks.charts.roofline import bandwidth, kernels, roofline
from trimask.benchmarks.charts.scales import LogScale, around, figure, short, ticks_within, times
from trimask.benchmarks.grouping import beside, side_by_side, sweeps, verdict
from trimask.benchmarks.page import write_page
from trimask.benchmarks.results import Row
from trimask.benchmarks.table import report

ROOT = Path(__file__).resolve().parents[1]
VOID = {"meta"}
CEILINGS = {"copy_bytes_per_s": 1e12, "fill_bytes_per_s": 1.5e12, "launch_ms": 1e-3, "matrix_flops_per_s": {"f2": 1e14}}


def row(implementation: str, p50: float | None = None, case: str = "c", subject: str = "op", **more: Any) -> Row:
    times = {} if p50 is None else {"p20_ms": 0.9 * p50, "p50_ms": p50, "p80_ms": 1.1 * p50}
    fields = {"device": "cpu", "dtype": "f2", "threads": 1, "correct": True, **times, **more}
    return Row(subject, case, implementation, **fields)


def write(path: Path, rows: list[Row], **facts: Any) -> Path:
    path.write_text(json.dumps({"schema": 1, "environment": {}, "rows": [asdict(one) for one in rows], **facts}))
    return path


def text_of(element: Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def of_class(element: Element, name: str) -> list[Element]:
    return [one for one in element.iter() if name in one.get("class", "").split()]


def percent(element: Element, attribute: str) -> float:
    text = element.get(attribute, "")
    assert text.endswith("%")
    return float(text[:-1])


class Tags(HTMLParser):
    """Every tag is closed in its turn; what would be loaded is kept."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def bars_of(*rows: Row) -> dict[str, Element]:
    figure = ratios("op", side_by_side(rows))
    return {
        text_of(of_class(one, "name")[0]): one for one in of_class(figure, "row") if "axis" not in one.get("class", "")
    }


# Axes.


def test_a_scale_is_logarithmic_and_its_ends_are_round() -> None:
    scale = around([0.7, 3.0])
    assert (scale.low, scale.high) == (0.5, 5.0)
    assert scale.at(0.5) == 0
    assert scale.at(5.0) == 100
    assert scale.at(2.5**0.5) == pytest.approx(50)
    assert around([1.0], 4).at(1.0) == pytest.approx(50)
    assert around([2.0, 50.0]) == LogScale(2.0, 50.0)


@pytest.mark.parametrize("span", [(0.5, 2), (0.1, 100), (1e-6, 1e9), (3, 7), (1e-12, 1e12)])
def test_ticks_are_few_and_inside(span: tuple[float, float]) -> None:
    ticks = ticks_within(*span, most=7)
    assert len(ticks) <= 7
    assert all(span[0] <= tick * (1 + 1e-8) and tick <= span[1] * (1 + 1e-8) for tick in ticks)
    assert len({short(tick) for tick in ticks}) == len(ticks)


def test_figures_have_three_digits() -> None:
    assert [figure(x) for x in (0.03916, 2.5, 375.3, 999.6, 7425.98)] == ["0.0392", "2.5", "375", "1000", "7426"]
    assert [times(x) for x in (0.00642, 0.165, 0.998, 2.876, 39.4)] == ["0.0064x", "0.17x", "1.00x", "2.88x", "39x"]
    assert [short(x) for x in (0.5, 100, 5e3, 2e6, 1e12)] == ["0.5", "100", "5k", "2M", "1T"]


# Who won.


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"p50": 1.0, "ratio_to_torchvision": 2.0}, "faster"),
        ({"p50": 1.0, "ratio_to_torchvision": 0.9}, "slower"),
        ({"p50": 1.0, "ratio_to_torchvision": 0.9, "ratio_low": 0.8, "ratio_high": 0.95}, "slower"),
        ({"p50": 1.0, "ratio_to_torchvision": 0.9, "ratio_low": 0.8, "ratio_high": 1.1}, "even"),
        ({"p50": 1.0, "ratio_to_torchvision": 1.1, "ratio_low": 0.9, "ratio_high": 1.2}, "even"),
        ({"p50": 1.0}, "untold"),
        ({"correct": None, "note": "not installed"}, "missing"),
        ({"correct": False}, "wrong"),
    ],
)
def test_verdicts(fields: dict[str, Any], expected: str) -> None:
    assert verdict(row("trimask", **fields)) == expected


def test_what_repeats_an_implementation_is_another_comparison() -> None:
    rows = [row("torchvision", 2.0), row("trimask", 1.0), row("torchvision", 4.0, dtype="f4")]
    rows += [row("trimask", 1.0, dtype="f4"), row("trimask", 1.0, case="d")]
    found = side_by_side(rows)
    assert [(one.case, one.dtype, len(one.rows)) for one in found] == [("c", "f2", 2), ("c", "f4", 2), ("d", "f2", 1)]
    assert [one.peer.p50_ms if one.peer else None for one in found] == [2.0, 4.0, None]


# Ratio bars.


def test_a_ratio_of_two_reaches_from_one_to_two_and_a_half_the_other_way() -> None:
    rows = bars_of(
        row("torchvision", 2.0, ratio_to_torchvision=1.0),
        row("trimask", 1.0, ratio_to_torchvision=2.0),
        row("trimask, slow", 4.0, ratio_to_torchvision=0.5),
        row("peer", 4.0, ratio_to_torchvision=0.5),
    )
    assert list(rows) == ["trimask", "trimask, slow", "peer"]  # torchvision is what they are held against
    win, loss, peer = (of_class(one, "bar")[0] for one in rows.values())
    assert (percent(win, "x"), percent(win, "width")) == (50, 50)  # of an axis from 0.5 to 2
    assert (percent(loss, "x"), percent(loss, "width")) == (0, 50) == (percent(peer, "x"), percent(peer, "width"))
    assert {"ours", "faster"} <= set(rows["trimask"].get("class", "").split())
    assert {"ours", "slower"} <= set(rows["trimask, slow"].get("class", "").split())
    assert "0.50x ▼ slower" in text_of(rows["trimask, slow"])
    assert "2.00x faster" in text_of(rows["trimask"])
    assert "slower" not in text_of(rows["peer"])  # a peer's loss is no loss of ours


def test_the_interval_of_a_ratio_is_a_whisker() -> None:
    (found,) = bars_of(row("trimask", 1.0, ratio_to_torchvision=1.5, ratio_low=1.0, ratio_high=2.0)).values()
    (whisker,) = of_class(found, "whisker")
    span = next(one for one in whisker if one.tag == "line")
    assert (percent(span, "x1"), percent(span, "x2")) == (50, 100)
    assert "1x to 2x" in text_of(whisker)
    (without,) = bars_of(row("trimask", 1.0, ratio_to_torchvision=1.5)).values()
    assert not of_class(without, "whisker")


def test_without_torchvision_there_are_times_and_no_axis() -> None:
    figure = ratios("op", side_by_side([row("torch", 3.0), row("trimask", 1.0)]))
    assert not of_class(figure, "axis")
    assert not list(figure.iter("svg"))
    assert "trimask 1 ms" in text_of(figure)


def test_wrong_and_missing_have_no_bar_and_say_why() -> None:
    found = [
        row("torchvision", correct=None, note="not installed"),
        row("trimask", correct=False, note="3 pixels differ"),
        row("trimask, alone", 1.0, correct=None),
    ]
    rows = bars_of(*found)
    assert list(rows) == ["trimask", "trimask, alone"]
    assert not any(of_class(one, "bar") for one in rows.values())
    assert "no time: torchvision (not installed)" in text_of(ratios("op", side_by_side(found)))
    assert "WRONG" in text_of(rows["trimask"])
    assert "3 pixels differ" in text_of(rows["trimask"])
    assert "1 ms" in text_of(rows["trimask, alone"])


# What grows.


def swept(count: int, kind: str = "sparse", **more: Any) -> list[Row]:
    case = f"{count} boxes, {kind}, {count // 2} survive"
    times = {"torchvision": count / 10, "trimask": count / 100}
    return [row(name, p50, case, "nms", variable={"boxes": float(count)}, **more) for name, p50 in times.items()]


def test_a_sweep_follows_what_varies_and_keeps_what_does_not_apart() -> None:
    rows = [one for kind in ("sparse", "crowd") for count in (10, 100, 1000) for one in swept(count, kind)]
    found = sweeps(side_by_side(rows))
    assert [one.title for one in found] == ["N boxes, sparse, N survive", "N boxes, crowd, N survive"]
    assert {one.variable for one in found} == {"boxes"}
    assert found[0].lines == {
        "torchvision": [(10, 1), (100, 10), (1000, 100)],
        "trimask": [(10, 0.1), (100, 1), (1000, 10)],
    }


def test_a_number_that_is_fixed_stays_in_the_title() -> None:
    rows = [
        row("trimask", 1.0, f"{count} RoIs x {pool} x {pool}", variable={"rois": float(count)})
        for pool in (7, 14)
        for count in (100, 1000)
    ]
    assert [one.title for one in sweeps(side_by_side(rows))] == ["N RoIs x 7 x 7", "N RoIs x 14 x 14"]


def test_the_batch_of_a_model_is_read_from_its_case() -> None:
    rows = [
        one
        for size in ("800 x 1344", "448 x 608")
        for batch in (1, 8)
        for one in (
            row("torchvision", 9.0 * batch, f"ResNet-50 FPN, {batch} x {size}, boxes alone", "models"),
            row("trimask", 1.0 * batch, f"ResNet-50 FPN, {batch} x {size}, boxes alone", "models"),
        )
    ]
    found = sweeps(side_by_side(rows))
    assert [one.title for one in found] == [f"ResNet-50 FPN, N x {s}, boxes alone" for s in ("800 x 1344", "448 x 608")]
    assert {one.variable for one in found} == {"batch"}
    assert found[0].lines == {"torchvision": [(1, 9), (8, 72)], "trimask": [(1, 1), (8, 8)]}


def test_one_point_is_no_sweep_and_wrong_results_are_in_none() -> None:
    assert sweeps(side_by_side(swept(10))) == []
    rows = [*swept(10), *(replace(one, correct=False, p50_ms=None) for one in swept(100)), *swept(1000)]
    (found,) = sweeps(side_by_side(rows))
    assert [x for x, _ in found.lines["trimask"]] == [10, 1000]


def test_points_of_a_line_stand_where_they_should() -> None:
    (sweep,) = sweeps(side_by_side([*swept(10), *swept(100), *swept(1000)]))
    chart = growth(sweep, style_of(sweep.lines))
    ours = next(one for one in of_class(chart, "line") if "peer" not in one.get("class", "") and one.tag == "g")
    places = [(percent(mark, "x"), float(mark.get("y", "nan"))) for mark in of_class(ours, "mark")]
    across = LogScale(10 / 1.08, 1000 * 1.08)
    assert [x for x, _ in places] == pytest.approx([across.at(v) for v in (10, 100, 1000)], abs=0.01)
    assert places[1][0] == pytest.approx(50, abs=0.01)
    steps = [a[1] - b[1] for a, b in pairwise(places)]
    assert steps[0] > 0  # more time is higher up
    assert steps[0] == pytest.approx(steps[1], abs=0.2)  # ten times as much, twice
    assert len([one for one in ours if one.tag == "line"]) == 2
    assert {"ms a call", "boxes"} <= {text_of(one) for one in of_class(chart, "axis-name")}


def test_colours_and_markers_differ_and_torchvision_is_grey() -> None:
    styles = style_of(["conch", "torchvision", "trimask, packed", "trimask"])
    assert styles == {"torchvision": 0, "trimask": 1, "trimask, packed": 2, "conch": 3}


# Ceilings.


def test_a_kernel_stands_at_its_intensity_and_speed() -> None:
    fast = row("trimask", 1.0, least_bytes=10**9, operations=5 * 10**10)  # 50 FLOP a byte, 50 TFLOP/s of 50 at 1 TB/s
    (found,) = kernels([fast, row("trimask", 1.0), row("trimask", correct=False, least_bytes=1)], CEILINGS)
    assert (found.bytes_per_s, found.flops_per_s, found.intensity, found.peak) == (1e12, 5e13, 50, 1e14)
    assert found.share(1e12) == 1.0
    chart = roofline([found], CEILINGS)
    assert chart is not None
    (mark,) = (one for one in of_class(chart, "mark") if one.get("x") != "11")  # which is the legend's
    roof = next(one for one in of_class(chart, "roof")[0] if one.tag == "line")  # the slope, from its foot to the ridge
    (x1, x2), (y1, y2) = ([percent(roof, n) for n in ("x1", "x2")], [float(roof.get(n, "nan")) for n in ("y1", "y2")])
    share = (percent(mark, "x") - x1) / (x2 - x1)
    assert 0 < share < 1
    assert float(mark.get("y", "nan")) == pytest.approx(y1 + share * (y2 - y1), abs=0.5)  # on the roof
    assert "50 TFLOP/s" in text_of(chart)
    assert "f2 100 TFLOP/s" in text_of(chart)


def test_without_operations_it_is_bandwidth_alone() -> None:
    found = kernels([row("trimask", 2.0, least_bytes=10**9), row("peer", 20.0, least_bytes=10**9)], CEILINGS)
    assert roofline(found, CEILINGS) is None
    chart = bandwidth("op", found, CEILINGS["copy_bytes_per_s"])
    assert [percent(bar, "width") for bar in of_class(chart, "bar")] == [50, 5]
    assert "500 GB/s" in text_of(chart)


def test_stages_fill_their_bar() -> None:
    chart = stages([row("trimask", 9.0, stages_ms={"backbone": 6.0, "boxes": 3.0, "masks": 1.0})])
    parts = list(chart.iter("rect"))
    assert [(percent(one, "x"), percent(one, "width")) for one in parts] == [(0, 60), (60, 30), (90, 10)]
    assert len({one.get("class") for one in parts}) == 3
    assert "backbone 6 ms (60 %)" in text_of(chart)
    assert "10 ms" in text_of(chart)


# The page.


def everything() -> list[Row]:
    models = [
        row(name, p50, f"ResNet-50 FPN, {batch} x 64 x 96", "models", ratio_to_torchvision=4.0 / p50, **more)
        for batch in (1, 8)
        for name, p50, more in (
            ("torchvision", 4.0, {}),
            ("trimask", 1.0, {"stages_ms": {"backbone": 0.5, "masks": 0.5}, "launches": 180.0, "peak_bytes": 10**9}),
        )
    ]
    return [
        *models,
        *swept(10),
        *swept(100),
        row("torchvision", 1.0, ratio_to_torchvision=1.0, least_bytes=10**9),
        row("trimask", 2.0, ratio_to_torchvision=0.5, least_bytes=10**9, note="<b>bold</b> & more\x1b[31m"),
        row("trimask, wrong", correct=False, note="off by 1.0e+00"),
        row("conch", correct=None, note="not installed"),
        row("trimask", 1.0, "<script>alert('case')</script>", least_bytes=10**9, operations=10**10),
    ]


@pytest.fixture
def page(tmp_path: Path) -> str:
    environment = {
        "machine": "Z80 <i>",
        "cores": 1,
        "versions": {"torch": "9.9", "conch": None},
        "commit": "abc",
        "time": "now",
    }
    facts = {"environment": environment, "ceilings": CEILINGS, "unfinished": ["models: ended with 1"]}
    file = write(tmp_path / "one.json", everything(), **facts)
    target = tmp_path / "new" / "page.html"
    assert write_page([file], target) == target
    return target.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_loads_nothing(page: str) -> None:
    tags = Tags(page)
    assert page.startswith("<!doctype html>")
    assert not {"script", "link", "img", "iframe", "object", "use"} & {tag for tag, _ in tags.seen}
    for tag, attributes in tags.seen:
        assert not {"src", "onclick", "onload", "xlink:href"} & set(attributes), tag
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"https?:|@import|url\(", page)
    places = {attributes["id"] for _, attributes in tags.seen if "id" in attributes}
    links = {str(attributes["href"])[1:] for _, attributes in tags.seen if "href" in attributes}
    assert links == places


def test_text_is_escaped(page: str) -> None:
    tags = Tags(page)
    assert "<script>" not in page
    assert "<script>alert('case')</script>" in "".join(tags.texts)
    assert "<b>bold</b> & more" in "".join(tags.texts)
    assert "Z80 <i>" in "".join(tags.texts)
    assert "\x1b" not in page


def test_the_page_has_every_chart_and_figure(page: str) -> None:
    for title in (
        "Beside torchvision",
        "Latency against batch",
        "Cost as the work grows",
        "Beside the machine's ceilings",
        "Roofline",
        "Where the time goes",
        "All figures",
        "Slower than torchvision: 1",
        "WRONG: 1",
        "Not timed: 1",
        "models: ended with 1",
        "off by 1.0e+00",
        "conch, not installed: 1 case",
        "abc",
        "torch 9.9",
    ):
        assert title in page.replace("&#39;", "'"), title
    for cell in ("kernel launches a picture", "peak MB", "<td>1000</td>", "<td>180</td>", "▼ 0.5"):
        assert cell in page, cell


def test_figures_have_names(page: str) -> None:
    tags = Tags(page).seen
    assert all(attributes.get("aria-label") for tag, attributes in tags if tag == "figure")
    plots = [attributes for tag, attributes in tags if tag == "svg" and attributes.get("class") not in ("mark",)]
    assert plots
    assert all(
        one.get("aria-hidden") == "true" or (one.get("role") == "img" and one.get("aria-label")) for one in plots
    )


def test_the_page_is_for_light_dark_and_small_screens(page: str) -> None:
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport" content="width=device-width' in page
    assert "@media (max-width" in page


def contrast(a: str, b: str) -> float:
    """Of two colours, as WCAG has it: 1 to 21."""

    def luminance(colour: str) -> float:
        digits = colour if len(colour) == 6 else "".join(2 * one for one in colour)
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_texts_and_marks_stand_out_in_light_and_dark() -> None:
    style = (ROOT / "benchmarks" / "charts" / "page.css").read_text()
    schemes = [
        dict(re.findall(r"--(\w+): #(\w+)", part)) for part in style.split("@media (prefers-color-scheme: dark)")
    ]
    for colours in schemes:
        for name in ("ink", "soft", "faster", "slower", "wrong"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, name
        for name in ("peer", *(f"c{i}" for i in range(8))):
            assert contrast(colours[name], colours["paper"]) >= 3, name


def test_empty_and_minimal_files(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.json", [])
    minimal = write(tmp_path / "minimal.json", [row("trimask", 1.0)], ceilings=None)
    page = write_page([empty, minimal], tmp_path / "page.html").read_text()
    Tags(page)
    assert "The file has no rows." in page
    assert {"empty", "minimal"} <= set(Tags(page).texts)


def test_no_file_and_no_file_of_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="files: expected at least one"):
        write_page([], tmp_path / "page.html")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"other\.json: expected an object"):
        write_page([tmp_path / "other.json"], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_committed_files_make_a_page(tmp_path: Path) -> None:
    files = sorted((ROOT / "benchmarks" / "results").glob("cpu*.json"))
    Tags(write_page(files, tmp_path / "page.html").read_text(encoding="utf-8"))


def test_children_come_in_their_order() -> None:
    page = render(node("p", "a", None, node("b", "c"), "d", "e", node("i"), "f", class_="k", aria_label=None, x=1.5))
    assert page == '<!doctype html>\n<p class="k" x="1.5">a<b>c</b>de<i></i>f</p>\n'


# The tables of the documents.


def test_the_documents_have_the_tables_of_the_committed_files() -> None:
    """`trimask benchmark --report` mends it."""
    documents = tables.documents()
    assert {"README.md", "results.md"} <= {file.name for file in documents}
    absent = set()
    for file in documents:
        text = file.read_text(encoding="utf-8")
        assert tables.rewritten(text, ROOT / "benchmarks" / "results") == text, file.name
        absent |= set(re.findall(r"there is no `benchmarks/results/(.*)`", text))
    assert absent <= {"cpu-epyc-export-1-thread.json"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [readme.count(f"<!-- table: {name} -->") for name in tables.TABLES] == [1] * len(tables.TABLES)
    assert readme.count("<!-- /table -->") == len(tables.TABLES)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of one op, and a table of them."""
    rows = [
        row("torchvision", 3.0, "10 boxes, 4 survive", ratio_to_torchvision=1.0),
        row("trimask", 1.0, "10 boxes, 4 survive", ratio_to_torchvision=2.96, note="a|b\n<c>"),
        row("torchvision", 3.0, "20 boxes", ratio_to_torchvision=1.0),
        row("trimask", 4.0, "20 boxes", ratio_to_torchvision=0.75),
        row("peer", 8.0, "20 boxes"),
        row("trimask, broken", case="20 boxes", correct=False),
    ]
    write(tmp_path / "file.json", rows, environment={"machine": "Z80", "commit": "0123456789"})
    pick = tables.Pick
    lines = (
        tables.Line("both", (pick("file", "op", "10 *"), pick("file", "op", "20 boxes"))),
        tables.Line("peer: {note}", (pick("file", "op", "20 boxes", peer="peer"),)),
        tables.Line("broken", (pick("file", "op", "20 boxes", ours="trimask, broken"),)),
    )
    monkeypatch.setitem(tables.TABLES, "chosen", lines)
    return tmp_path


def test_a_table_has_the_chosen_rows_and_bold_losses(folder: Path) -> None:
    text = "before\n<!-- table: chosen -->\nold\n<!-- /table -->\nafter\n"
    out = tables.rewritten(text, folder)
    assert out.startswith("before\n<!-- table: chosen -->\n| Work |")
    assert out.endswith("<!-- /table -->\nafter\n")
    assert "| both | torchvision 3 / 3 | 1 / 4 | 3.0x / **0.75x** |" in out
    assert "| peer:  | peer 8 | 4 | 2.0x |".replace("  ", " ") in out
    assert "| broken | torchvision 3 | **WRONG** | - |" in out
    assert "Z80, 1 thread" in out
    assert "0123456" in out
    assert "old" not in out
    assert tables.rewritten(out, folder) == out


def test_a_whole_file_is_a_table_too(folder: Path) -> None:
    out = tables.rewritten("<!-- table: file op -->\n<!-- /table -->", folder)
    assert "| 10 boxes, 4 survive | trimask | f2 | 0.9 / 1 / 1.1 | 3.0x | a\\|b &lt;c> |" in out
    assert "**0.75x**" in out
    assert "**WRONG**" in out
    with pytest.raises(ValueError, match=r"file\.json: expected rows of nms, got none"):
        tables.rewritten("<!-- table: file nms -->\n<!-- /table -->", folder)


def test_what_is_not_timed_for_one_reason_is_told_once_and_other_fields_have_columns(tmp_path: Path) -> None:
    rows = [
        row("torchvision", 3.0, "10 boxes", first_ms=5.0, peak_bytes=10**9, box_ap=0.66),
        row("trimask, Triton", None, "10 boxes", correct=None, note="needs a GPU"),
        row("trimask, Triton", None, "20 boxes", correct=None, note="needs a GPU"),
        row("conch", None, "20 boxes", correct=None, note="not installed"),
    ]
    write(tmp_path / "file.json", rows)
    out = tables.rewritten("<!-- table: file op -->\n<!-- /table -->", tmp_path)
    assert "| ratio | first call, ms | peak, MB | box AP | note |" in out
    assert "| 1.00x | 5 | 1000 | 0.6600 |  |" in out
    assert "Not timed: trimask, Triton (2 cases: needs a GPU)." in out
    assert out.count("needs a GPU") == 1
    assert "| 20 boxes | conch |" in out


def test_a_file_that_is_not_measured_yet_is_named(tmp_path: Path) -> None:
    text = "a\n<!-- table: soon -->\n<!-- /table -->\nb"
    out = tables.rewritten(text, tmp_path)
    assert "there is no `benchmarks/results/soon.json`" in out
    assert tables.rewritten(out, tmp_path) == out
    write(tmp_path / "soon.json", [row("trimask", 1.0)])
    assert "Not measured" not in tables.rewritten(out, tmp_path)


# Lower precision beside torchvision's.


def lower(**more: Any) -> list[Row]:
    half = {"dtype": "bfloat16", **more}
    return [
        row("torchvision", 3.0, dtype="float32", ratio_to_torchvision=1.0),
        row("trimask", 2.0, dtype="float32", ratio_to_torchvision=1.5),
        row("trimask, bfloat16", 1.0, **half),
    ]


def test_lower_precision_says_beside_what_wherever_its_ratio_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = lower(ratio_to_torchvision=2.9, ratio_low=2.8, ratio_high=3.0)
    (comparison,) = side_by_side(rows)
    assert [beside(one, comparison.peer) for one in comparison.rows] == ["", "", "beside float32"]
    found = bars_of(*rows)
    assert "bfloat16 beside float32" in text_of(found["trimask, bfloat16"])
    assert "lower" in found["trimask, bfloat16"].get("class", "").split()
    assert "beside" not in text_of(found["trimask"])
    file = write(tmp_path / "file.json", rows)
    page = write_page([file], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<td>bfloat16 beside float32</td>" in page
    assert "trimask, bfloat16 beside float32" in page  # where it is counted how often it was faster
    assert "| bfloat16 | 0.9 / 1 / 1.1 | 2.9x beside float32 |" in tables.rewritten(
        "<!-- table: file -->\n<!-- /table -->", tmp_path
    )
    line = tables.Line("half", (tables.Pick("file", "op", "c", ours="trimask, bfloat16"),))
    monkeypatch.setitem(tables.TABLES, "chosen", (line,))
    out = tables.rewritten("<!-- table: chosen -->\n<!-- /table -->", tmp_path)
    assert "| half | torchvision 3 | 1 | 2.9x beside float32 |" in out
    console = Console(width=200)
    with console.capture() as printed:
        console.print(report(rows))
    (told,) = (line for line in printed.get().splitlines() if "beside" in line)
    assert told.startswith("trimask, bfloat16")


def test_without_common_rounds_the_ratio_is_of_the_medians_and_has_no_interval() -> None:
    (comparison,) = side_by_side(lower())
    (found,) = (one for one in comparison.rows if one.dtype == "bfloat16")
    assert (found.ratio_to_torchvision, found.ratio_low) == (3.0, None)
    assert verdict(found) == "faster"
    assert not of_class(bars_of(*lower())["trimask, bfloat16"], "whisker")
    wrong = side_by_side([*lower()[:2], row("trimask, bfloat16", correct=False, dtype="bfloat16")])[0].rows[2]
    assert wrong.ratio_to_torchvision is None


def test_a_row_that_is_not_there_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for case, count in (("30 *", 0), ("*", 2)):
        monkeypatch.setitem(tables.TABLES, "chosen", (tables.Line("x", (tables.Pick("file", "op", case),)),))
        with pytest.raises(ValueError, match=rf"file\.json: expected one case that fits .*, got {count} of: 10 boxes"):
            tables.rewritten("<!-- table: chosen -->\n<!-- /table -->", folder)


def test_rewrite_changes_what_has_to_change(folder: Path) -> None:
    (folder / "benchmarks" / "results").mkdir(parents=True)
    (folder / "file.json").rename(folder / "benchmarks" / "results" / "file.json")
    readme = folder / "README.md"
    readme.write_text("<!-- table: chosen -->\n<!-- /table -->\n")
    assert tables.rewrite(folder) == [readme]
    assert "| both |" in readme.read_text()
    assert tables.rewrite(folder) == []
