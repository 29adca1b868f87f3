"""The page in headless Chromium: quick, quiet, inert to what models wrote, and usable on a phone and at night.

Skipped where there is no Chromium; see chromium.py.
"""

import contextlib
import re
import time

import pytest

from rlver_jax.reports import page
from rlver_jax.reports.sources import read_runs
from tests.reports.chromium import launch
from tests.reports.conftest import HOSTILE, WISHES

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright (extra `test`)")


@contextlib.contextmanager
def started():
    """Playwright's driver; its Node.js needs libraries that small installations of Linux lack."""
    manager = playwright.sync_playwright()
    try:
        driver = manager.__enter__()
    except Exception as error:  # playwright raises a bare Exception
        pytest.skip(f"playwright's own program doesn't start here ({error}); on Debian: apt-get install libatomic1")
    try:
        yield driver
    finally:
        manager.__exit__(None, None, None)


@pytest.fixture(scope="module")
def chromium():
    with started() as driver:
        try:
            browser = launch(driver)
        except FileNotFoundError as error:
            pytest.skip(str(error))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(sixty_steps, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page.render(read_runs([sixty_steps]), 5_000_000)[0], encoding="utf-8")
    return file


class Opened:
    """A page that has been opened, with what it complained of and asked for."""

    def __init__(self, browser, report, **options):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page = self.context.new_page()
        self.complaints, self.requests = [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        began = time.monotonic()
        self.page.goto(report.as_uri())
        self.page.wait_for_selector(".panes article")
        self.seconds = time.monotonic() - began

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()

    def choose(self, **values):
        for name, label in values.items():
            self.page.select_option(f"select[name={name}]", label=label)

    @property
    def count(self):
        return self.page.inner_text("#count")


@pytest.fixture
def opened(chromium, report):
    with Opened(chromium, report) as one:
        yield one


def test_it_opens_in_two_seconds_without_a_word_and_asks_for_nothing(chromium, report):
    seconds = []
    for _ in range(3):  # the machine may be busy with something else
        with Opened(chromium, report) as one:
            assert one.complaints == []
            assert one.requests == [report.as_uri()]
            seconds.append(one.seconds)
    assert min(seconds) <= 2.0


def test_markup_in_a_reply_is_shown_as_text(opened):
    opened.choose(step="60")
    opened.page.fill("input[name=search]", "window.broken")
    playwright.expect(opened.page.locator(".list button")).to_have_count(1)
    opened.page.click(".list button")
    assert HOSTILE in opened.page.inner_text(".policy .say >> nth=0")
    assert opened.page.inner_text(".policy .thought >> nth=0") == HOSTILE
    assert HOSTILE in opened.page.inner_text(".user .notes >> nth=0")
    assert opened.page.evaluate("window.broken") is None
    assert opened.page.locator("article img, article script").count() == 0
    assert opened.complaints == []


def test_dialogues_are_filtered(opened):
    assert opened.count == "448 of 448 dialogues"
    opened.choose(step="10")
    assert opened.count == "64 of 448 dialogues"
    opened.choose(intention="advice")
    assert opened.count == "22 of 448 dialogues", "numbers 0, 3, …, 63"
    opened.choose(step="60", outcome="success")
    assert opened.count == "0 of 448 dialogues", "the last emotion is 40 + 6 · 6 = 76"
    opened.choose(outcome="between")
    assert opened.count == "22 of 448 dialogues"
    opened.choose(intention="all", outcome="all", step="all")
    assert opened.page.locator(".list button[data-index]").count() == 100
    opened.page.click(".list button.more")
    assert opened.page.locator(".list button[data-index]").count() == 200


def test_before_and_after_stand_side_by_side(opened):
    articles = opened.page.locator(".panes article")
    assert [articles.nth(i).locator("h3").inner_text() for i in range(2)] == ["step 1", "step 60"]
    boxes = [articles.nth(i).bounding_box() for i in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    opened.page.click("button[name=next]")
    assert re.search(r"^p1, dialogue 1\b", articles.nth(0).locator("small").nth(0).inner_text())
    assert "emotion 40 → 76 (+36)" in articles.nth(1).inner_text()
    opened.page.select_option("select[name=compare]", label="step 30, 58 at the end")
    assert [articles.nth(i).locator("h3").inner_text() for i in range(2)] == ["step 30", "step 60"]
    opened.page.select_option("select[name=compare]", label="– nothing –")
    assert articles.count() == 1


def test_a_dialogue_is_shown_whole(opened):
    opened.choose(step="60")
    opened.page.click(".list button >> nth=5")
    article = opened.page.locator(".panes article")
    assert WISHES["to be <b>left</b> alone"] in article.inner_text()
    assert article.locator(".policy").count() == 6
    assert article.locator(".thought").count() == 6
    assert article.locator(".meter").all_inner_texts() == [
        "emotion 40",
        *(f"emotion {emotion}\n+6" for emotion in range(46, 77, 6)),
    ]
    opened.page.check("input[name=brief]")
    assert not article.locator(".thought >> nth=0").is_visible()
    assert article.locator(".policy .say >> nth=0").is_visible()


def test_a_touched_chart_says_its_numbers(opened):
    figure = opened.page.locator("figure", has=opened.page.locator("h3", has_text="Emotion at the end")).first
    figure.scroll_into_view_if_needed()
    figure.locator("rect.hit").nth(29).hover()
    assert figure.locator("output").inner_text() == "step 30 · 55.00 ± 10.00"


def test_a_phone_needs_no_scrolling_sideways_and_reads_numbers(chromium, report):
    with Opened(chromium, report, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True) as one:
        assert one.page.evaluate("document.documentElement.scrollWidth") <= 360
        sizes = one.page.evaluate(
            "[...document.querySelectorAll('figure text')].map((t) => t.getBoundingClientRect().height)"
        )
        assert min(sizes) >= 9, "CSS pixels"
        one.page.locator(".list button").nth(2).tap()
        assert one.page.locator(".panes article").count() == 1
        assert one.page.locator(".panes article").bounding_box()["width"] <= 360
        assert one.complaints == []


def luminance(color):
    """Relative luminance (WCAG 2.2)."""
    values = [int(v) / 255 for v in re.findall(r"\d+", color)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, selector, ground, what="color"):
    style = "(e, p) => getComputedStyle(e)[p]"
    front, back = (
        one.page.eval_on_selector(selector, style, what),
        one.page.eval_on_selector(ground, style, "backgroundColor"),
    )
    light, dark = sorted((luminance(front), luminance(back)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_by_day_and_by_night(chromium, report, scheme):
    """WCAG AA: 4.5 for text, 3 for lines."""
    with Opened(chromium, report, color_scheme=scheme) as one:
        ground = luminance(one.page.eval_on_selector("body", "(e) => getComputedStyle(e).backgroundColor"))
        assert (ground > 0.9) if scheme == "light" else (ground < 0.05)
        assert contrast(one, "h1", "body") >= 7
        for selector in ("p.soft", ".thought", ".who", ".up"):
            assert contrast(one, selector, "body") >= 4.5, selector
        assert contrast(one, "figcaption", "figure") >= 4.5
        assert contrast(one, "figure text", "figure", "fill") >= 4.5
        assert contrast(one, "path.line", "figure", "stroke") >= 3
