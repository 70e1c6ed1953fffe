"""The page as such: everything inside it, escaped, and readable in a browser, on a phone and printed."""

import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from mmbivit.report.page import Fact, Page, Picture, Section, Table, render
from tests.browser import headless_browser

NASTY = "<script>alert('x')</script> & \"quotes\""


def figure(width):
    drawn = Figure(figsize=(width, 3))
    drawn.subplots().plot([1, 3, 2])
    return drawn


@pytest.fixture(scope="module")
def page():
    wide = Table(["class", *(f"column {i}" for i in range(9))], [["row", *("1.000",) * 9]] * 3, "A wide table")
    return Page(
        f"Run {NASTY}",
        "A subtitle",
        [
            Section(
                "First part",
                f"What is seen. {NASTY}",
                [Picture.of(figure(12), "A wide picture"), Picture.of(figure(3), "A photo", photo=True)],
                [wide],
                facts=[Fact("AP of boxes", "0.321", "float 0.371"), Fact("Packed", "0.40 MB")],
            ),
            Section("Second part", problem=f"Not shown: {NASTY}"),
            Section("Config", details={"Config": "a_long_line = " + "x" * 300}),
        ],
        "The footer",
    )


@pytest.fixture(scope="module")
def file(page, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(render(page), encoding="utf-8")
    return path


class Reader(HTMLParser):
    """Collects tags, addresses and text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_names_that_are_no_utf_8_do_not_stop_a_page():
    assert "<h1>bad?</h1>" in render(Page("bad\udcff", "", [], ""))


def test_nothing_is_fetched_and_all_text_is_escaped(file):
    html = file.read_text()
    reader = Reader(html)
    assert "script" not in reader.tags
    assert reader.text.count("<script>alert('x')</script>") == 4  # in title, heading, text and problem
    assert all(re.match(r"data:|#", address) for address in reader.addresses)
    assert not re.search(r"url\(|@import", html)
    assert {"#first-part", "#second-part", "#config"} <= set(reader.addresses)
    assert 'id="first-part"' in html


def test_pictures_are_inside_in_their_formats(page):
    svg, png = page.sections[0].pictures
    assert svg.address.startswith("data:image/svg+xml;base64,") and png.address.startswith("data:image/png;base64,")


@pytest.fixture(scope="module")
def browser():
    with headless_browser() as started:
        yield started


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_a_browser_shows_it_at_the_width_of_a_phone_and_of_a_desk(browser, file, width):
    context = browser.new_context(viewport=dict(width=width, height=800), offline=True)
    tab = context.new_page()
    problems, requests = [], []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(file.as_uri())
    assert problems == []
    assert [url for url in requests if not url.startswith(("file://", "data:"))] == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width  # wide things scroll by themselves
    images = tab.eval_on_selector_all("img", "all => all.map(i => [i.naturalWidth, i.clientWidth])")
    assert len(images) == 2 and all(natural > 0 for natural, _ in images)
    widest = width if width > 640 else 16 * 38  # on a phone they scroll, so that their text can be read
    assert all(min(natural, 300) <= shown <= widest for natural, shown in images)
    assert tab.locator("h2").all_text_contents() == ["First part", "Second part", "Config"]
    assert tab.locator(".facts dd").all_text_contents() == ["0.321", "float 0.371", "0.40 MB"]
    assert not tab.locator("pre").is_visible()
    tab.locator("summary").click()
    assert tab.locator("pre").is_visible()
    context.close()


def test_print_shows_everything(browser, file):
    tab = browser.new_page(viewport=dict(width=794, height=1123))  # A4 at 96 dots per inch
    tab.goto(file.as_uri())
    tab.emulate_media(media="print")
    assert tab.locator("pre").is_visible()  # without a click
    assert not tab.locator("nav").is_visible()
    boxes = tab.eval_on_selector_all("table, pre, img", "all => all.map(e => [e.scrollWidth, e.clientWidth])")
    assert all(content <= shown + 1 for content, shown in boxes)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 794
    pdf = tab.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    tab.close()
