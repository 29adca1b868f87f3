"""Pictures of a report for the documentation.

Use: python tests/make_screenshots.py REPORT.html docs/report

writes docs/report_desktop.png (the curves), docs/report_dark.png and docs/report_phone.png (two dialogues
of one profile).
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright
from reports.chromium import launch

# name: (width, height, colours, where the page is scrolled to)
VIEWS = {
    "desktop": (1120, 900, "light", "h1"),
    "dark": (1120, 900, "dark", "#browser"),
    "phone": (390, 844, "light", ".tools"),
}


def main(report: str, prefix: str) -> None:
    with sync_playwright() as driver:
        browser = launch(driver)
        for name, (width, height, scheme, selector) in VIEWS.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(Path(report).absolute().as_uri())
            page.wait_for_selector(".panes article")
            page.eval_on_selector(selector, "(element) => element.scrollIntoView()")
            page.screenshot(path=f"{prefix}_{name}.png")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
