"""The pages in a real browser, and that the check of pages sees what it is there for."""

import pytest
from browser import Browser, check_page, needs_browser
from fake_runs import fake_records, write_run
from fake_tools import add_hang, add_profiling, add_routing, add_tokenizer, with_ranks

from dmoe.observe.report import write_comparison, write_report

pytestmark = needs_browser

OPEN_ALL = "document.querySelectorAll('details').forEach(d => d.open = true)"
GOOD = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>good</title><style>:root { color-scheme: light dark; } body { background: #fff; color: #111; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #eee; } }</style></head>
<body>text</body></html>"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as one:
        yield one


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a run with a long-name-that-does-not-break-into-parts-at-all"
    records = with_ranks(fake_records(5, 8, 300, eval_every=100))
    records.append({"kind": "event", "step": 240, "message": "not finite: " + "layers.2.moe.experts." * 8})
    write_run(folder, records, 300, 5, 8)
    add_routing(folder, (100, 200, 300), layers=5)
    add_tokenizer(folder)
    add_profiling(folder)
    add_hang(folder)
    return folder


def test_report_of_a_run_with_everything(browser, full_run):
    page = write_report(full_run, png=False)
    check_page(browser, page, script=OPEN_ALL)
    browser.open(page)
    # A layer is picked with a click on its map, which opens it over the whole width and closes the one before.
    before = browser.evaluate("document.querySelector('#load-layer-1 img').clientWidth")
    for layer in (1, 3):
        browser.evaluate(f"document.querySelector('#load-layer-{layer} summary').click()")
    assert browser.evaluate("[...document.querySelectorAll('#load-maps details[open]')].map(d => d.id)") == [
        "load-layer-3"
    ]
    assert browser.evaluate("document.querySelector('#load-layer-3 img').clientWidth") > 4 * before
    assert browser.evaluate("document.querySelector('#load-layer-3 .beside').checkVisibility()")
    # Every picture has a size, and text of its own to read.
    assert browser.evaluate("[...document.querySelectorAll('figure svg')].every(s => s.clientHeight > 100)")
    assert browser.evaluate("[...document.querySelectorAll('figcaption p')].every(p => p.innerText.length > 20)")


def test_dense_run_and_comparison(browser, full_run, tmp_path):
    dense = write_run(tmp_path / "dense", fake_records(0, steps=100), layers=0)
    check_page(browser, write_report(dense, png=False), script=OPEN_ALL)
    other = write_run(tmp_path / "other", fake_records(3, 16, 100, seed=2), 100, 3, 16)
    check_page(browser, write_comparison(full_run, other, png=False), script=OPEN_ALL)


FAULTS = {
    "console": ("<script>console.error('broken thing')</script>", "broken thing"),
    "warning": ("<script>console.warn('odd thing')</script>", "odd thing"),
    "syntax": ("<script>let = ;</script>", "SyntaxError"),
    "exception": ("<script>setTimeout(() => absent(), 0)</script>", "absent is not defined"),
    "request": ("<script src='http://127.0.0.1:9/x.js'></script>", "request: http://127.0.0.1:9/x.js"),
    "file": ("<link rel='stylesheet' href='absent.css'>", "not loaded"),
    "image": ("<img src='data:image/png;base64,AAAA' alt='a'>", "broken image 'a'"),
    "overflow": ("<p style='width: 900px'>wide</p>", "400 pixels wide: 9\\d\\d > 400: P"),
    "unreadable": ("<style>body { color: #888 !important; }</style>", "contrast"),
    "one theme": (
        "<style>body { background: #fff !important; color: #111 !important; }</style>",
        "dark, 1280 pixels wide: not in the theme",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_check_sees(browser, tmp_path, name):
    html, complaint = FAULTS[name]
    path = tmp_path / "page.html"
    path.write_text(GOOD.replace("</body>", html + "</body>"))
    with pytest.raises(AssertionError, match=complaint):
        check_page(browser, path)


def test_check_lets_a_good_page_pass_also_after_a_bad_one(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(GOOD)
    check_page(browser, path)
    with pytest.raises(AssertionError, match="from a click"):
        check_page(browser, path, script="console.error('from a click')")
