"""The documentation site, built once and read in headless Chromium, with every other host blocked."""

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

import pytest

ROOT = Path(__file__).resolve().parents[1]
NUMBERED = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if re.match(r"\d+[a-z]?_", p.name))
HOWTO_PAGES = [p.stem + ".html" for p in sorted((ROOT / "nbs").glob("howto_*.ipynb"))]
MODULE_PAGES = [re.sub(r"^\d+[a-z]?_", "", p.stem) + ".html" for p in NUMBERED]
REPORT_PAGES = [p.relative_to(ROOT).with_suffix(".html").as_posix() for p in sorted((ROOT / "reports").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage"
BLOCKED = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"
pytestmark = pytest.mark.browser


# ---------------------------------------------------------------- the site and the browser


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    "The folder of the site, built from the notebooks as they are."
    if sys.version_info < (3, 11) and not shutil.which("quarto"):
        pytest.skip("on Python 3.10 the site needs Quarto")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "tools/build_site.py", "--stage", str(folder / "stage"), "--output", str(folder / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


@pytest.fixture(scope="session")
def address(site):
    "The site on a free port of localhost."

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request, client_address):  # the browser may leave a page before all of it was sent
            pass

    with Server(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    "Headless Chromium that reaches localhost only, and keeps its console for the tests."
    program, driver = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no Chromium with chromedriver (Debian: apt-get install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in [*FLAGS.split(), BLOCKED, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}", "--window-size=1400,1000"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    os.environ["SE_OFFLINE"] = "true"  # selenium must not look for a driver elsewhere
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    browser.set_page_load_timeout(60)
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium):
    "The browser with an empty console, a desktop's window and a light colour scheme; the console must stay empty."
    chromium.get_log("browser")
    yield chromium
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    messages = [entry["message"] for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not messages


PROBE = """
const shown = element => { const box = element.getBoundingClientRect(); return box.width > 1 && box.height > 4; };
document.querySelectorAll("details").forEach(element => element.open = true);
return {
  title: document.title,
  heading: document.querySelector("h1")?.innerText ?? "",
  words: document.querySelector("main").innerText.split(/\\s+/).length,
  formulas: document.querySelectorAll("main math").length,
  flat: [...document.querySelectorAll("main math")].filter(element => !shown(element)).map(element => element.textContent),
  rootless: [...document.querySelectorAll("main msqrt")].filter(root => shown(root) && root.getBoundingClientRect().width - root.lastElementChild.getBoundingClientRect().right + root.firstElementChild.getBoundingClientRect().left < 4).map(element => element.textContent),
  raw: [...document.querySelectorAll(".math")].filter(element => !element.querySelector("math")).map(element => element.textContent),
  images: document.querySelectorAll("main img").length,
  broken: [...document.querySelectorAll("img")].filter(image => !image.naturalWidth).map(image => image.src.slice(0, 80)),
  signatures: document.querySelectorAll("main h3.anchored, main h3[id]").length,
  background: getComputedStyle(document.body).backgroundColor,
};
"""


def as_screen(browser, width: int, height: int, mobile: bool = False):
    "Show pages as on a screen of this size."
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile})


def as_phone(browser):
    as_screen(browser, 390, 844, mobile=True)


def in_scheme(browser, scheme: str):
    "Show pages to someone who prefers `light` or `dark`."
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})


def read(browser, url: str) -> dict:
    "Open a page, wait until its pictures are there, and say what is on it; what no page may have is checked here."
    browser.get(url)
    browser.set_script_timeout(30)
    browser.execute_async_script("""
        const done = arguments[arguments.length - 1];
        Promise.all([document.fonts.ready, ...[...document.images].map(i => i.decode().catch(() => 0))]).then(() => done());
    """)
    page = browser.execute_script(PROBE)
    assert page["title"] and page["words"] > 20, page
    assert not page["broken"], f"pictures that do not load: {page['broken']}"
    assert not page["raw"], f"formulas that are not drawn: {page['raw']}"
    assert not page["flat"], f"formulas without a size: {page['flat']}"
    assert not page["rootless"], f"roots without their sign: {page['rootless']}"
    return page


# ---------------------------------------------------------------- tests


def test_home_page(browser, address):
    page = read(browser, address)
    assert page["heading"] == "hybrid_ir"
    text = browser.find_element("tag name", "main").text
    assert "make run" in text and "make test" in text


@pytest.mark.parametrize("name", MODULE_PAGES)
def test_module_page(browser, address, name):
    page = read(browser, address + name)
    assert page["signatures"] >= 1
    sidebar = browser.find_element("id", "quarto-sidebar")
    active = [link for link in sidebar.find_elements("css selector", "a.active, .active a") if link.get_attribute("href").endswith("/" + name)]
    assert active, f"{name} is not in the sidebar"


@pytest.mark.parametrize("name", HOWTO_PAGES)
def test_howto_page(browser, address, name):
    read(browser, address + name)
    links = [link.get_attribute("href") for link in browser.find_element("id", "quarto-sidebar").find_elements("css selector", "a")]
    assert address + name in links, f"{name} is not in the sidebar"


@pytest.mark.parametrize("name", REPORT_PAGES)
def test_report_page(browser, address, name):
    page = read(browser, address + name)
    assert page["images"] >= 1, "a report without a figure"


def test_there_is_a_report_with_figures():
    assert REPORT_PAGES, "no executed notebook in reports/: `make run` writes one"


def test_formulas_are_drawn_without_a_network(browser, address):
    pages = [read(browser, address + name) for name in ["index.html", *MODULE_PAGES]]
    assert sum(page["formulas"] for page in pages) >= 3
    font = browser.execute_script("return [...document.fonts].filter(f => f.family.includes('Site Math')).map(f => f.status)")
    assert font and "error" not in font


SEARCHES = {"hybrid": "samplers.html", "rank_distance": "metrics.html", "gradient caching": "training.html", "load_benchmark": "benchmarks.html"}


@pytest.mark.parametrize(("words", "page"), SEARCHES.items())
def test_search_finds_words_and_leads_to_them(browser, address, words, page):
    browser.get(address)
    generator = browser.execute_script("return document.querySelector('meta[name=generator]').content")
    if not generator.startswith("smalldocs"):
        with urllib.request.urlopen(address + "search.json") as reply:
            assert words.split()[0].encode() in reply.read()
        return
    from selenium.webdriver.support.ui import WebDriverWait

    field = next(f for f in browser.find_elements("css selector", ".smalldocs-search input") if f.is_displayed())
    field.send_keys(words)
    results = WebDriverWait(browser, 20).until(lambda b: [r for r in b.find_elements("css selector", "a.search-result") if r.is_displayed()])
    targets = [result.get_attribute("href") for result in results]
    assert any(urldefrag(target)[0] == address + page for target in targets), targets
    is_source = [target.startswith(address + "source/") for target in targets]
    assert is_source == sorted(is_source), "source code comes last"
    headings = browser.execute_script("return [...document.querySelectorAll('a.search-result')].map(r => (r.querySelector('.search-result-section') ?? r.querySelector('.search-result-title')).textContent.toLowerCase())")
    named = [words in heading for heading, source in zip(headings, is_source) if not source]
    assert named[0] or not any(named), "titles and headings come first"
    results[0].click()
    WebDriverWait(browser, 20).until(lambda b: urldefrag(b.current_url)[0] == urldefrag(targets[0])[0])
    assert words.split()[0].lower() in browser.find_element("tag name", "main").text.lower()


STUDY_PAGES = [p.stem + ".html" for p in sorted((ROOT / "nbs").glob("*.ipynb")) if p not in NUMBERED and not p.stem.startswith("howto_")]
ALL_PAGES = [*STUDY_PAGES, *HOWTO_PAGES, *MODULE_PAGES, *REPORT_PAGES]
OUTSIDE = """
    const scrolls = element => element && (["auto", "scroll"].includes(getComputedStyle(element).overflowX) || scrolls(element.parentElement));
    return [...document.querySelectorAll("main *")].filter(e => e.checkVisibility() && e.getBoundingClientRect().right > arguments[0] && !scrolls(e)).map(e => e.outerHTML.slice(0, 80));
"""


@pytest.mark.parametrize("name", ALL_PAGES)
def test_phone_width_needs_no_sideways_scrolling(browser, address, name):
    as_phone(browser)
    read(browser, address + name)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390  # not innerWidth: a phone zooms out until all fits
    assert not browser.execute_script(OUTSIDE, 391), "cut off, and cannot be scrolled"
    assert not browser.execute_script("return [...document.querySelectorAll('main :is(h1, h2, h3, h4, p, li)')].filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth && !e.querySelector('math')).map(e => e.textContent.slice(0, 80))"), "a word that is longer than its line"


def test_previous_and_next_lead_through_the_sidebar(site):
    "From the home page, each `next` is the next page of the sidebar, and each `previous` the one before."

    def hrefs(page: str, pattern: str) -> list[str]:
        "The pages that the links lead to, from the root of the site."
        found = re.findall(pattern, (site / page).read_text(encoding="utf-8"), re.S)
        return [urlparse(urljoin(f"http://site/{page}", link)).path.strip("/") for link in found]

    in_order = list(dict.fromkeys(hrefs("index.html", r'<a href="([^"#]+)" class="sidebar-item-text sidebar-link')))
    assert set(in_order) == {*STUDY_PAGES, *HOWTO_PAGES, *MODULE_PAGES, *REPORT_PAGES}
    for before, here, after in zip([[]] + [[page] for page in in_order], in_order, [[page] for page in in_order[1:]] + [[]]):
        assert hrefs(here, r'nav-page-previous">\s*<a href="([^"]+)"') == before, here
        assert hrefs(here, r'nav-page-next">\s*<a href="([^"]+)"') == after, here


def brightness(page: dict) -> float:
    "The mean of the background's three colours, 0 to 255."
    return sum(map(float, re.findall(r"[\d.]+", page["background"])[:3])) / 3


def test_dark_mode_is_dark(browser, address):
    light = brightness(read(browser, address))
    in_scheme(browser, "dark")
    dark = brightness(read(browser, address))
    assert light > 200 and dark < 80


CONTRAST = """
const channels = text => { const n = text.match(/[\\d.]+/g).map(Number); return text.startsWith("color(") ? [...n.slice(0, 3).map(v => 255 * v), n[3] ?? 1] : [...n.slice(0, 3), n[3] ?? 1]; };
const onto = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
const luminance = colour => colour.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = element => {
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.unshift(channels(getComputedStyle(e).backgroundColor));
  return layers.reduce((below, layer) => onto(layer, below), [255, 255, 255]);
};
const opacity = element => { let all = 1; for (let e = element; e; e = e.parentElement) all *= getComputedStyle(e).opacity; return all; };
const found = {}, seen = new Set();
const texts = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
while (texts.nextNode()) {
  const element = texts.currentNode.parentElement, style = getComputedStyle(element);
  if (!texts.currentNode.data.trim() || seen.has(element) || style.visibility !== "visible" || !element.checkVisibility()) continue;
  seen.add(element);
  const below = behind(element), ink = channels(style.color), [dark, light] = [luminance(below), luminance(onto([...ink.slice(0, 3), ink[3] * opacity(element)], below))].sort((a, b) => a - b);
  const kind = element.closest("td, th") ? "table" : element.closest("pre") ? "code" : "text", contrast = (light + 0.05) / (dark + 0.05);
  if (contrast < (found[kind]?.contrast ?? 99)) found[kind] = {contrast, text: element.innerText.slice(0, 40), colour: style.color, background: below.map(Math.round).join()};
}
return found;
"""


READ_IN_LIGHT = ["index.html", "method.html", "evaluation.html", *HOWTO_PAGES, *REPORT_PAGES[:3]]


@pytest.mark.parametrize(("scheme", "pages"), [("light", READ_IN_LIGHT), ("dark", ALL_PAGES)])
def test_pages_can_be_read_on_a_desktop(browser, address, scheme, pages):
    "Text, tables and code stand out from what is behind them, and nothing runs out of its column."
    as_screen(browser, 1400, 900)
    in_scheme(browser, scheme)
    pale, wide, kinds = {}, {}, set()
    for name in pages:
        assert (brightness(read(browser, address + name)) < 80) == (scheme == "dark")
        found = browser.execute_script(CONTRAST)
        kinds |= found.keys()
        pale |= {(name, kind): worst for kind, worst in found.items() if worst["contrast"] < 4.5}
        column, scrolled = browser.execute_script("return [document.querySelector('main').getBoundingClientRect().right, document.documentElement.scrollWidth]")
        outside = browser.execute_script(OUTSIDE, column + 1)
        if scrolled > 1400 or outside:
            wide[name] = (scrolled, outside[:3])
    assert kinds == {"text", "table", "code"}
    assert not pale
    assert not wide


def test_pictures_do_not_glare_in_the_dark(browser, address):
    in_scheme(browser, "dark")
    read(browser, address + "method.html")
    styles = browser.execute_script("return [...document.querySelectorAll('main img')].map(i => getComputedStyle(i)).map(s => [s.backgroundColor, s.filter])")
    assert styles and all(background == "rgb(255, 255, 255)" and "brightness" in dimmed for background, dimmed in styles)  # black labels on a card, and the card is dimmed


def test_a_figure_opens_in_its_own_size(browser, address):
    from selenium.webdriver.support.ui import WebDriverWait

    as_phone(browser)
    read(browser, address)
    picture = browser.find_element("css selector", "main img.shrunken")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", picture)
    picture.click()
    opened = browser.find_element("css selector", "dialog[open] img")
    assert opened.size["width"] > picture.size["width"]
    opened.click()
    WebDriverWait(browser, 10).until(lambda b: not b.find_elements("css selector", "dialog"))  # "close" comes after the click has returned


def test_home_page_says_all_on_one_screen(browser, address):
    as_screen(browser, 1400, 900)
    read(browser, address)
    ends = browser.execute_script("""
        const end = element => element.getBoundingClientRect().bottom;
        return {answer: end(document.querySelector("main .cell-output-markdown")), figure: end(document.querySelector("main img")), commands: end(document.querySelector("main pre"))};
    """)
    assert ends["answer"] < ends["figure"] < ends["commands"] <= 900, ends


def test_navigation_opens_on_a_phone(browser, address):
    as_phone(browser)
    read(browser, address)
    link = browser.find_element("css selector", "#quarto-sidebar a[href*='method']")
    assert not link.is_displayed()
    browser.find_element("css selector", ".quarto-secondary-nav .quarto-btn-toggle").click()
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 10).until(lambda b: link.is_displayed() and 0 <= link.location["x"] < 390)
    top, bottom, header, first = browser.execute_script("""
        const sidebar = document.querySelector("#quarto-sidebar"), place = element => element.getBoundingClientRect();
        return [place(sidebar).top, place(sidebar).bottom, place(document.querySelector("#quarto-header")).bottom, place(sidebar.querySelector("a")).top];
    """)
    assert header - 1 <= top < first and bottom <= 845, "its first and last links must be in reach"


class Links(HTMLParser):
    "The links, the files that are loaded, and the anchors of a page."

    def __init__(self, text: str):
        super().__init__()
        self.links, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.update(v for k, v in attributes.items() if k in ("id", "name") and v)
        self.links += [(tag, v) for k, v in attributes.items() if k in ("href", "src") and v]


def test_every_link_inside_the_site_leads_somewhere(site, address):
    pages, waiting, broken, loaded_elsewhere = {}, [address + "index.html"], [], []
    links = []
    while waiting:
        url = waiting.pop()
        if url in pages:
            continue
        try:
            with urllib.request.urlopen(url) as reply:
                is_page = reply.headers.get_content_type() == "text/html"
                pages[url] = Links(reply.read().decode()) if is_page else None
        except urllib.error.HTTPError as error:
            pages[url] = None
            broken.append(f"{error.code} {url}")
            continue
        for tag, link in pages[url].links if pages[url] else []:
            if urlparse(link).scheme in ("data", "mailto", "javascript"):
                continue
            target, anchor = urldefrag(urljoin(url, link))
            if not target.startswith(address):
                if tag in ("script", "img", "link", "iframe", "source"):
                    loaded_elsewhere.append(f"{url} loads {link}")
                continue
            target = target + "index.html" if target.endswith("/") else target
            waiting.append(target)
            links.append((url, target, unquote(anchor)))
    broken += [f"{url} -> {target}#{anchor}" for url, target, anchor in links if anchor and pages.get(target) and anchor not in pages[target].anchors]
    assert not broken
    assert not loaded_elsewhere
    reached = {url.removeprefix(address) for url in pages}
    assert {p.relative_to(site).as_posix() for p in site.rglob("*.html")} <= reached, "a page that no link leads to"
    assert {*HOWTO_PAGES, *MODULE_PAGES, *REPORT_PAGES} <= reached


def test_no_page_names_a_path_of_this_machine(site):
    places = re.compile(rf"{re.escape(str(ROOT))}|(?<![\w.-])/(?:work|root)/\S{1,80}|/site-packages/\S{1,80}")  # bounded: pictures are lines of a million characters
    found = {page.name: places.findall(page.read_text(encoding="utf-8"))[:3] for page in site.rglob("*.html")}
    assert not {name: paths for name, paths in found.items() if paths}
