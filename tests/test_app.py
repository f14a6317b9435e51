"""The web page, in headless Chromium and by requests that no browser would send."""

import asyncio
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import socket
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import ExifTags, Image

from zipir_jax import app
from zipir_jax.comparison import slider_html
from zipir_jax.restorer import Restorer

gradio = pytest.importorskip("gradio", reason="the web page needs gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="the web page is tested with playwright")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
# Gradio's count of its requests, by pandas.
pytestmark = [
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting'"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and "REQUIRE_CHROMIUM" not in os.environ, reason="there is no Chromium"
)
SECONDS = int(os.environ.get("APP_SECONDS", 60))  # that a slow machine may take for anything
LARGEST_FILE, LARGEST_PIXELS = 300_000, 1_000_000


class HeldRestorer(Restorer):
    """Stops at each report of progress while `held` is set, as a large photograph would for a long time."""

    held = threading.Event()
    ended: list = []  # noqa: RUF012

    def restore(self, *arguments, progress, **options):
        def slowly(phase, done):
            progress(phase, done)
            while self.held.is_set():
                time.sleep(0.02)
                progress(phase, done)

        try:
            return super().restore(*arguments, progress=slowly, **options)
        finally:
            self.ended.append(True)


@pytest.fixture(scope="module")
def served(tiny_weights, quick_compile, tmp_path_factory):
    """(port, folder of the visitors' files) of a server with tiny weights."""
    loaded = Restorer.load(tiny_weights)
    restorer = HeldRestorer(loaded.config, loaded.weights)
    folder = tmp_path_factory.mktemp("visitors")
    listening = app.listen("127.0.0.1", 0)
    port = listening.getsockname()[1]
    server = app.make_server(
        restorer,
        str(tiny_weights),
        folder,
        "127.0.0.1",
        port,
        LARGEST_FILE,
        LARGEST_PIXELS,
        ("Photos.example", "b.example"),
    )
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    until(lambda: server.started)
    yield port, folder
    server.should_exit = True
    thread.join(SECONDS)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, served):
    """`visit()` opens the page as another user; at the end, no page may have asked another server, or failed."""
    HeldRestorer.held.clear()
    problems, contexts = [], []

    def visit(**options):
        context = chromium.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(1000 * SECONDS)
        page = context.new_page()
        here = f"http://127.0.0.1:{served[0]}/"

        def asked(request):
            if not request.url.startswith((here, "data:", "blob:")):
                problems.append(f"asked {request.url}")

        page.on("request", asked)
        page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(here)
        page.get_by_role("button", name="Restore", exact=True).wait_for()
        return page

    yield visit
    HeldRestorer.held.clear()
    for context in contexts:
        context.close()
    assert problems == []


def until(condition):
    for _ in range(20 * SECONDS):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("that took too long")


def photograph(seed=0, size=(48, 32), **options):
    """JPEG file, width x height, of a piece of a photograph."""
    pixels = skimage.data.astronaut()[10 * seed :, 10 * seed :][: size[1], : size[0]]
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "JPEG", quality=95, **options)
    return written.getvalue()


def drop(page, *files):
    """Drop (name, bytes) into the tab that is open."""
    page.locator("input[type=file]:visible, .tabitem:visible input[type=file]").first.set_input_files(
        [{"name": name, "mimeType": "image/jpeg", "buffer": data} for name, data in files]
    )


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def set_scale(page, scale):
    field = page.get_by_role("spinbutton").locator("visible=true").first
    field.fill(str(scale))
    field.press("Enter")


def download(page, name):
    button = page.get_by_role("button", name=name).or_(page.get_by_role("link", name=name)).first
    playwright.expect(button).to_be_enabled()
    with page.expect_download() as started:
        button.click()
    return started.value.suggested_filename, Path(started.value.path()).read_bytes()


def visible_part(page):
    """Percent of the slider's width that shows the photograph before."""
    clip = page.locator(".compare .before").evaluate("image => getComputedStyle(image).clipPath")
    cut = page.locator(".compare").evaluate(
        "box => parseFloat(getComputedStyle(box).getPropertyValue('--at'))"
    )
    assert clip.startswith("inset(0")
    return cut


@needs_chromium
def test_restore_slide_download(visit):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "A camera"
    page = visit()
    drop(page, ("harbour.jpg", photograph(exif=exif)))
    picture = page.locator(".picture img")
    picture.wait_for()
    playwright.expect(picture).to_have_js_property("naturalWidth", 32)  # upright, once it is loaded
    playwright.expect(picture).to_have_js_property("naturalHeight", 48)
    set_scale(page, 2)
    page.get_by_text("32 x 48 to 64 x 96 pixels").wait_for()
    press(page, "Restore")
    page.locator(".compare").wait_for()

    box = page.locator(".compare").bounding_box()
    assert visible_part(page) == 50
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 5, box["y"] + box["height"] / 3, steps=4)
    page.mouse.up()
    dragged = visible_part(page)
    assert abs(dragged - 20) < 4
    slider = page.get_by_role("slider", name="How much is shown as before")
    slider.press("ArrowRight")
    assert visible_part(page) == dragged + 0.5
    slider.press("Home")
    assert visible_part(page) == 0

    name, data = download(page, "Download the photograph")
    assert name == "harbour_x2.png"
    with Image.open(io.BytesIO(data)) as restored:
        assert restored.size == (64, 96)
        assert restored.getexif()[ExifTags.Base.Make] == "A camera"
        assert restored.getexif().get(ExifTags.Base.Orientation, 1) == 1
    name, data = download(page, "Download its settings")
    record = json.loads(data)
    assert name == "harbour_x2.png.json"
    assert record["input"]["name"] == "harbour.jpg"
    assert record["settings"]["sampling"]["steps"] == 4
    page.get_by_role("button", name="The settings that made it").click()
    assert json.loads(page.locator("pre.record").inner_text()) == record

    # Another photograph: what was made of this one is gone from the page.
    page.get_by_role("button", name="Clear").or_(page.get_by_label("Clear")).first.click()
    page.locator(".nothing").wait_for()
    playwright.expect(page.get_by_role("button", name="Download the photograph")).to_be_disabled()


@needs_chromium
def test_cancel(visit):
    page = visit()
    drop(page, ("a.jpg", photograph()))
    set_scale(page, 2)
    page.get_by_text("to 96 x 64 pixels").wait_for()
    HeldRestorer.held.set()
    press(page, "Restore")
    page.get_by_text("Reading the photograph").wait_for()
    press(page, "Cancel")
    page.get_by_text("Cancelled.").wait_for()
    assert page.locator(".compare").count() == 0
    HeldRestorer.held.clear()
    press(page, "Restore")
    page.locator(".compare").wait_for()
    playwright.expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_disabled()


@needs_chromium
def test_closed_page_frees_the_device_and_then_the_disk(visit, served, monkeypatch):
    monkeypatch.setattr("zipir_jax.guard.GRACE", 1.0)
    before = set(served[1].iterdir())
    page, other = visit(), visit()
    for visitor in (page, other):
        drop(visitor, ("a.jpg", photograph()))
        set_scale(visitor, 2)
        visitor.get_by_text("to 96 x 64 pixels").wait_for()
    HeldRestorer.held.set()
    press(page, "Restore")
    page.get_by_text("Reading the photograph").wait_for()
    HeldRestorer.ended.clear()
    page.close()
    until(lambda: HeldRestorer.ended)
    HeldRestorer.held.clear()
    press(other, "Restore")
    other.locator(".compare").wait_for()
    other.close()
    until(lambda: set(served[1].iterdir()) <= before)


@needs_chromium
def test_two_users(visit):
    """Each waits for the other, sees where in the queue, and gets what is theirs."""
    pages = [visit(), visit()]
    for seed, page in enumerate(pages):
        drop(page, (f"photo_{seed}.jpg", photograph(seed, size=(48, 32))))
        set_scale(page, 2)
        page.get_by_text("to 96 x 64 pixels").wait_for()
    HeldRestorer.held.set()
    press(pages[0], "Restore")
    pages[0].get_by_text("Reading the photograph").wait_for()
    press(pages[1], "Restore")
    pages[1].get_by_text("Waiting, 1 before you").wait_for()
    HeldRestorer.held.clear()
    results = []
    for seed, page in enumerate(pages):
        page.locator(".compare").wait_for()
        name, data = download(page, "Download the photograph")
        assert name == f"photo_{seed}_x2.png"
        assert f"photo_{1 - seed}" not in page.content()
        results.append(np.asarray(Image.open(io.BytesIO(data))))
    assert (results[0] != results[1]).any()


@needs_chromium
def test_sentences_for_what_cannot_be(visit):
    page = visit()
    drop(page, ("<img src=x onerror=alert(1)>.jpg", b"no picture"))
    playwright.expect(page.get_by_role("alert")).to_contain_text("not an image")
    assert page.locator("img[src=x]").count() == 0
    press(page, "Restore")
    playwright.expect(page.get_by_role("alert")).to_contain_text("not an image")

    page = visit()
    press(page, "Restore")
    playwright.expect(page.get_by_role("alert")).to_contain_text("Drop a photograph first.")
    bomb = io.BytesIO()  # 32 million pixels in 32 kB
    Image.new("1", (8000, 4000)).save(bomb, "PNG")
    drop(page, ("bomb.png", bomb.getvalue()))
    playwright.expect(page.get_by_role("alert")).to_contain_text("8000 x 4000 pixels, 32.0 megapixels")
    assert page.locator(".picture").count() == 0

    page = visit()
    drop(page, ("a.jpg", photograph()))
    page.locator(".picture").wait_for()
    page.get_by_label("Long side").check()
    field = page.get_by_role("spinbutton", name="Long side")
    field.fill("20000")
    field.press("Enter")
    playwright.expect(page.get_by_role("alert")).to_contain_text("20000 x 13333")
    assert page.locator(".picture").count() == 1


@needs_chromium
def test_folder_of_photographs(visit):
    page = visit(viewport={"width": 390, "height": 800})
    page.get_by_role("tab", name="Folder of photographs").click()
    drop(
        page,
        ("one.jpg", photograph(0)),
        ("<b>broken.jpg", photograph(1)[:200]),
        ("two.jpg", photograph(2)),
    )
    set_scale(page, 2)
    press(page, "Restore all")
    page.get_by_text("2 of 3 restored.").wait_for()
    rows = page.locator(".files tr").all_inner_texts()[1:]
    assert [row.split()[0] for row in rows] == ["one.jpg", "bbroken.jpg", "two.jpg"]
    assert "damaged" in rows[1]
    _, data = download(page, "Download all as ZIP")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = ["one_x2.png", "two_x2.png"]
        assert sorted(archive.namelist()) == sorted(names + [f"{name}.json" for name in names])
        assert Image.open(archive.open("two_x2.png")).size == (96, 64)
        assert json.loads(archive.read("two_x2.png.json"))["input"]["name"] == "two.jpg"
    # A phone's page is as wide as the phone.
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@needs_chromium
def test_an_error_of_the_device_belongs_to_its_photograph(visit, monkeypatch, capfd):
    restore = HeldRestorer.restore

    def fail_if_tall(self, image, **options):
        if image.shape[0] > image.shape[1]:
            raise RuntimeError("INTERNAL: a kernel failed at /some/path")
        return restore(self, image, **options)

    monkeypatch.setattr(HeldRestorer, "restore", fail_if_tall)
    page = visit()
    drop(page, ("tall.jpg", photograph(1, (32, 48))))
    page.get_by_text("128 x 192 pixels.").wait_for()
    press(page, "Restore")
    page.get_by_text("The server could not restore this photograph.").wait_for()
    page.get_by_role("tab", name="Folder of photographs").click()
    drop(page, ("one.jpg", photograph(0)), ("tall.jpg", photograph(1, (32, 48))), ("two.jpg", photograph(2)))
    set_scale(page, 2)
    press(page, "Restore all")
    page.get_by_text("2 of 3 restored.").wait_for()
    rows = page.locator(".files tr").all_inner_texts()[1:]
    assert "The server could not restore this photograph." in rows[1] and "restored." in rows[2]
    _, data = download(page, "Download all as ZIP")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert [name for name in archive.namelist() if name.endswith(".png")] == ["one_x2.png", "two_x2.png"]
    assert capfd.readouterr().err.count("RuntimeError: INTERNAL") == 2  # the server's owner is told why


@needs_chromium
def test_cancelled_folder_keeps_what_is_done(visit):
    page = visit()
    page.get_by_role("tab", name="Folder of photographs").click()
    drop(page, ("one.jpg", photograph(0)), ("two.jpg", photograph(2)))
    set_scale(page, 2)
    HeldRestorer.ended.clear()
    press(page, "Restore all")
    until(lambda: HeldRestorer.ended)
    HeldRestorer.held.set()
    press(page, "Cancel")
    page.get_by_text(re.compile(r"[12] of 2 restored\.")).wait_for()
    _, data = download(page, "Download all as ZIP")
    assert "one_x2.png" in zipfile.ZipFile(io.BytesIO(data)).namelist()


@needs_chromium
def test_link_elsewhere_opens_the_page_of_the_same_visitor(visit, served):
    page = visit()
    cookie = page.context.cookies()
    page.goto(f"data:text/html,<a href='http://127.0.0.1:{served[0]}/'>restore photographs</a>")
    page.get_by_role("link").click()
    page.get_by_role("button", name="Restore", exact=True).wait_for()
    assert page.context.cookies() == cookie


@needs_chromium
def test_comparison_page_slides(chromium, tmp_path):
    """The one that `sample --compare slider` writes."""
    before, after = np.zeros((60, 80, 3), np.float32), np.ones((120, 160, 3), np.float32)
    (tmp_path / "compare.html").write_text(slider_html(before, after, "<harbour> & boats.png"))
    page = chromium.new_page(viewport={"width": 390, "height": 800})
    problems = []
    page.on("console", lambda said: problems.append(said.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((tmp_path / "compare.html").as_uri())
    assert page.title() == page.get_by_role("heading").inner_text() == "<harbour> & boats.png"
    shown = page.locator("#pictures").bounding_box()
    assert page.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)") == [160, 160]

    def colour_at(share):
        """Of the middle row, at a share of the width."""
        picture = Image.open(io.BytesIO(page.screenshot(clip=shown)))
        return picture.convert("L").getpixel((int(share * picture.width), picture.height // 2))

    assert colour_at(0.4) < 140 and colour_at(0.6) > 240
    row = shown["y"] + shown["height"] / 2
    page.mouse.move(shown["x"] + 0.5 * shown["width"], row)
    page.mouse.down()
    page.mouse.move(shown["x"] + 0.2 * shown["width"], row + 5, steps=4)
    page.mouse.up()
    assert colour_at(0.15) < 140 and colour_at(0.25) > 240
    slider = page.get_by_role("slider")
    assert abs(float(slider.input_value()) - 20) < 1
    slider.press("End")
    assert colour_at(0.9) < 140
    slider.press("ArrowLeft")
    assert slider.input_value() == "99.5"
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()
    assert problems == []


# --------------------------------------------------------------------------------------------------
# Without a browser
# --------------------------------------------------------------------------------------------------


def ask(port, method, path, body=None, **headers):
    """(status, headers, body) of a request, its path sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_host="Host" in headers)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def enter(port):
    """A new visitor's cookie."""
    status, headers, _ = ask(port, "GET", "/")
    assert status == 200
    assert "HttpOnly" in headers["Set-Cookie"] and "SameSite=Lax" in headers["Set-Cookie"]
    return headers["Set-Cookie"].partition(";")[0]


def upload(port, cookie, name="a.jpg", data=b"some bytes", upload_id="", **headers):
    """(status, path on the server)"""
    body = (
        (
            f'--xyz\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        ).encode()
        + data
        + b"\r\n--xyz--\r\n"
    )
    kind = "multipart/form-data; boundary=xyz"
    status, _, answer = ask(
        port,
        "POST",
        f"/gradio_api/upload?upload_id={upload_id}",
        body,
        Cookie=cookie,
        Content_Type=kind,
        **headers,
    )
    return status, json.loads(answer)[0] if status == 200 else None


def join(port, cookie, data, session=None, **headers):
    """Status of asking to run the first function of the page with such data, in a session of the cookie's."""
    session = session or re.sub(r"\W|_", "", cookie)[-11:]
    message = json.dumps({"data": data, "fn_index": 0, "session_hash": session, "trigger_id": 1})
    headers = {"Content_Type": "application/json"} | headers
    return ask(port, "POST", "/gradio_api/queue/join", message.encode(), Cookie=cookie, **headers)[0]


def test_files_of_the_server_and_of_others_are_refused(served):
    port, folder = served
    mine, other = enter(port), enter(port)
    assert mine != other
    status, path = upload(port, mine, data=b"of mine")
    assert status == 200
    assert ask(port, "GET", f"/gradio_api/file={path}", Cookie=mine)[2] == b"of mine"
    assert ask(port, "GET", f"/gradio_api/file={path}", Cookie=other)[0] == 404
    assert ask(port, "GET", f"/gradio_api/file={path}")[0] == 403
    for foreign in (
        "/etc/passwd",
        "../../etc/passwd",
        f"{folder}/../../etc/passwd",
        f"{path}/../../../etc/passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        str(folder),
        f"{Path(app.__file__)}",
        "pyproject.toml",
        f"http://127.0.0.1:{port}/",
        "file:///etc/passwd",
        f"{path}%00",
        f"//{path}",
    ):
        assert ask(port, "GET", f"/gradio_api/file={foreign}", Cookie=mine)[0] == 404, foreign
        if "%" not in foreign:
            for data in ({"path": foreign}, {"path": foreign, "meta": {"_type": "gradio.FileData"}}):
                assert join(port, mine, [data]) == 403, foreign
    assert join(port, other, [{"path": path, "meta": {"_type": "gradio.FileData"}}], "session1") == 403
    assert join(port, other, [[{"deep": [{"path": path}]}]], "session1") == 403
    assert join(port, other, [{"path": {"path": path}}], "session1") == 403
    assert join(port, mine, [{"path": path, "meta": {"_type": "gradio.FileData"}}]) == 200


def test_uploaded_names_stay_in_the_folder(served):
    port, folder = served
    cookie = enter(port)
    for name in (
        "../../escaped.jpg",
        "/tmp/escaped.jpg",
        "..",
        "a/../../escaped.jpg",
        ".hidden",
        "a\\\\..\\\\b.jpg",
    ):
        status, path = upload(port, cookie, name)
        assert status != 200 or Path(path).resolve().is_relative_to(folder), name
    assert not list(folder.parent.glob("escaped*")) and not Path("/tmp/escaped.jpg").exists()


def test_other_pages_are_refused(served):
    """Neither a page elsewhere, nor one on another port, nor one that calls this machine by its own name."""
    port, _ = served
    cookie = enter(port)
    here = f"127.0.0.1:{port}"
    for origin in (
        "http://evil.example",
        "null",
        "http://127.0.0.1:1",
        f"http://127.0.0.1:{port}.evil.example",
    ):
        assert join(port, cookie, [], Origin=origin) == 403
        assert upload(port, cookie, Origin=origin)[0] == 403
    for site in ("cross-site", "same-site"):
        assert join(port, cookie, [], Sec_Fetch_Site=site) == 403
        assert (
            ask(port, "GET", "/gradio_api/queue/data?session_hash=a", Cookie=cookie, Sec_Fetch_Site=site)[0]
            == 403
        )
    assert join(port, cookie, [], Origin=f"http://{here}", Sec_Fetch_Site="same-origin") == 200
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "",
        "localhost@evil.example",
    ):
        assert ask(port, "GET", "/", Host=host)[0] == 421, host
    for host in (f"localhost:{port}", here, f"[::1]:{port}", "LOCALHOST", "photos.example", "B.example:443"):
        assert ask(port, "GET", "/", Host=host)[0] == 200, host
    assert join(port, "", []) == 403  # no cookie: not a page that we have sent
    assert join(port, cookie.replace("=", "=x"), []) == 403
    # What a form of another page could send without asking first.
    assert join(port, "", [], Content_Type="text/plain") == 403


def test_sessions_of_others_are_refused(served):
    port, _ = served
    mine, other = enter(port), enter(port)
    assert join(port, mine, [], "mine1") == 200
    assert join(port, other, [], "mine1") == 403
    assert upload(port, mine, upload_id="upload1")[0] == 200
    for path in ("queue/data?session_hash=mine1", "heartbeat/mine1", "heartbeat/" + 33 * "x"):
        assert ask(port, "GET", f"/gradio_api/{path}", Cookie=other)[0] == 403
    progress = "/gradio_api/upload_progress?upload_id=upload1"
    assert b"done" in ask(port, "GET", progress, Cookie=mine)[2]
    assert ask(port, "GET", progress, Cookie=other)[0] == 404
    cancel = json.dumps({"session_hash": "mine1", "fn_index": 0, "event_id": "x"}).encode()
    assert (
        ask(port, "POST", "/gradio_api/cancel", cancel, Cookie=other, Content_Type="application/json")[0]
        == 403
    )


def test_only_what_the_page_needs_is_open(served):
    port, _ = served
    cookie = enter(port)
    for path in (
        "/config", "/gradio_api/info", "/gradio_api/openapi.json", "/openapi.json", "/docs", "/monitoring",
        "/gradio_api/call/look", "/gradio_api/runs", "/gradio_api/vibe-code", "/gradio_api/queue/status",
        "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/startup-events", "/?deep_link=..%2f..",
        "/gradio_api/stream/a/b/1/playlist-file", "/gradio_api/file/etc/passwd", "//etc/passwd",
    ):  # fmt: skip
        assert ask(port, "GET", path, Cookie=cookie)[0] == 404, path
    assert (
        ask(port, "GET", "/gradio_api/app_id", Cookie=cookie)[0] == 200
    )  # by which a page finds the server again
    for path in (
        "run/predict",
        "api/predict",
        "call/look",
        "vibe-edit",
        "component_server",
        "process_recording",
    ):
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(port, method, f"/gradio_api/{path}", b"{}", Cookie=cookie)[0] == 404, path
    for path in (
        "/assets/../../../pyproject.toml",
        "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/static/..%2f..%2fapp.py",
    ):
        assert ask(port, "GET", path)[0] in (403, 404), path


def test_upload_that_breaks_off_leaves_nothing(served, capfd):
    port, folder = served
    cookie = enter(port)
    before = set(folder.glob("*/upload-*"))
    started = b'--xyz\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n' + bytes(9999)

    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nCookie: {cookie}\r\n"
            "Content-Type: multipart/form-data; boundary=xyz\r\nContent-Length: 20000\r\n\r\n".encode()
        )
        connection.sendall(started)
        until(lambda: set(folder.glob("*/upload-*")) > before)
    until(lambda: set(folder.glob("*/upload-*")) == before)
    assert "Traceback" not in capfd.readouterr().err
    # Nor does a form that stops in the middle of a file.
    headers = {"Content_Type": "multipart/form-data; boundary=xyz"}
    assert ask(port, "POST", "/gradio_api/upload", started, Cookie=cookie, **headers)[2] == b"[]"
    assert set(folder.glob("*/upload-*")) == before


def test_sizes_are_limited(served):
    port, folder = served
    cookie = enter(port)
    assert upload(port, cookie, data=b"x" * (LARGEST_FILE + 1))[0] == 413
    assert upload(port, cookie, data=b"x" * (LARGEST_FILE - 1000))[0] == 200
    assert join(port, cookie, ["x" * 2**20]) == 413
    long = {"Content_Length": str(10**12)}
    kind = {"Content_Type": "multipart/form-data; boundary=xyz"}
    assert ask(port, "POST", "/gradio_api/upload", Cookie=cookie, **long, **kind)[0] == 507
    assert ask(port, "POST", "/gradio_api/upload", Cookie=cookie, **kind)[0] == 411
    assert not [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > LARGEST_FILE]


def test_messages_that_no_page_sends_are_refused(served):
    port, _ = served
    cookie = enter(port)
    # Too deep for the parser, and for what looks for paths in it.
    for message in (b"no JSON", b"[" * 100_000, b"[" * 900 + b"]" * 900):
        assert ask(port, "POST", "/gradio_api/queue/join", message, Cookie=cookie)[0] == 400
    unnamed = b'--xyz\r\nContent-Disposition: form-data; name="files"\r\n\r\nno file\r\n--xyz--\r\n'
    kind = "multipart/form-data; boundary=xyz"
    answer = ask(port, "POST", "/gradio_api/upload", unnamed, Cookie=cookie, Content_Type=kind)
    assert answer[0] == 400 and b"a file with a name" in answer[2]


def test_page_asks_nothing_of_others(served):
    _, headers, body = ask(served[0], "GET", "/")
    assert str(served[1]).encode() not in body and str(Path.home()).encode() + b"/" not in body
    policy = headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert b"fonts.googleapis" not in body


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a.jpg", "a.jpg"),
        ("../../etc/passwd", "passwd"),
        ("C:\\photos\\a.jpg", "a.jpg"),
        ("...hidden.jpg", "hidden.jpg"),
        ("a\nb\u202e\x00.jpg", "ab.jpg"),
        ("<b>&'.jpg", "b&'.jpg"),
        ("..", "photograph"),
        ("", "photograph"),
        ("x" * 300 + ".jpeg", "x" * 80 + ".jpeg"),
        ("Strände.jpg", "Strände.jpg"),
    ],
)
def test_shown_name(name, shown):
    from zipir_jax.page import shown_name

    assert shown_name(name) == shown


def test_distinct():
    from zipir_jax.page import distinct

    assert distinct(["a.png", "A.png", "a_2.png", "b"]) == ["a.png", "A_2.png", "a_2_2.png", "b"]


def test_too_little_memory_is_a_sentence(tiny_weights):
    from zipir_jax.guard import Visitors
    from zipir_jax.page import Desk, planned_size, read_settings

    restorer = Restorer.load(tiny_weights)
    restorer.__dict__["memory"] = 2**20  # bytes
    desk = Desk(restorer, {}, (), Visitors(Path(), 0), 10**8)
    target, restoration, _ = read_settings("Long side", None, 4000, None, 4, 0, "none", 0)
    with pytest.raises(ValueError, match=r"pixels need .* GiB to .*, beside the weights"):
        planned_size(desk, "a.jpg", photograph(), target, restoration, "png")


@pytest.mark.parametrize(
    "values",
    [
        ("Scale", None, 4),
        ("Scale", "4", 4),
        ("Scale", 4, None),
        ("Scale", 4, [4]),
        ("Scale", float("nan"), 4),
        ("Scale", 4, float("inf")),
    ],
)
def test_settings_that_are_no_numbers(values):
    from zipir_jax.page import read_settings

    size, scale, steps = values
    with pytest.raises(ValueError, match="is not a number"):
        read_settings(size, scale, None, None, steps, 0, "none", 0)


def test_a_visitors_files_stay_until_some_time_after_the_last_request(tmp_path, monkeypatch):
    """Those of a page too; what another visitor has stays."""
    from zipir_jax import guard

    monkeypatch.setattr(guard, "GRACE", 0.1)
    visitors = guard.Visitors(tmp_path, 0)

    async def come_and_go():
        with visitors.attended("one", ["page"]), visitors.attended("another", []):
            with visitors.attended("one", ["closed"]):
                closed, page = visitors.folder_of("closed"), visitors.folder_of("page")
            await asyncio.sleep(0.05)  # an absence that is short enough
            with visitors.attended("one", ["closed"]):
                await asyncio.sleep(0.15)
                assert closed.exists()
            await asyncio.sleep(0.15)
            assert not closed.exists() and page.exists() and "closed" not in visitors.sessions
            with pytest.raises(FileNotFoundError):  # a restoration that has outlived its page
                (closed / "late.png").touch()
        with visitors.attended("another", []):
            await asyncio.sleep(0.15)
            assert [path.name for path in tmp_path.iterdir()] == ["another"]
        await asyncio.sleep(0.15)

    with concurrent.futures.ThreadPoolExecutor() as thread:  # for playwright's loop runs in this one
        thread.submit(asyncio.run, come_and_go()).result()
    assert list(tmp_path.iterdir()) == []
    assert not visitors.sessions and not visitors.requests and not visitors.timers


def test_room_is_for_all_and_half_of_it_for_one(tmp_path):
    from zipir_jax.guard import Visitors

    visitors = Visitors(tmp_path, 1000)
    for visitor, size in (("one", 400), ("another", 350)):
        (tmp_path / visitor).mkdir()
        (tmp_path / visitor / "a_x4.png").write_bytes(bytes(size))
    visitors.check_room("one", 100)
    with pytest.raises(ValueError, match="more of your photographs"):
        visitors.check_room("one", 101)
    visitors.uploading.append(("another", 150))
    with pytest.raises(ValueError, match="more of your photographs"):
        visitors.check_room("another", 1)
    visitors.check_room("one", 100)
    with pytest.raises(ValueError, match="more photographs; try again later"):
        visitors.check_room("third", 101)


def test_results_count_to_the_room(tiny_weights, quick_compile, tmp_path):
    from zipir_jax.guard import Visitors
    from zipir_jax.page import Desk, job, restore_one

    data = photograph()
    visitors = Visitors(tmp_path, 2 * (len(data) + 100), sessions={"page": "visitor"})
    visitors.folder_of("page").mkdir(parents=True)
    upload = tmp_path / "visitor" / "a.jpg"
    upload.write_bytes(data)
    desk = Desk(Restorer.load(tiny_weights), {}, (), visitors, 10**6)
    fields = ["Scale", 2, None, None, 1, 0, "none", 0, "png"]
    with job(desk, "page", "photograph", [str(upload)], fields) as work:
        with pytest.raises(ValueError, match="no room for more of your photographs"):
            restore_one(desk, work, str(upload), "a.jpg", lambda text, done: None)
        assert list(work.folder.iterdir()) == []
        visitors.largest_folder = 10**6
        written, record, _ = restore_one(desk, work, str(upload), "a.jpg", lambda text, done: None)
    assert written.stat().st_size == record["output"]["bytes"] > 100
    assert not desk.queue and not desk.cancels


def test_turns_are_fair():
    """Whoever has many photographs waits behind the others with each, and so does a visitor's second page."""
    from zipir_jax.guard import Visitors
    from zipir_jax.page import Desk, turn

    loaded = Restorer.__new__(Restorer)
    desk = Desk(loaded, {}, (), Visitors(Path(), 0), 0)
    order, waits, first_is_in, go = [], {}, threading.Event(), threading.Event()

    def restore(who, page, count):
        for _ in range(count):
            with turn(desk, who, lambda before: waits.setdefault(page, before)):
                order.append(who)
                first_is_in.set()
                go.wait(SECONDS)

    threads = [threading.Thread(target=restore, args=("many", "first", 3))]
    threads[0].start()
    first_is_in.wait(SECONDS)
    for who, page in (("many", "second"), ("one", "third"), ("another", "fourth")):
        threads.append(threading.Thread(target=restore, args=(who, page, 1)))
        threads[-1].start()
        until(lambda page=page: page in waits)
    go.set()
    for thread in threads:
        thread.join(SECONDS)
    assert waits["second"] == 1 and waits["third"] == 1 and waits["fourth"] == 2
    assert order == ["many", "one", "another", "many", "many", "many"]
    assert not desk.queue


def test_more_pages_than_threads_are_refused_before_they_start(tmp_path):
    from zipir_jax.guard import Visitors
    from zipir_jax.page import MOST_AT_WORK, Desk, job

    visitors = Visitors(tmp_path, 0)
    desk = Desk(Restorer.__new__(Restorer), {}, (), visitors, 0)
    fields = ["Scale", 2, None, None, 4, 0, "none", 0, "png"]
    with contextlib.ExitStack() as at_work:
        for number in range(MOST_AT_WORK):
            visitors.sessions[str(number)] = "visitor"
            visitors.folder_of(str(number)).mkdir(parents=True)
            at_work.enter_context(job(desk, str(number), "folder", ["a.jpg"], fields))
        with pytest.raises(ValueError, match="pages are restoring already"):
            at_work.enter_context(job(desk, "late", "folder", ["a.jpg"], fields))
    assert not desk.cancels


def test_an_errors_text_names_no_file_of_the_server(tmp_path):
    from zipir_jax.page import reason

    with pytest.raises(OSError) as caught:
        (tmp_path / "none" / "a.png").write_bytes(b"")
    told = reason(caught.value)
    assert "No such file" in told and str(tmp_path) not in told
    assert reason(ValueError("a.jpg: not an image")) == "a.jpg: not an image"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--port", "70000"), "cannot listen at 127.0.0.1:70000"),
        (("--host", "no.such.host.invalid"), "cannot listen at no.such.host.invalid:7860"),
        (("--max-file-mb", "0"), "max_file_mb 0 is not a positive number"),
        (("--max-megapixels", "inf"), "max_megapixels inf is not a positive number"),
        (("--share",), "--share"),
    ],
)
def test_bad_arguments_are_one_line(call, arguments, error):
    status, _, printed = call(app.main, *arguments)
    assert status == 2
    assert error in printed
    assert printed.count("\n") == 1


def test_port_in_use_is_one_line(call):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, _, printed = call(app.main, "--port", taken.getsockname()[1])
    assert status == 2 and "in use" in printed


def test_beyond_this_machine_is_warned_of(call, tmp_path):
    names = ("--allowed-host", "photos.example", "--allowed-host", "b.example")
    to_all = ("--host", "0.0.0.0", "--port", "0", "--weights", tmp_path / "none")
    status, _, printed = call(app.main, *to_all, *names)
    assert status == 2 and "none" in printed
    assert printed.startswith("warning: whoever can reach 0.0.0.0")
    status, _, printed = call(app.main, "--port", "0", "--weights", tmp_path / "none")
    assert status == 2 and "warning" not in printed


def test_nothing_is_told_to_gradios_makers(served):
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert not gradio.analytics.analytics_enabled()
