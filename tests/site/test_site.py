"""The site as a reader has it: opened from the file system, without a network."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from playwright.sync_api import Browser, Page, expect

from docs.make.names import entries

pytestmark = pytest.mark.browser

# Theme code for diagrams, old browsers and the page of a repository asks for these; the tests
# below see that no page has what would set it off.
DORMANT = {
    "https://unpkg.com/mermaid",
    "https://unpkg.com/resize-observer-polyfill",
    "https://api.github.com/",
    "https://${e}/api/v4/projects/",
}
COMMENTS = (
    "http://www.w3.org/",
    "https://github.com/squidfunk/iframe-worker",
    "https://clipboardjs.com",
    "http://tartarus.org",
    "https://bit.ly",
    "http://lunrjs.com",
    "https://fontawesome.com",
)


class Asked(HTMLParser):
    """What a page makes a browser fetch, and its anchors and classes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.classes: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.add(given.get("id", ""))
        self.classes.update(given.get("class", "").split())
        self.links += [given["href"]] if tag == "a" and "href" in given else []
        if tag not in ("a", "meta"):
            names = ("src", "srcset", "href", "xlink:href", "data", "poster", "style")
            self.fetched += [given[name] for name in names if name in given]


@pytest.fixture(scope="module")
def html(site: Path) -> dict[str, Asked]:
    files = sorted(site.rglob("*.html"))
    return {str(file.relative_to(site)): Asked(file.read_text(encoding="utf-8")) for file in files}


def test_pages_fetch_nothing_from_a_network(html: dict[str, Asked]) -> None:
    assert len(html) > 60
    asked = {name: [u for u in page.fetched if "//" in u] for name, page in html.items()}
    assert not {name: urls for name, urls in asked.items() if urls and name != "404.html"}
    assert not [name for name, page in html.items() if page.classes & {"mermaid", "md-source"}]


def test_styles_and_scripts_fetch_nothing_from_a_network(site: Path) -> None:
    for file in site.rglob("*.css"):
        text = file.read_text(encoding="utf-8")
        assert not re.findall(r"@import|url\(\s*[\"']?(?:https?:)?//", text), file
    for file in site.rglob("*.js"):
        if "search/search_index" not in file.as_posix():  # the words of all pages, links among them
            urls = re.findall(r"(?:https?|wss?)://[^\s\"'`)]*", file.read_text(encoding="utf-8"))
            assert not [u for u in urls if not u.startswith((*DORMANT, *COMMENTS))], file


def test_links_lead_to_files_and_anchors_of_the_site(site: Path, html: dict[str, Asked]) -> None:
    dead = []
    for name, page in html.items():
        for link in page.links if name != "404.html" else ():
            path, _, anchor = link.partition("#")
            target = os.path.normpath(Path(name).parent / unquote(path)) if path else name
            there = ":" in path or (site / target).is_file()
            if not there or (anchor and target in html and unquote(anchor) not in html[target].ids):
                dead.append(f"{name}: {link}")
    assert not dead


def test_no_link_to_the_reference_stays_text(site: Path) -> None:
    unresolved = re.compile(r"</code>\]\[(?:attnkit[.\w]*)?\]")
    texts = {file: file.read_text(encoding="utf-8") for file in site.rglob("*.html")}
    assert not [file for file, text in texts.items() if unresolved.search(text)]


def test_every_entry_of_the_reference_has_its_anchor(html: dict[str, Asked]) -> None:
    ids = {one for name, page in html.items() if name.startswith("reference/") for one in page.ids}
    assert not set(entries()) - ids


def test_no_page_asks_the_network_or_is_wider_than_a_phone(site: Path, browser: Browser) -> None:
    """Every page, at 390 pixels, its requests and errors recorded."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, offline=True)
    page, asked, errors, wide = context.new_page(), [], [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    for file in sorted(site.rglob("*.html")):
        if file.name == "404.html" or "source" in file.parts:
            continue
        page.goto(file.as_uri())
        width = page.evaluate("document.documentElement.scrollWidth")
        wide += [f"{file.relative_to(site)}: {width}"] if width > 390 else []
    context.close()
    assert asked
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
    assert not errors
    assert not wide


def test_search_finds_a_word_and_leads_to_its_page(site: Path, page: Page) -> None:
    page.goto((site / "index.html").as_uri())
    page.locator("label.md-search__icon").first.wait_for(state="attached")
    page.fill("input.md-search__input", "dilated")
    found = page.locator(".md-search-result__item a", has_text="Dilated").first
    found.click()
    page.wait_for_url(re.compile(r"(masks|variants)\.html\?h="))
    assert "Dilated" in page.inner_text("article")


def test_search_works_by_the_keyboard_alone(site: Path, page: Page) -> None:
    page.goto((site / "index.html").as_uri())
    page.keyboard.press("/")
    page.keyboard.type("SlidingWindow")
    page.locator(".md-search-result__item a").first.wait_for()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile(r"/reference/masks\.html"))


@pytest.mark.parametrize("width", [1280, 390])
def test_a_notebook_shows_its_pictures(site: Path, page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto((site / "notebooks" / "1-masks.html").as_uri())
    pictures = page.locator("div.output svg, div.output img")
    sizes = [one.bounding_box() for one in pictures.all()]
    assert len(sizes) >= 3
    assert all(size and 60 <= size["width"] <= width and size["height"] >= 30 for size in sizes)
    assert not page.locator("text=_repr_html_").count()


# Of each output: how far it scrolls, its lines, and how many lines it takes on the page.
OUTPUTS = """[...document.querySelectorAll('.language-text pre')].map((pre) => {
    const code = pre.querySelector('code'), style = getComputedStyle(code);
    const high = code.clientHeight - parseFloat(style.paddingTop) - parseFloat(style.paddingBottom);
    const lines = code.textContent.replace(/\\n$/, '').split('\\n').map((line) => line.length);
    const shown = Math.round(high / parseFloat(style.lineHeight));
    return [pre.scrollWidth - pre.clientWidth, lines, shown];
})"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["start/first-plan", "notebooks/3-packed", "reference/kernel"])
def test_long_lines_wrap_and_pictures_do_not(site: Path, page: Page, name: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto((site / f"{name}.html").as_uri())
    found = [one for one in page.evaluate(OUTPUTS) if one[1] != [0]]
    assert len(found) >= 3
    for scrolls, lines, shown in found:
        assert scrolls <= (0 if width == 1280 else 340)
        assert shown == len(lines) if max(lines) <= 92 else shown > len(lines)


def test_the_explorer_of_the_first_example_opens(site: Path, page: Page) -> None:
    page.goto((site / "index.html").as_uri())
    page.locator("a:has(img)").click()
    page.wait_for_url(re.compile(r"first\.html"))
    assert "SlidingWindow(256)" in page.inner_text("h1")


def test_light_and_dark_are_switched_and_kept(site: Path, page: Page) -> None:
    page.emulate_media(color_scheme="light")
    page.goto((site / "index.html").as_uri())
    body = page.locator("body")
    expect(body).to_have_attribute("data-md-color-scheme", "default")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("label[for=__palette_1]").click()
    expect(body).to_have_attribute("data-md-color-scheme", "slate")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.goto((site / "variants.html").as_uri())
    expect(body).to_have_attribute("data-md-color-scheme", "slate")


def test_dark_is_what_a_dark_system_gets(site: Path, page: Page) -> None:
    page.emulate_media(color_scheme="dark")
    page.goto((site / "index.html").as_uri())
    expect(page.locator("body")).to_have_attribute("data-md-color-scheme", "slate")


def test_examples_are_copied_without_their_prompts(site: Path, page: Page) -> None:
    page.goto((site / "reference" / "masks.html").as_uri())
    block = page.locator(".language-pycon").filter(has_text="Causal().show(2, 4)").first
    page.evaluate("document.addEventListener('copy', () => (window.copied = `${getSelection()}`))")
    block.locator("button").first.click()
    copied = page.evaluate("window.copied").splitlines()
    lines = ["print(Causal().show(2, 4))", 'print(Causal(align="top_left").show(2, 4))']
    assert [line for line in copied if line] == lines
