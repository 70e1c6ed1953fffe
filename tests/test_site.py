"""The documentation site: it builds without a warning, its links lead somewhere, and it has all that is public."""

import importlib
import os
import pkgutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from sphinx.util.inventory import InventoryFile

import mmbivit
from tests.browser import headless_browser

ROOT = Path(__file__).parents[1]
PHONE, DESK = dict(width=360, height=740), dict(width=1440, height=900)
OVERFLOW = "[document.documentElement.scrollWidth, window.innerWidth]"

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """The ids, links and pictures of a page."""

    def __init__(self, file: Path):
        super().__init__()
        self.ids, self.links = set(), []
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids.add(values.get("id"))
        self.links += [values[name] for name in ("href", "src") if values.get(name)]


def broken_links(folder: Path) -> list[str]:
    """Links between the pages of a folder whose file or place in it does not exist."""
    pages = {file: Page(file) for file in folder.rglob("*.html")}
    broken = []
    for file, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (file.parent / unquote(url.path)).resolve() if url.path else file
            place = unquote(url.fragment)
            if not target.is_file() or (place and target in pages and place not in pages[target].ids):
                broken.append(f"{file.relative_to(folder)}: {link}")
    return broken


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-d", folder / "doctrees"]
    result = subprocess.run(
        [*command, ROOT / "docs", folder / "html"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return folder / "html"


def test_links_lead_somewhere(site):
    assert broken_links(site) == []


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#there"></a><a href="b.html#gone"></a><img src="no.png">')
    (tmp_path / "b.html").write_text('<p id="there"><a href="https://example.org/x">elsewhere</a></p>')
    assert broken_links(tmp_path) == ["a.html: b.html#gone", "a.html: no.png"]


def test_reference_has_all_that_is_public(site):
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    documented = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    public = set()
    for module in [mmbivit, *map(importlib.import_module, packages())]:
        public |= {f"{module.__name__}.{name}" for name in getattr(module, "__all__", ()) if name[0] != "_"}
    objects = {name: resolved(name) for name in documented}
    known = {id(found) for found in objects.values()}
    missing = {name for name in public if name not in documented and id(resolved(name)) not in known}
    assert len(public) > 150 and not missing


def packages() -> list[str]:
    return [m.name for m in pkgutil.walk_packages(mmbivit.__path__, "mmbivit.") if m.ispkg]


def resolved(name: str) -> object:
    """The object of a dotted name, or the name itself where an instance alone has it."""
    try:
        return pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return name


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_pages_fit_their_window(site, size):
    with headless_browser() as browser:
        view = browser.new_page(viewport=size)
        too_wide = {}
        for file in sorted(site.rglob("*.html")):
            view.goto(file.as_uri())
            needed, has = view.evaluate(OVERFLOW)
            if needed > has:
                too_wide[file.name] = needed
        assert not too_wide
