"""Pictures of the web page for the documents, with the default weights and photographs of scikit-image.

python tests/page_pictures.py [--output docs/pictures]

app_empty.png, app_result.png and app_folder.png are 1280 pixels wide, app_phone.png 390. Needs Chromium.
"""

import argparse
import io
import shutil
import tempfile
import threading
import time
from pathlib import Path

import skimage.data
from PIL import Image
from playwright.sync_api import sync_playwright

from zipir_jax import app
from zipir_jax.restorer import Restorer

SECONDS = 600  # that a restoration may take


def photograph(name: str, side: int) -> dict:
    """A photograph, shrunk to a longer side of so many pixels, as the browser uploads it."""
    picture = Image.fromarray(getattr(skimage.data, name)())
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=75)
    return {"name": f"{name}.jpg", "mimeType": "image/jpeg", "buffer": written.getvalue()}


def save(page, path: Path) -> None:
    """What the page shows from its top to its end, in few colours: large files make a slow repository."""
    page.mouse.move(0, 0)
    time.sleep(1)  # fades
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    few = picture.quantize(256, Image.Quantize.MAXCOVERAGE)
    for box in page.locator(".compare").all():  # but the photograph would show the edges between them
        box = box.bounding_box()
        corners = tuple(map(round, (box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"])))
        few.paste(picture.crop(corners).quantize(palette=few, dither=Image.Dither.FLOYDSTEINBERG), corners)
    few.save(path, optimize=True)
    print(f"{path}: {picture.width} x {picture.height} pixels, {path.stat().st_size} bytes")


def take(browser, address: str, output: Path) -> None:
    def visit(width):
        page = browser.new_page(viewport={"width": width, "height": 700})
        page.set_default_timeout(1000 * SECONDS)
        page.goto(address)
        page.get_by_role("button", name="Restore", exact=True).wait_for()
        return page

    save(visit(1280), output / "app_empty.png")
    for width, name, side, path in (
        (1280, "chelsea", 400, "app_result.png"),
        (390, "coffee", 300, "app_phone.png"),
    ):
        page = visit(width)
        page.locator("input[type=file]").first.set_input_files(photograph(name, side))
        page.locator(".picture").wait_for()
        if width > 390:
            page.get_by_role("button", name="More").click()
        page.get_by_role("button", name="Restore", exact=True).click()
        page.locator(".compare").wait_for()
        save(page, output / path)
    page = visit(1280)
    page.get_by_role("tab", name="Folder of photographs").click()
    broken = photograph("coffee", 160) | {"name": "half.jpg"}
    broken["buffer"] = broken["buffer"][:1500]
    photographs = [photograph("astronaut", 160), broken, photograph("chelsea", 160)]
    page.locator("input[type=file]").last.set_input_files(photographs)
    page.get_by_role("button", name="Restore all").click()
    page.get_by_text("2 of 3 restored.").wait_for()
    save(page, output / "app_folder.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("docs/pictures"))
    output = parser.parse_args().output
    listening = app.listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = app.make_server(
            Restorer.load(), "default", Path(folder), "127.0.0.1", port, 64_000_000, 64_000_000
        )
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            take(browser, f"http://127.0.0.1:{port}/", output)
        finally:
            server.should_exit = True
            browser.close()
            thread.join()


if __name__ == "__main__":
    main()
