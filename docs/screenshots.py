"""Make the screenshots that the documentation shows, from pages of a real run, in Chromium.

    python docs/screenshots.py RUN [--diagnosis PAGE] [--fidelity PAGE] [--study PAGE] [--out docs/figures/pages]

RUN is the folder of a finished run. It needs `pip install '.[test]'` and a Chromium on PATH, and writes PNG files of
the top of each page and of the report's token view, in a wide window and, for the report, in a phone's.
"""

import argparse
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

OUT = Path(__file__).resolve().parent / "figures/pages"
WIDE, PHONE = {"width": 1200, "height": 820}, {"width": 400, "height": 820}


def find_chromium() -> str:
    """Return the path of Chromium; raise `ValueError` where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    raise ValueError("there is no Chromium on PATH; install it (Debian: `apt install chromium`)")


def shoot_page(browser: Browser, page_file: Path, image: Path, *, size: dict[str, int], scheme: str = "light") -> None:
    """Write an image of the top of a page."""
    page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
    page.goto(page_file.resolve().as_uri())
    page.screenshot(path=image)
    shrink_image(image)


def shoot_tokens(browser: Browser, report: Path, image: Path) -> None:
    """Write an image of the token view on the training document in which fusion helped most, as it opens."""
    page = browser.new_context(viewport=WIDE).new_page()
    page.goto(report.resolve().as_uri())
    documents = page.locator("optgroup[label^=training] option")
    sums = []
    for number in range(documents.count()):
        value = documents.nth(number).get_attribute("value")
        page.select_option("#token-document", value)
        said = page.locator(".token-view > .note").first.inner_text()
        sums.append((float(said.split(", ")[-1].split()[0].replace("−", "-")), value))
    page.select_option("#token-document", min(sums)[1])
    page.locator("#tokens").screenshot(path=image)
    shrink_image(image)


def shrink_image(image: Path) -> None:
    """Keep 256 colours, in which these pages look the same at half the size."""
    Image.open(image).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(image, optimize=True)
    print(image)


def main() -> None:
    """Write the images of the pages that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    for name in ("diagnosis", "fidelity", "study"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    pages = {"report": given.run / "report.html"}
    pages |= {name: path for name in ("diagnosis", "fidelity", "study") if (path := getattr(given, name))}
    missing = [str(path) for path in pages.values() if not path.is_file()]
    if missing:
        sys.exit(f"screenshots: no file {missing[0]}; name pages that are there")
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        chromium = find_chromium()
    except ValueError as error:
        sys.exit(f"screenshots: {error}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, path in pages.items():
            shoot_page(browser, path, given.out / f"{name}.png", size=WIDE)
        shoot_page(browser, pages["report"], given.out / "report-phone.png", size=PHONE, scheme="dark")
        shoot_tokens(browser, pages["report"], given.out / "tokens.png")
        browser.close()


if __name__ == "__main__":
    main()
