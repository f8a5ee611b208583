"""The explorer in a real browser, served as by `make app` and in JupyterLab, used with keyboard and mouse.

Needs Chromium (AUGDISTILL_BROWSER names another); skipped without one, unless AUGDISTILL_NEEDS_BROWSER is set.
"""

import ast
import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from augdistill_report.files.phi_files import load_phi

BROWSER = os.environ.get("AUGDISTILL_BROWSER") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
FLAGS += ["disable-component-update", "disable-sync", "disable-dev-shm-usage"]
needed = bool(os.environ.get("AUGDISTILL_NEEDS_BROWSER"))
pytestmark = pytest.mark.skipif(
    not BROWSER and not needed, reason="no Chromium here: install one, or name it in AUGDISTILL_BROWSER"
)
OURS = ("http://127.0.0.1", "http://localhost", "data:", "blob:")  # the only places that a page may ask
PATIENCE = 60  # seconds that a step may take on a busy machine


def processes(mark: str) -> list[str]:
    """The kernels of this test, which are marked in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text().replace("\0", " ")
            if "ipykernel" in command and mark.encode() in (folder / "environ").read_bytes():
                found.append(command)
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of the explorer on the smoke preset, with its token, the run's folder, and its processes' mark."""
    folder = tmp_path_factory.mktemp("app")
    run = folder / "smoke"
    own = {"OF_THIS_TEST": str(folder), "JUPYTER_DATA_DIR": str(folder / "jupyter")}
    own |= {"JUPYTER_CONFIG_DIR": str(folder / "jupyter")}
    serve = f"""
from augdistill_report.commands import app
app.CULL = {{"idle_timeout": 15, "interval": 1}}
app.app("smoke", {str(run)!r}, browser=False)
"""
    command = [sys.executable, "-c", serve]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | own) as server:
        address = server.stderr.readline()
        assert "?token=" in address, address + server.stderr.read()
        ears = threading.Thread(target=server.stderr.read)  # what it says later: a full pipe would stop it
        ears.start()
        yield address.split()[1], run, f"OF_THIS_TEST={folder}"
        server.send_signal(signal.SIGINT)
        server.wait(60)
        ears.join()


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


class Reader:
    """A user of the page, without any other network."""

    def __init__(self, page):
        self.page, self.wrong = page, []
        page.set_default_timeout(1000 * PATIENCE)
        page.set_viewport_size({"width": 1500, "height": 1250})
        page.route(lambda url: not url.startswith(OURS), self.refuse)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.wrong.append(message.text))

    def refuse(self, route) -> None:
        self.wrong.append(f"asked another host: {route.request.url}")
        route.abort()

    @property
    def status(self) -> str:
        return self.page.locator(".augdistill-line").text_content()

    def until(self, pattern: str) -> str:
        """Wait until the status line matches, with what is behind its "more"; returns it."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, self.status):
            assert time.monotonic() < deadline, self.status
            self.page.wait_for_timeout(50)
        return self.status

    def picture(self, name: str) -> str:
        """The SHA-256 digest of the picture of that name."""
        read = """async image => {
            const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
            const sum = await crypto.subtle.digest("SHA-256", bytes);
            return Array.from(new Uint8Array(sum)).join(" ");
        }"""
        return self.page.get_by_role("img", name=name, exact=True).evaluate(read)

    def changes(self, name: str, before: str) -> str:
        deadline = time.monotonic() + PATIENCE
        while (now := self.picture(name)) == before:
            assert time.monotonic() < deadline, f"{name} stays as it was"
            self.page.wait_for_timeout(20)
        return now

    def control(self, name: str):
        return self.page.locator(f".widget-inline-hbox:has(> label:text-is('{name}'))")

    def choose(self, name: str, option: str) -> None:
        self.control(name).locator("select").select_option(option)

    def press(self, name: str, *keys: str) -> None:
        """Press keys on the handle of a slider."""
        self.page.get_by_role("slider", name=name, exact=True).focus()
        for key in keys:
            self.page.keyboard.press(key)

    def write(self, name: str, value: str) -> None:
        """Type a number as a slider's value."""
        readout = self.control(name).locator(".widget-readout")
        readout.fill(value)
        readout.press("Enter")

    def tabbed(self, times: int) -> set[str]:
        """The names of the controls that get the focus during so many presses of Tab."""
        focused = """() => {
            const now = document.activeElement, box = now.closest(".widget-inline-hbox");
            const label = now.labels?.[0] || box?.querySelector("label");
            return (now.ariaLabel || label?.innerText || now.innerText || "").trim();
        }"""
        names = set()
        for _ in range(times):
            self.page.keyboard.press("Tab")
            names.add(self.page.evaluate(focused))
        return names

    def unnamed(self) -> list[str]:
        """What can have the focus, or is a picture, and has no accessible name."""
        return self.page.evaluate("""() => [...document.querySelectorAll(".augdistill-explorer :is(img, button, "
            + "input, select, textarea, [tabindex='0'], [role=progressbar])")]
            .filter(e => e.checkVisibility())
            .filter(e => !(e.ariaLabel || e.alt || e.innerText?.trim() || e.labels?.[0]?.innerText))
            .map(e => e.outerHTML.slice(0, 200))""")

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def download(self, name: str) -> bytes:
        with self.page.expect_download() as found:
            self.click(name)
        return Path(found.value.path()).read_bytes()


@pytest.fixture(scope="module")
def browser():
    assert BROWSER, "AUGDISTILL_NEEDS_BROWSER is set, and there is no Chromium"
    playwright = (
        pytest.importorskip("playwright.sync_api") if not needed else __import__("playwright.sync_api").sync_api
    )
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=[f"--{flag}" for flag in FLAGS])
        yield chromium
        chromium.close()


def test_a_user_explores_trains_stops_scores_and_saves(served, browser, tmp_path):
    url, run, mark = served
    page = browser.new_page()
    reader = Reader(page)
    page.goto(url)
    page.wait_for_selector(".augdistill-explorer img")
    reader.until("No phi has been trained on this data yet")
    pictures = page.locator(".augdistill-explorer img").count()
    x, draws = "images through phi", "draws of one image"

    # the first slider that a person touches works; every control has a name and is reached by the keyboard
    seen = reader.picture(x)
    reader.press("strength λ", "ArrowLeft", "ArrowLeft")
    seen = reader.changes(x, seen)
    count = 0
    for section in ("Look", "Ranges", "Images", "Compare", "Students", "Train", "Share"):
        reader.click(section)
        page.wait_for_timeout(200)
        labels = page.locator(".augdistill-section:visible .widget-inline-hbox > label:visible").all_inner_texts()
        buttons = page.locator(".augdistill-section button:visible:not([disabled])").all_inner_texts()
        there = {text.strip() for text in [*labels, *buttons]} - {""}
        assert there <= reader.tabbed(24) and reader.unnamed() == []
        count += len(there)
    assert count > 25
    reader.click("Look")
    reader.press("class", "ArrowRight")
    seen = reader.changes(x, seen)
    reader.write("images", "20")
    seen = reader.changes(x, seen)
    reader.choose("phi", "untrained distnet2")
    seen = reader.changes(x, seen)
    drawn = reader.picture(draws)
    reader.press("seed", "ArrowRight")
    drawn, seen = reader.changes(draws, drawn), reader.changes(x, seen)
    reader.press("noise (times)", "ArrowLeft", "ArrowLeft")
    seen = reader.changes(x, seen)
    reader.press("class", "Home")

    # training ten iterations
    reader.click("Train")
    reader.write("k (iterations)", "10")
    reader.click("Train k more")
    assert "distnet2, Adam 0.01" in reader.until("was trained for 10 iterations")
    curves = reader.picture("training")
    reader.click("Train k more")
    curves = reader.changes("training", curves)
    reader.until("was trained for 20 iterations")

    # the student report's setting dies, and the page lives on
    reader.click("The student report's setting")
    reader.click("Train k more")
    assert "use a smaller phi_lr" in reader.until("SGD 1000 diverged")
    assert page.locator("[role=alert]").count() == 1
    seen = reader.picture(x)
    reader.click("Look")
    reader.press("strength λ", "Home")
    reader.changes(x, seen)
    page.locator("[role=alert]").wait_for(state="detached")

    # the mended one goes on, and is stopped
    reader.click("Train")
    reader.click("The mended setting")
    reader.write("k (iterations)", "500")
    reader.click("Train k more")
    reader.until("iterations [0-9]+ %")
    curves = reader.picture("training")
    reader.changes("training", curves)
    reader.click("Stop")
    done = int(re.search("for ([0-9]+) iterations", reader.until("was trained for"))[1])
    assert 20 < done < 520

    # evaluated beside a hand-designed augmentation, and saved
    reader.click("Compare")
    reader.choose("compare with (B)", "hand-designed dsa")
    reader.changes(draws, drawn)
    reader.click("Students")
    reader.click("Evaluate")
    reader.until("evaluated")
    scores = page.locator(".augdistill-scores").inner_text()
    rows = "no augmentation.*±.*identity.*±.*A: .*Adam 0.01, as shown.*±.*n = 2.*B: hand-designed dsa.*B - A"
    assert re.search(rows, scores, re.DOTALL)
    page.get_by_role("checkbox", name="show where students go").click()
    page.get_by_role("img", name="where students go").wait_for()
    reader.click("Train")
    reader.click("Save")
    reader.until(r"saved, for strength .* and noise 1 \(0.8 is shown\): .*mine.safetensors")
    assert load_phi(run / "phis" / "mine.safetensors").about["config"]["iterations"] == done

    assert page.locator(".augdistill-explorer img").count() == pictures
    page.screenshot(path=os.environ.get("AUGDISTILL_SCREENSHOT") or tmp_path / "explorer.png")
    assert reader.wrong == []

    # leaving the page while it trains: the training comes to its end, and then its kernel is ended
    reader.write("k (iterations)", "20")
    reader.click("Train k more")
    reader.until("iterations [0-9]+ %")
    assert len(processes(mark)) == 2  # the page's, and one that waits for the next page
    page.close()
    deadline = time.monotonic() + PATIENCE
    while len(processes(mark)) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert answers(url)


def turn_upload_and_share(reader: Reader, folder: Path) -> dict:
    """What a user does with ranges, images and the clipboard, on either page; returns the state that was copied."""
    page, x = reader.page, "images through phi"
    page.wait_for_selector(".augdistill-explorer img")
    seen = reader.picture(x)
    reader.choose("phi", "untrained policy")
    seen = reader.changes(x, seen)
    reader.click("Ranges")
    reader.press("rotation", *["ArrowRight"] * 40)
    seen = reader.changes(x, seen)
    reader.click("Share")
    reader.click("Copy as code")
    reader.until("Copied")
    cell = page.evaluate("navigator.clipboard.readText()")
    state = ast.literal_eval(cell.partition("Page(run, ")[2].rstrip().removesuffix(")"))
    assert state["phi"] == "untrained policy" and 5 < state["ranges"]["rotation"] < 90
    assert Image.open(io.BytesIO(reader.download("Download picture"))).format == "PNG"
    assert Image.open(io.BytesIO(reader.download("Download film"))).n_frames == 10

    reader.click("Images")
    Image.new("RGB", (300, 200), "orange").save(folder / "mine.png")
    (folder / "letter.png").write_text("no picture")
    files = page.get_by_label("your images")
    files.set_input_files([folder / "letter.png"])
    reader.until("letter.png is not a readable image")
    files.set_input_files([folder / "mine.png"])
    reader.until("1 of your images, each as 8 x 8 pixels, grey")
    mine = reader.changes(x, seen)
    drop = """async ([name, text]) => {
        const data = new DataTransfer();
        const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
        data.items.add(new File([bytes], name, { type: "image/png" }));
        const event = new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
        document.querySelector(".augdistill-explorer img").dispatchEvent(event);
    }"""
    page.evaluate(drop, ["dropped.png", base64.b64encode((folder / "mine.png").read_bytes()).decode()])
    reader.until("2 of your images")
    reader.changes(x, mine)
    reader.click("Back to the data set's images")
    reader.until("The images of digits again")
    return state


def test_ranges_images_and_a_link_that_brings_them_back(served, browser, tmp_path):
    url, *_ = served
    context = browser.new_context(color_scheme="dark")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    reader = Reader(page := context.new_page())
    page.goto(url)
    state = turn_upload_and_share(reader, tmp_path)
    reader.click("Share")
    reader.click("Copy link")
    reader.until("Copied")
    link, seen = page.evaluate("navigator.clipboard.readText()"), reader.picture("images through phi")
    assert "token" not in link

    reader.click("Ranges")  # the loss along one range, with progress and at its end a picture
    reader.click("Measure the loss")
    reader.until("loss along rotation: measured")
    page.get_by_role("img", name="the loss along one range").wait_for()
    for width in (420, 1920):  # nothing leaves the page at any width; controls are above the pictures, or beside them
        page.set_viewport_size({"width": width, "height": 900})
        page.screenshot(path=tmp_path / f"{width}.png")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        controls, pictures = (page.locator(f".augdistill-{name}").bounding_box() for name in ("controls", "seen"))
        assert (pictures["x"] > controls["x"]) == (width == 1920)
        assert (pictures["y"] > controls["y"]) == (width == 420)
    assert page.evaluate("getComputedStyle(document.body).colorScheme") == "dark"
    assert reader.wrong == []
    page.close()

    other = Reader(page := context.new_page())
    page.goto(link)
    page.wait_for_selector(".augdistill-explorer img")
    deadline = time.monotonic() + PATIENCE
    while other.picture("images through phi") != seen:
        assert time.monotonic() < deadline, (other.status, state)
        page.wait_for_timeout(50)
    assert other.wrong == []
    context.close()


def test_the_same_in_jupyterlab(browser, tmp_path):
    work = tmp_path / "lab"
    work.mkdir()
    cell = f"""from augdistill_report import open_run
from augdistill_report.explorer.page import Page
Page(open_run("06_phi_explorer", dict(preset="smoke", out={str(tmp_path / "smoke")!r})))"""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)], metadata=kernel)
    nbformat.write(notebook, work / "explorer.ipynb")
    own = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("DATA", "CONFIG", "RUNTIME")}
    own |= {
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "spaces"),
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
    }
    quiet = ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--port=0",
        *quiet,
        f"--notebook-dir={work}",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | own) as server:
        try:
            for line in server.stderr:
                if address := re.search(r"(http://127\S+?)/lab(\?token=\S+)", line):
                    break
            threading.Thread(target=server.stderr.read, daemon=True).start()
            context = browser.new_context()
            context.grant_permissions(["clipboard-read", "clipboard-write"])
            reader = Reader(page := context.new_page())
            page.goto(f"{address[1]}/lab/tree/explorer.ipynb{address[2]}")
            page.locator("#jp-main-statusbar").get_by_text("Idle").wait_for()
            page.locator(".jp-Notebook .cm-content").first.focus()
            page.keyboard.press("Control+Enter")
            page.wait_for_selector(".augdistill-explorer img")
            page.locator(".augdistill-explorer").scroll_into_view_if_needed()
            turn_upload_and_share(reader, tmp_path)
            assert [error for error in reader.wrong if "augdistill" in error or "widget" in error] == []
            context.close()
        finally:
            server.send_signal(signal.SIGINT)
            server.send_signal(signal.SIGINT)
            server.wait(60)
