"""The HTML page: what it says, and that a real browser opens it offline, clicks through it and finds nothing wrong."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import Page, start
from results import RECIPE, algorithms, as_results, comparison, tuning

from paring.errors import InputError
from paring.measure.result import Comparison, Error, Histogram, Layer, Tuning
from paring.recipe import Recipe
from paring.report.lanes import lay_out
from paring.report.page import render, write_page

HOSTILE = (
    "<script>window.hit = 1</script>",
    '"><img src=x onerror="window.hit = 1">',
    "</script><script>window.hit = 1</script>",
    "<!--<script>",
    "a\u2028b\u2029c\u202ed\x00e\ud800f",
    "{{ 7 * 7 }}{% raw %}",
    "' onmouseover='window.hit = 1",
    "javascript:window.hit=1//",
    "&lt&#60b&gt",
    "x" * 20_000,
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One headless Chromium for all tests of this module."""
    started = start(tmp_path_factory.mktemp("chromium"))
    yield started
    started.quit()


@pytest.fixture
def look(driver: Any, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    """Opens results at a size; afterwards the browser must have nothing to complain of."""
    opened: list[Page] = []

    def open_page(results: dict[str, Any], width: int = 1280, height: int = 900, scheme: str = "light") -> Page:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        # Without motion: a click goes to where a thing is, not to where it was while the page still scrolled.
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        features += [{"name": "prefers-reduced-motion", "value": "reduce"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        assert not opened or opened[-1].complaints() == []
        path = tmp_path / f"page-{len(opened)}.html"
        write_page(path, results)
        opened.append(Page(driver, path))
        return opened[-1]

    yield open_page
    assert opened and opened[-1].complaints() == []


DEBUG = as_results("debug", "comparison", comparison())
SMALL = as_results("debug", "comparison", comparison(30))
TUNE = as_results("tune", "tuning", tuning())
ALGORITHMS = as_results("bench-algorithms", "algorithms", algorithms())


def layer(name: str, **others: Any) -> Layer:
    return replace(Layer(name, "CONV_2D", name, "name", "int8", (1, 4)), **others)


def small_comparison(*layers: Layer, **others: Any) -> dict[str, Any]:
    made = Comparison("a.tflite", "b.tflite", 3, True, layers, tuple(range(len(layers))))
    return as_results("debug", "comparison", replace(made, **others))


# -- without a browser ---------------------------------------------------------------------------------------------


def test_a_page_of_200_layers_is_small_and_one_file():
    text = render(DEBUG)
    assert len(DEBUG["comparison"]["layers"]) == 200
    assert len(text.encode()) < 500_000
    assert not re.search(r"(?:src|href)=\"(?!#|data:,)", text)
    assert "@import" not in text and "url(" not in text


def test_results_without_anything_to_show_are_refused():
    with pytest.raises(
        InputError, match=r"cannot make a page: expected comparison or tuning or algorithms in the results, got paring"
    ):
        render({"paring": "0.1.0"})


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "report.html"
    target.write_text("old")
    with pytest.raises(InputError):
        write_page(target, {})
    assert target.read_text() == "old"
    write_page(target, SMALL)
    assert target.read_text(encoding="utf-8") == render(SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(InputError, match="cannot write the page"):
        write_page(tmp_path / "absent" / "report.html", SMALL)


def test_no_difference_is_called_exact_and_no_figure_a_dash():
    equal, empty = Error(math.inf, math.inf, 1.0), Error(math.nan, math.nan, math.nan)
    results = small_comparison(layer("same", own=equal, blame=math.inf), layer("zeros", own=empty))
    cells = re.findall(r'<i class="swatch (\w+)"></i>([^<]*)</td>', render(results))
    assert cells == [("b0", "exact"), ("b0", "exact"), ("bNone", "–")] + [("bNone", "–")] * 3


def test_recipes_on_the_page_load_again():
    text = render(TUNE)
    found = re.findall(r'<pre id="candidate-recipe-\d+">(.*?)</pre>', text, re.DOTALL)
    assert len(found) == len(TUNE["tuning"]["candidates"])
    again = Recipe.parse(found[3].replace("&#39;", "'"))
    assert again.to_data() == Recipe.load(RECIPE | {"name": "candidate-3"}).to_data()


def test_a_recipe_of_a_newer_version_is_shown_as_it_is():
    rules = [{"kind": "conv2d", "apply": {"prune": {"sparsity": 0.5}}}]
    text = render(small_comparison(layer("a", rule=0), recipe={"version": 9, "rules": rules}))
    assert "&#34;sparsity&#34;: 0.5" in text and 'href="#rule-1"' in text


@pytest.mark.parametrize(
    ("inputs", "lanes"),
    [
        ([[], [0], [1], [2]], (0, 0, 0, 0)),  # a chain
        ([[], [0], [1], [0, 2], [3]], (0, 1, 1, 0, 0)),  # a skip connection stays straight
        ([[], [0], [0], [0], [1, 2, 3]], (0, 1, 2, 0, 0)),  # three branches
        ([[], []], (0, 0)),  # two models side by side need no second lane
        ([[7], [1, -2], [0, 0]], (0, 1, 0)),  # what is no earlier layer
    ],
)
def test_lanes(inputs: list[list[int]], lanes: tuple[int, ...]):
    assert lay_out(inputs).lanes == lanes


def test_no_line_of_the_graph_passes_through_a_foreign_layer():
    inputs = [layer["inputs"] for layer in DEBUG["comparison"]["layers"]]
    made = lay_out(inputs)
    assert made.edges == tuple((s, i) for i, sources in enumerate(inputs) for s in sources)
    assert not [(s, r, i) for s, r in made.edges for i in range(s + 1, r) if made.lanes[i] == made.lanes[s]]


# -- in a browser --------------------------------------------------------------------------------------------------


def test_the_page_opens_from_a_file_and_asks_for_nothing(look: Callable[..., Page]):
    for results in (DEBUG, TUNE, ALGORITHMS):
        page = look(results)
        page.until("document.readyState === 'complete'")
        assert page.run("return performance.getEntriesByType('resource').length") == 0
        assert [url for url in page.requests() if url not in (page.url, "about:blank", "data:,")] == []


def test_results_that_hold_next_to_nothing_make_a_page(look: Callable[..., Page]):
    broken = Histogram(math.nan, 1.0, (1, 2))
    narrow = Histogram(1.0, 1.0, (5,), 0.0, (math.nan, 1.0))
    odd = layer("odd", inputs=(0, 5, -1), rule=7, own=Error(-math.inf, 1, 0.0), activation=broken, weights=narrow)
    page = look(small_comparison(odd))
    page.find(".expand").click()
    assert len(page.all(".histogram")) == 1
    page = look(small_comparison())
    assert page.find(".count").text == "0 layers"
    assert not page.all(".culprit") and not page.all("#recipe")
    for candidates in ((), (replace(tuning().candidates[0], score=math.nan),)):
        page = look(as_results("tune", "tuning", Tuning("a.tflite", "top1", {}, tuning().before, candidates)))
        assert "No candidate was chosen." in page.find("#found").text
        assert not page.all("#pareto") and not page.all("#sensitivity")


def test_the_policy_lets_nothing_in(look: Callable[..., Page]):
    page = look(SMALL)
    refused = page.driver.execute_async_script(
        """const done = arguments[0], found = [];
        addEventListener("securitypolicyviolation", ({ effectiveDirective }) => {
          if (found.push(effectiveDirective) === 3) done(found.sort());
        });
        fetch("http://127.0.0.1:9/").catch(() => 0);
        document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/" }));
        const script = document.createElement("script");
        script.append("window.hit = 1");
        document.body.append(script);"""
    )
    assert refused == ["connect-src", "img-src", "script-src-elem"]
    assert page.run("return window.hit") is None
    assert len(page.complaints()) >= 3  # the browser says so, and only here


def test_every_column_sorts_both_ways(look: Callable[..., Page]):
    page = look(DEBUG)
    layers = DEBUG["comparison"]["layers"]
    everything = sorted(page.column("layer-table", "Layer"))
    for th in page.all("#layer-table > thead th"):
        title = th.text.strip()
        if th.get_attribute("aria-sort"):
            page.heading("layer-table", "Layer").find_element(page.css, "button").click()
        orders = []
        for _ in range(2):
            th.find_element(page.css, "button").click()
            order = th.get_attribute("aria-sort")
            orders.append(order)
            values = [None if v in ("", "–") else v for v in page.column("layer-table", title)]
            known = [v for v in values if v is not None]
            assert values[len(known) :] == [None] * (len(values) - len(known)), f"{title}: none is not last"
            if title not in ("Layer", "Kind", "Became", "Rule"):
                known = [float(v) for v in known]
                assert known == sorted(known, reverse=order == "descending"), title
            elif title != "Layer":  # layer names hold numbers, which sort as numbers
                assert known == sorted(known, key=str.lower, reverse=order == "descending"), title
            assert len(page.all("#layer-table th[aria-sort]")) == 1
        assert sorted(orders) == ["ascending", "descending"], title
        assert sorted(page.column("layer-table", "Layer")) == everything
    # And the figures are the layers' own.
    page.heading("layer-table", "Weights").find_element(page.css, "button").click()
    wanted = sorted(la["weight_db"] for la in layers if la["weight_db"] is not None)
    assert [float(v) for v in page.column("layer-table", "Weights") if v] == pytest.approx(wanted, rel=1e-6)


def test_the_table_starts_with_the_worst_and_names_the_culprit(look: Callable[..., Page]):
    page = look(DEBUG)
    made = DEBUG["comparison"]
    worst = made["layers"][made["ranking"][0]]
    assert page.find(".culprit .lead").text == worst["name"]
    assert page.column("layer-table", "Layer")[0] == worst["name"]
    assert page.column("layer-table", "Rank")[:5] == ["1", "2", "3", "4", "5"]
    assert page.find("#exempt").text.strip() == made["exempt"].strip()


def test_filters_by_name_kind_and_form(look: Callable[..., Page]):
    page = look(DEBUG)
    layers = DEBUG["comparison"]["layers"]

    def shown(**wanted: str) -> int:
        return sum(
            wanted.get("name", "") in la["name"].lower()
            and wanted.get("native", la["native"]) == la["native"]
            and wanted.get("form", la["form"]) == la["form"]
            for la in layers
        )

    def count(expected: int) -> None:
        assert 0 < expected < 200
        page.until(f"document.querySelectorAll('#layer-table > tbody:not([hidden])').length === {expected}")
        assert page.find(".count").text == f"{expected} of 200 layers"

    text = page.find("input[name=text]")
    text.send_keys("PROJECT")
    count(shown(name="project"))
    text.clear()
    page.find("select[name=kind] option:nth-child(4)").click()
    kind = page.find("select[name=kind]").get_attribute("value")
    count(shown(native=kind))
    text.send_keys("block_1")
    count(shown(name="block_1", native=kind))
    page.find("button[type=reset]").click()
    page.until("document.querySelectorAll('#layer-table > tbody[hidden]').length === 0")
    page.find("select[name=form]").send_keys("int8 x int4")
    count(shown(form="int8 x int4"))
    assert set(page.column("layer-table", "Became")) == {"int8 x int4"}
    text.send_keys("no such layer")
    page.until("!document.querySelector('.none').hidden")
    assert page.find(".count").text == "0 of 200 layers"


def test_a_row_opens_to_errors_and_histograms(look: Callable[..., Page]):
    page = look(DEBUG)
    made = DEBUG["comparison"]
    index = made["ranking"][0]
    worst = made["layers"][index]
    button = page.find(f"#layer-{index} .expand")
    assert button.get_attribute("aria-expanded") == "false"
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    detail = page.find(f"#layer-{index} .detail")
    assert detail.is_displayed()
    rows = [row.text.rsplit(" ", 2) for row in detail.find_elements(page.css, ".fold tbody tr")]
    assert rows[0] == ["SNR, dB", f"{worst['own']['snr_db']:.1f}", f"{worst['accumulated']['snr_db']:.1f}"]
    pictures = detail.find_elements(page.css, "svg[role=img]")
    low, high = worst["activation"]["range"]
    assert f"the grid holds {low:g} to {high:.4g}" in pictures[0].accessible_name
    assert [p.accessible_name.split(":")[0] for p in pictures] == ["Result", "Weights"]
    # Values beyond the range are drawn as lost, beyond the line where the range ends.
    lost = pictures[0].find_element(page.css, ".lost")
    end = pictures[0].find_element(page.css, ".hold")
    assert lost.rect["x"] >= end.rect["x"] + end.rect["width"] - lost.rect["width"] * 0.1
    assert not pictures[1].find_elements(page.css, ".lost")
    button.click()
    assert not detail.is_displayed()


def test_a_layer_leads_to_its_rule_and_the_rule_back(look: Callable[..., Page]):
    page = look(DEBUG)
    name = next(la["name"] for la in DEBUG["comparison"]["layers"] if la["rule"] == 1)
    index = [la["name"] for la in DEBUG["comparison"]["layers"]].index(name)
    page.find("input[name=text]").send_keys(name)
    page.find(f"#layer-{index} td:last-child a").click()
    rule = page.find("#rule-2")
    page.until("location.hash === '#rule-2'")
    assert "int4" in rule.find_element(page.css, "pre").text
    page.until("document.querySelector('#rule-2').getBoundingClientRect().top < innerHeight")
    rule.find_element(page.css, "summary").click()
    touched = [link.text for link in rule.find_elements(page.css, "li a")]
    assert touched == [la["name"] for la in DEBUG["comparison"]["layers"] if la["rule"] == 1]
    # A layer that the filter hides is shown again when a link leads to it.
    rule.find_elements(page.css, "li a")[3].click()
    page.until("document.activeElement.matches('.expand[aria-expanded=true]')")
    assert page.focused().text == touched[3]
    page.until("document.querySelector('.count').textContent === '200 layers'")
    page.driver.back()
    page.until("location.hash === '#rule-2'")


def test_the_graph_is_coloured_by_each_measure_and_leads_to_rows(look: Callable[..., Page]):
    page = look(DEBUG)
    made = DEBUG["comparison"]
    assert len(page.all(".lanes circle")) == len(page.all(".lanes li")) == 200
    index = made["ranking"][0]
    circle = page.all(".lanes circle")[index]
    assert circle.get_attribute("class") == "node b4"
    assert float(circle.get_attribute("r")) > float(page.all(".lanes circle")[0].get_attribute("r"))
    page.find("#measure").send_keys("error in the model")
    last = max(i for i, la in enumerate(made["layers"]) if la["accumulated"])
    page.until(f"document.querySelectorAll('.lanes .mark')[{last}].textContent.length > 0")
    assert page.all(".lanes .mark")[last].text == f"{made['layers'][last]['accumulated']['snr_db']:.1f}"
    assert page.all(".lanes circle")[last].get_attribute("class") == "node b4"
    page.all(".lanes a")[index].click()
    page.until("document.activeElement.matches('.expand')")
    assert page.focused().text == made["layers"][index]["name"]


@pytest.mark.parametrize("clipboard", [True, False], ids=["clipboard", "without"])
def test_the_recipe_lines_can_be_copied(look: Callable[..., Page], clipboard: bool):
    page = look(SMALL)
    if not clipboard:
        page.run("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.find("[data-copy=exempt]").click()
    page.until("document.querySelector('#said').textContent === 'Copied'")
    assert page.find("[data-copy=exempt]").text.startswith("Copied")
    area = page.run("return document.body.appendChild(document.createElement('textarea'))")
    area.send_keys(page.keys.CONTROL, "v")
    assert area.get_attribute("value") == SMALL["comparison"]["exempt"]


def test_the_keyboard_reaches_everything(look: Callable[..., Page]):
    page = look(SMALL)
    page.press(page.keys.TAB)
    assert page.focused().text == "Skip to the report" and page.focused().is_displayed()
    outline = page.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.press(page.keys.ENTER)
    page.tab_to("nav a[href='#layers']")
    page.press(page.keys.ENTER)
    page.tab_to("input[name=text]")
    page.press("project")
    page.until("document.querySelectorAll('#layer-table > tbody[hidden]').length > 0")
    page.tab_to("th:nth-child(3) .sort")
    page.press(page.keys.ENTER)
    assert page.find("#layer-table th:nth-child(3)").get_attribute("aria-sort") == "ascending"
    page.tab_to(".expand")
    page.press(page.keys.SPACE)
    assert page.focused().get_attribute("aria-expanded") == "true"
    page.tab_to(".detail a[href^='#rule']")
    page.press(page.keys.ENTER)
    page.until("location.hash.startsWith('#rule-')")
    page.tab_to("summary")
    page.press(page.keys.ENTER)
    page.tab_to(".rules details a")
    page.press(page.keys.ENTER)
    page.until("document.activeElement.matches('.expand[aria-expanded=true]')")
    page.find("nav a[href='#graph']").send_keys(page.keys.ENTER)
    page.tab_to(".lanes a")
    page.press(page.keys.ENTER)
    page.until("location.hash === '#layer-0' && document.activeElement.matches('.expand')")


@pytest.mark.parametrize("results", [DEBUG, TUNE, ALGORITHMS], ids=["debug", "tune", "algorithms"])
def test_a_phone_needs_no_sideways_scrolling(look: Callable[..., Page], results: dict[str, Any]):
    page = look(results, width=360, height=740)
    page.run("document.querySelectorAll('details').forEach((found) => (found.open = true))")
    for button in page.all(".expand")[:2]:
        page.run("arguments[0].click()", button)
    assert page.run("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]
    # What is wider scrolls in a box of its own; what a row opens to fits without.
    assert page.run("return Math.max(...[...document.querySelectorAll('.fold')].map((f) => f.scrollWidth))") <= 360
    sizes = page.run("return [...document.querySelectorAll('button')].map((b) => b.getBoundingClientRect().height)")
    assert min(size for size in sizes if size) >= 24


def test_hostile_names_are_text_and_run_nothing(look: Callable[..., Page]):
    names = HOSTILE
    layers = tuple(
        layer(n, optimized=n, form=n[:40], inputs=(i - 1,), note=n, rule=0, blame=1.0 + i, native=n[:40], matched=n)
        for i, n in enumerate(names)
    )
    hostile_recipe = {"version": 1, "name": names[0], "rules": [{"name": re.escape(names[2]), "apply": "float"}]}
    results = small_comparison(
        *layers,
        source=names[1],
        optimized=names[2],
        outputs={n: Error(1.0, 1.0, 1.0) for n in names},
        agreement={names[0]: 0.5},
        recipe=hostile_recipe,
        exempt=names[2],
        unmatched=names,
        notes=names,
    )
    results["environment"] = {names[0]: names[1], names[3]: {"x": names[2]}}
    found = replace(tuning(), source=names[2], metric=names[0], notes=names)
    found = replace(found, candidates=tuple(replace(c, label=n) for c, n in zip(found.candidates, names, strict=False)))
    swept = tuple(replace(s, layer=n, native=n, scheme=n) for s, n in zip(found.sensitivity, names, strict=False))
    bench = algorithms()
    row = bench.tables[0].rows[1]
    rows = tuple(replace(row, label=n, apply=({n: {n: n}},), notes=(n,)) for n in names)
    bench = replace(
        bench, backend=names[0], tables=(replace(bench.tables[0], data=names[1], model=names[2], rows=rows),)
    )
    tune = as_results("tune", "tuning", replace(found, sensitivity=swept))
    for data in (results, tune, as_results("bench-algorithms", "algorithms", bench)):
        page = look(data)
        for button in page.all(".expand"):
            page.run("arguments[0].click()", button)
        texts = page.run("return [...document.querySelectorAll('.expand')].map((button) => button.textContent)")
        assert texts[0] == names[0] and texts[1] == names[1].rstrip() and texts[3] == names[3]
        assert texts[5] == names[5] and texts[8] == names[8]
        assert "\u202e" not in texts[4] and "\ufffd" in texts[4]
        assert page.run("return [...document.scripts].map((script) => script.type)") == ["application/json", "module"]
        assert page.run("return [document.images.length, document.querySelectorAll('b').length]") == [0, 0]
        assert page.run("return window.hit") is None
        assert (
            page.run("return document.querySelectorAll('[onerror], [onmouseover], a:not([href^=\"#\"])').length") == 0
        )
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")


def test_the_curve_shows_every_candidate_and_leads_to_its_recipe(look: Callable[..., Page]):
    page = look(TUNE)
    made = TUNE["tuning"]
    points = page.all("#pareto a")
    assert len(points) == len(made["candidates"]) == 25
    assert len(page.all("#pareto .limit")) == 2 and len(page.all("#pareto rect.float")) == 1
    (chosen,) = [p for p in points if p.find_elements(page.css, ".chosen")]
    assert "chosen" in chosen.accessible_name
    best = next(i for i, c in enumerate(made["candidates"]) if c["chosen"])
    assert page.run("return arguments[0].href.baseVal", chosen) == f"#candidate-{best}"
    # The smaller a candidate, the further left; the better, the higher.
    placed = {page.run("return arguments[0].href.baseVal", p): p.rect for p in points}
    by_size = sorted(range(25), key=lambda i: made["candidates"][i]["bytes"])
    lefts = [placed[f"#candidate-{i}"]["x"] + placed[f"#candidate-{i}"]["width"] / 2 for i in by_size]
    assert lefts == sorted(lefts)
    by_score = sorted(range(24), key=lambda i: -made["candidates"][i]["score"])
    tops = [placed[f"#candidate-{i}"]["y"] for i in by_score if i != best]
    assert tops == sorted(tops)
    failed = next(p for p in points if page.run("return arguments[0].href.baseVal", p) == "#candidate-24")
    assert "score 0.58, below the chart" in failed.accessible_name
    chosen.send_keys(page.keys.ENTER)
    page.until("document.activeElement.matches('.expand[aria-expanded=true]')")
    assert page.focused().text == made["candidates"][best]["label"]
    shown = page.find(f"#candidate-{best} pre").text
    assert Recipe.parse(shown).name == made["candidates"][best]["recipe"]["name"]


def test_algorithms_are_drawn_with_their_spread_and_lead_to_their_rows(look: Callable[..., Page]):
    page = look(ALGORITHMS)
    made = ALGORITHMS["algorithms"]["tables"][1]["rows"]
    points = page.all("#table-1-section svg a")
    assert len(points) == len(made) - 1  # one has no size
    assert len(page.all("#table-1-section svg .line")) == len(points)
    assert (
        points[0].find_elements(page.css, "rect.float") and "float: top-1 96.00 ± 0.80 %" in points[0].accessible_name
    )
    points[3].send_keys(page.keys.ENTER)
    page.until("document.activeElement.matches('.expand[aria-expanded=true]')")
    assert page.focused().text == made[3]["label"]
    assert len(page.all("#algorithm-1-3 .fold tbody tr")) == 3
    page.heading("table-1", "Points").find_element(page.css, "button").click()
    points_shown = [float(v) for v in page.column("table-1", "Points")]
    assert points_shown == pytest.approx(sorted((row["change"] for row in made), reverse=True), abs=1e-6)
    page.heading("table-1", "zstd").find_element(page.css, "button").click()
    assert page.column("table-1", "Algorithm")[-1] == "mine:Unwritten"


def test_recipes_of_algorithms_on_the_page_load():
    rows = [
        {**row, "apply": [{"cluster": {"clusters": 8}}, {"quantize": {"weights": "int4", "activations": "int8"}}]}
        for row in ALGORITHMS["algorithms"]["tables"][0]["rows"]
    ]
    table = {**ALGORITHMS["algorithms"]["tables"][0], "rows": rows}
    text = render({**ALGORITHMS, "algorithms": {**ALGORITHMS["algorithms"], "tables": [table]}})
    found = re.findall(r'<pre id="algorithm-\d+-\d+-recipe">(.*?)</pre>', text, re.DOTALL)
    assert len(found) == len(rows)
    stages = Recipe.parse(html.unescape(found[2])).rules[0].stages
    assert [type(stage).__name__ for stage in stages] == ["Cluster", "Quantize"]


def test_candidates_and_sensitivities_sort(look: Callable[..., Page]):
    page = look(TUNE)
    made = TUNE["tuning"]
    page.heading("candidate-table", "Size").find_element(page.css, "button").click()
    sizes = [int(v) for v in page.column("candidate-table", "Size")]
    assert sizes == sorted(c["bytes"] for c in made["candidates"])
    page.heading("candidate-table", "Score").find_element(page.css, "button").click()
    scores = [float(v) for v in page.column("candidate-table", "Score")]
    assert scores == pytest.approx(sorted((c["score"] for c in made["candidates"]), reverse=True))
    assert page.column("candidate-table", "Standing").count("chosen, front") == 1
    page.heading("sensitivity-table", "int4").find_element(page.css, "button").click()
    worst = min((s for s in made["sensitivity"] if s["scheme"] == "int4"), key=lambda s: s["db"])
    assert page.column("sensitivity-table", "Layer")[0] == worst["layer"]
    assert float(page.column("sensitivity-table", "int4")[0]) == pytest.approx(worst["db"], rel=1e-6)


# -- for everyone --------------------------------------------------------------------------------------------------

CONTRAST = """
const parse = (colour) => (colour.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const paper = (node) => {
  for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if ((colour[3] ?? 1) > 0) return colour;
  }
  return [255, 255, 255];
};
const bad = {};
let seen = 0;
for (const node of document.querySelectorAll("body *")) {
  const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
  if (!own || node.closest("script, .away, [hidden], option") || !node.getClientRects().length) continue;
  const style = getComputedStyle(node);
  const ink = parse(node.closest("svg") ? style.fill : style.color), under = paper(node);
  const [low, high] = [light(ink), light(under)].sort((a, b) => a - b);
  const ratio = (high + 0.05) / (low + 0.05);
  seen += 1;
  if (ratio < 4.5) bad[`${node.tagName} ${node.className.baseVal ?? node.className} on ${under}`] = ratio;
}
return [seen, bad];
"""


@pytest.mark.parametrize("results", [SMALL, TUNE], ids=["debug", "tune"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(look: Callable[..., Page], results: dict[str, Any], scheme: str):
    page = look(results, scheme=scheme)
    page.run("document.querySelectorAll('details').forEach((found) => (found.open = true))")
    page.run("document.querySelector('.expand').click()")
    seen, bad = page.run(CONTRAST)
    assert seen > 100 and bad == {}
    dark = sum(json.loads("[" + page.run("return getComputedStyle(document.body).backgroundColor")[4:-1] + "]")) < 380
    assert dark == (scheme == "dark")


@pytest.mark.parametrize("results", [SMALL, TUNE], ids=["debug", "tune"])
def test_a_screen_reader_finds_its_way(look: Callable[..., Page], results: dict[str, Any]):
    page = look(results)
    page.run("document.querySelectorAll('details').forEach((found) => (found.open = true))")
    page.run("document.querySelector('.expand').click()")
    assert page.find("html").get_attribute("lang") == "en" and page.driver.title
    assert [len(page.all(mark)) for mark in ("main", "header", "footer", "nav[aria-label]", "h1")] == [1] * 5
    levels = page.run(
        "return [...document.querySelectorAll('h1, h2, h3, h4, h5, h6')].map((h) => Number(h.tagName[1]))"
    )
    assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels))
    assert page.run("return document.querySelectorAll('th:not([scope])').length") == 0
    assert page.run("return [...document.querySelectorAll('table')].filter((t) => !t.caption).length") == 0
    ids = page.run("return [...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))
    dead = page.run(
        "return [...document.querySelectorAll('a[href]')].map((a) => a.getAttribute('href').slice(1))"
        ".filter((id) => !document.getElementById(id))"
    )
    assert dead == []
    nameless = [
        page.run("return arguments[0].outerHTML.slice(0, 120)", control)
        for selector in ("button", "input", "select", "summary", "[tabindex='0']", "[role]:not([role=status])", "nav a")
        for control in page.all(selector)
        if control.is_displayed() and not control.accessible_name
    ]
    nameless += page.run(
        "return [...document.querySelectorAll('a')].filter((a) => !(a.getAttribute('aria-label') || a.textContent.trim()))"
        ".map((a) => a.outerHTML)"
    )
    assert nameless == []
    pictures = page.run(
        "return [...document.querySelectorAll('svg')].filter((s) => !s.hasAttribute('aria-label')"
        " && s.getAttribute('aria-hidden') !== 'true').length"
    )
    assert pictures == 0


def test_motion_only_where_it_is_welcome(look: Callable[..., Page]):
    page = look(SMALL)
    for wish, behaviour in (("reduce", "auto"), ("no-preference", "smooth")):
        features = [{"name": "prefers-reduced-motion", "value": wish}]
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        assert page.run("return getComputedStyle(document.documentElement).scrollBehavior") == behaviour
