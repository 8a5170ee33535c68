"""The report's page in a browser: in light and dark, at a phone's width, by keyboard, and printed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualoptim import report
from dualoptim.points import points_of

from . import browser
from .test_report import results

pytestmark = pytest.mark.skipif(browser.PROGRAM is None, reason="no Chromium is installed")

# Every text's contrast to what lies behind it, as WCAG 2.2 defines it, of what is seen; SVG's text has a fill.
CONTRAST = """(() => {
  const rgba = text => { const v = text.match(/[\\d.]+/g).map(Number); return [v[0], v[1], v[2], v[3] ?? 1] }
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3])).concat(1)
  const light = c => [0, 1, 2].map(i => c[i] / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0)
  const ratio = (a, b) => (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05)
  const found = []
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue
    const style = getComputedStyle(element)
    let behind = [], opacity = 1
    for (let e = element; e; e = e.parentElement) {
      behind.push(rgba(getComputedStyle(e).backgroundColor)); opacity *= getComputedStyle(e).opacity
    }
    const paper = behind.reverse().reduce((below, color) => over(color, below), [255, 255, 255, 1])
    const ink = rgba(element instanceof SVGElement ? style.fill : style.color)
    const seen = over([...ink.slice(0, 3), ink[3] * opacity], paper)
    found.push([walker.currentNode.data.trim().slice(0, 40), ratio(seen, paper)])
  }
  return found })()"""
# What reaches beyond the screen: a phone's window would grow with what it holds.
OVERFLOW = """[document.documentElement.scrollWidth - screen.width,
  [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !(e instanceof SVGElement)
    && e.getBoundingClientRect().right > screen.width + 1).map(e => e.outerHTML.slice(0, 80))]"""
STRUCTURE = """({
  lang: document.documentElement.lang, title: document.title, mains: document.querySelectorAll('main').length,
  levels: [...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(e => +e.tagName[1]),
  ids: [...document.querySelectorAll('[id]')].map(e => e.id),
  unnamed: [...document.querySelectorAll('svg:not([aria-hidden]), [role=region], img')]
    .filter(e => !e.getAttribute('aria-label') && !e.alt).length,
  heads: [...document.querySelectorAll('th')]
    .filter(e => !['row', 'col'].includes(e.scope) || !e.textContent.trim()).length,
  clipped: [...document.querySelectorAll('*')].filter(e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX)
    && e.tabIndex < 0).length})"""
INTERACTIVE = (
    "[...document.querySelectorAll('a[href], button, input, summary, [tabindex]')].filter(e => e.checkVisibility())"
)
FOCUSED = f"""(() => {{ const e = document.activeElement, style = getComputedStyle(e)
  return [{INTERACTIVE}.indexOf(e), style.outlineStyle != 'none' && parseFloat(style.outlineWidth) >= 2] }})()"""


def full(seeds: int = 1) -> dict[str, Any]:
    """Results with every part that a page may have."""
    made = results(forget_accuracy=[0.05, 0.10, 0.60], perplexity=[10.0, 11.0, 12.0], **MORE)
    one = {"label": "probability, relearned", "better": "lower", "format": ".3f", "group": ""}
    made["metrics"] |= {
        "unseen_accuracy": {"label": "unseen", "better": "higher", "format": ".0%"},
        "relearn_probability": one,
        "relearn_rouge_l": {**one, "label": "ROUGE-L, relearned", "group": "Attacks"},
        **{f"more_{i}": {**one, "label": f"more {i}", "group": "More"} for i in range(3)},
    }
    made |= {"counts": {"forget_accuracy": 40, "unseen_accuracy": 40}, "plane": ["forget_accuracy", "unseen_accuracy"]}
    runs = []
    layers = {f"layers.{i}": {"cosine/a/b": math.cos(i), "cancelling/a": 0.1 * i} for i in range(6)}
    made["runs"][0]["diagnostics"] = {"layers": {**layers, "all": layers["layers.0"]}}
    for entry in made["runs"]:
        entry["verdict"] = "All is well. " * 9
        entry["samples"][0]["after"] = "word" * 60
        runs += [{**entry, "seed": seed} for seed in range(seeds)]
    made["runs"] = runs
    made["points"] = points_of([(entry, {}, Path()) for entry in runs], made["plane"], made["counts"])
    return made


MORE = {name: [0.8, 0.9, 0.7] for name in ("unseen_accuracy", "relearn_probability", "relearn_rouge_l",
                                           *(f"more_{i}" for i in range(3)))}  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    grid = full() | {"planned": 3, "grid": {}}
    made = {"two seeds": [full(2)], "several runs": [full(), grid]}
    for name, several in made.items():
        (folder / f"{name}.html").write_text(report.page(*several), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


PAGES = ["two seeds", "several runs"]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_is_read_in_light_and_dark_on_a_desk_and_on_a_phone(
    name: str, dark: bool, width: int, pages: dict[str, Path], chromium: browser.Browser
) -> None:
    chromium.open(pages[name], width=width, dark=dark)
    chromium.ask("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert chromium.ask(OVERFLOW) == [0, []]
    seen = chromium.ask(CONTRAST)
    assert len(seen) > 50
    assert [text for text in seen if text[1] < 4.5] == []
    background = chromium.ask("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 150) == dark
    assert chromium.console == []
    assert pages[name].stat().st_size < 2_000_000


@pytest.mark.parametrize("name", PAGES)
def test_a_page_says_what_it_shows_to_those_who_hear_it(
    name: str, pages: dict[str, Path], chromium: browser.Browser
) -> None:
    chromium.open(pages[name])
    found = chromium.ask(STRUCTURE)
    assert (found["lang"], found["mains"]) == ("en", 1)
    assert "facts" in found["title"]
    assert found["levels"][0] == 1
    assert all(below <= above + 1 for above, below in zip(found["levels"], found["levels"][1:], strict=False))
    assert len(set(found["ids"])) == len(found["ids"])
    assert (found["unnamed"], found["heads"], found["clipped"]) == (0, 0, 0)


@pytest.mark.parametrize("name", PAGES)
def test_all_that_can_be_used_is_reached_by_the_tab_key_in_order_and_seen(
    name: str, pages: dict[str, Path], chromium: browser.Browser
) -> None:
    chromium.open(pages[name])
    count = chromium.ask(f"{INTERACTIVE}.length")
    assert count > 2
    reached = []
    for _ in range(count):
        chromium.tab()
        reached.append(chromium.ask(FOCUSED))
    assert reached == [[i, True] for i in range(count)]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_printed_on_white_with_all_that_is_folded(
    name: str, pages: dict[str, Path], chromium: browser.Browser
) -> None:
    chromium.open(pages[name], dark=True, width=700, media="print")
    assert chromium.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.ask("[...document.querySelectorAll('details > :not(summary)')].every(e => e.offsetHeight > 0)")
    assert [text for text in chromium.ask(CONTRAST) if text[1] < 4.5] == []
    assert chromium.pdf().startswith(b"%PDF-")
