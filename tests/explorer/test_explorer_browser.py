"""The explorer in a real browser, served as by `make app`, and used with keyboard and mouse.

Needs Chromium (AUGDISTILL_BROWSER names another); skipped without one, unless AUGDISTILL_NEEDS_BROWSER is set.
"""

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

import pytest

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
app.CULL = {{"idle_timeout": 8, "interval": 1}}
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
        page.route(lambda url: not url.startswith(("http://127.0.0.1", "data:", "blob:")), lambda route: route.abort())
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("console", self.heard)

    def heard(self, message) -> None:
        outside = message.location.get("url", "").startswith("https://")  # an icon font that voila asks the web for
        if message.type == "error" and not outside:
            self.wrong.append(message.text)

    @property
    def status(self) -> str:
        return self.page.locator(".augdistill-error, .augdistill-status").inner_text()

    def until(self, pattern: str) -> str:
        """Wait until the status line matches; returns it."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, self.status):
            assert time.monotonic() < deadline, self.status
            self.page.wait_for_timeout(50)
        return self.status

    def picture(self, place: int) -> str:
        """The SHA-256 digest of the picture at that place."""
        read = """async image => {
            const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
            const sum = await crypto.subtle.digest("SHA-256", bytes);
            return Array.from(new Uint8Array(sum)).join(" ");
        }"""
        return self.page.locator(".augdistill-explorer img").nth(place).evaluate(read)

    def changes(self, place: int, before: str) -> str:
        deadline = time.monotonic() + PATIENCE
        while (now := self.picture(place)) == before:
            assert time.monotonic() < deadline, f"picture {place} stays as it was"
            self.page.wait_for_timeout(20)
        return now

    def control(self, name: str):
        return self.page.locator(f".widget-inline-hbox:has(> label:text-is('{name}'))")

    def press(self, name: str, *keys: str) -> None:
        """Press keys on the handle of a slider."""
        self.control(name).locator(".noUi-handle").focus()
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
            const box = document.activeElement.closest(".widget-inline-hbox, button");
            return box ? (box.querySelector("label") || box).innerText.trim() : "";
        }"""
        names = set()
        for _ in range(times):
            self.page.keyboard.press("Tab")
            names.add(self.page.evaluate(focused))
        return names

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()


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

    # every control is reached by the keyboard, and works by it
    labels = page.locator(".augdistill-explorer .widget-inline-hbox > label").all_inner_texts()
    buttons = page.locator(".augdistill-explorer button:not([disabled])").all_inner_texts()
    assert len(labels) > 15 and len(buttons) > 5
    assert {text.strip() for text in [*labels, *buttons]} - {""} <= reader.tabbed(60)
    seen = reader.picture(0)
    reader.press("class", "ArrowRight")
    seen = reader.changes(0, seen)
    reader.write("images", "20")
    seen = reader.changes(0, seen)
    reader.control("phi").locator("select").select_option("untrained distnet2")
    seen = reader.changes(0, seen)
    drawn = reader.picture(1)
    reader.press("seed", "ArrowRight")
    drawn, seen = reader.changes(1, drawn), reader.changes(0, seen)
    for name in ("strength λ", "noise (times)"):
        reader.press(name, "ArrowLeft", "ArrowLeft")
        seen = reader.changes(0, seen)
    reader.press("class", "Home")

    # training ten iterations
    reader.write("k (iterations)", "10")
    reader.click("Train k more")
    assert "distnet2, Adam 0.01" in reader.until("was trained for 10 iterations")
    curves = reader.picture(2)
    reader.click("Train k more")
    curves = reader.changes(2, curves)
    reader.until("was trained for 20 iterations")

    # the student report's setting dies, and the page lives on
    reader.click("The student report's setting")
    reader.click("Train k more")
    assert "use a smaller phi_lr" in reader.until("SGD 1000 diverged")
    assert page.locator("[role=alert]").count() == 1
    seen = reader.picture(0)
    reader.press("strength λ", "Home")
    reader.changes(0, seen)
    assert page.locator("[role=alert]").count() == 0

    # the mended one goes on, and is stopped
    reader.click("The mended setting")
    reader.write("k (iterations)", "500")
    reader.click("Train k more")
    reader.until("iterations [0-9]+ %")
    curves = reader.picture(2)
    reader.changes(2, curves)
    reader.click("Stop")
    done = int(re.search("for ([0-9]+) iterations", reader.until("was trained for"))[1])
    assert 20 < done < 520

    reader.click("Evaluate")
    reader.until("evaluated")
    scores = page.locator(".augdistill-scores").inner_text()
    assert re.search("no augmentation.*±.*identity.*±.*distnet2, Adam 0.01, as shown.*±.*n = 2", scores, re.DOTALL)
    reader.click("Save")
    reader.until("saved, for strength .*mine.safetensors")
    assert load_phi(run / "phis" / "mine.safetensors").about["config"]["iterations"] == done

    assert page.locator(".augdistill-explorer img").count() == pictures
    page.screenshot(path=os.environ.get("AUGDISTILL_SCREENSHOT") or tmp_path / "explorer.png")
    assert reader.wrong == []

    # leaving the page while it trains: the training comes to its end, and then its kernel is ended
    reader.write("k (iterations)", "20")
    reader.click("Train k more")
    reader.until("iterations [0-9]+ %")
    assert len(processes(mark)) == 1
    page.close()
    deadline = time.monotonic() + PATIENCE
    while processes(mark):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert answers(url)
