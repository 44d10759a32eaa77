"""The explorer as a reader sees it.

JupyterLab, Voilà and the saved page in a real browser, without a network."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium here: apt-get install chromium, then these tests run"
    ),
]
SHOTS = os.environ.get("LFPM_SHOTS")  # a folder: keep pictures of what was tested


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()


@pytest.fixture
def page(browser):
    "A page that collects console errors and refuses every outside address."
    page = browser.new_page(viewport=dict(width=1280, height=1000))
    page.errors = []
    page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: page.errors.append(str(e)))
    page.route(
        re.compile(r"^https?://(?!127\.0\.0\.1|localhost)"),
        lambda r: (page.errors.append(f"asked for {r.request.url}"), r.abort()),
    )
    yield page
    page.close()


def shot(page, name):
    if SHOTS:
        for width in (1280, 800):
            page.set_viewport_size(dict(width=width, height=1000))
            page.wait_for_timeout(700)
            page.screenshot(path=f"{SHOTS}/{name}-{width}.png", full_page=True)
        page.set_viewport_size(dict(width=1280, height=1000))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def serve(tmp_path):
    "Start a server, wait until it answers, stop it afterwards."
    running = []

    def start(command, url, seconds=60):
        env = os.environ | dict(
            LFPM_RUNS=str(tmp_path / "runs"),
            LFPM_CACHE=str(tmp_path / "cache"),
            JUPYTER_CONFIG_DIR=str(tmp_path / "config"),
            OMP_NUM_THREADS="1",
            JUPYTER_DATA_DIR=str(tmp_path / "data"),
            PYTHONPATH=str(ROOT),
            HOME=str(tmp_path),
        )
        env.pop("LFPM_STATIC", None)
        env.pop("MPLBACKEND", None)
        log = open(tmp_path / "server.log", "w", encoding="utf-8")
        p = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        running.append(p)
        for _ in range(seconds * 4):
            try:
                return urllib.request.urlopen(url, timeout=30).status
            except OSError:
                time.sleep(0.25)
            assert p.poll() is None, (tmp_path / "server.log").read_text(encoding="utf-8")
        raise TimeoutError((tmp_path / "server.log").read_text(encoding="utf-8"))

    yield start
    for p in running:
        family = psutil.Process(p.pid).children(recursive=True)
        p.terminate()
        try:
            p.wait(10)
        except subprocess.TimeoutExpired:
            p.kill()
        assert not psutil.wait_procs(family, timeout=20)[1], (
            "a server that is told to stop leaves nothing behind"
        )


def drive(page):
    """Keyboard, mouse, a button and a typed number move the words, the markers, the captions
    and the state."""
    words = lambda: page.locator(".widget-html-content:has-text('λ =')").first.inner_text()
    state = lambda: page.locator(".widget-html-content:has-text('at λ =')").last.inner_text()

    def looked(at: str):
        """Waits, half a minute at most, until the words are at this λ and the exact evaluation
        has answered for it."""
        for _ in range(300):
            lam = re.search(r"λ = ([\d.]+)", words())[1]
            if (
                re.fullmatch(at, lam)
                and "exact on" in words()
                and state().startswith(f"exact at λ = {lam}")
            ):
                return
            page.wait_for_timeout(100)
        raise AssertionError((at, words(), state()))

    handle = page.locator(".noUi-handle").first
    handle.wait_for(timeout=90_000)
    page.wait_for_timeout(1500)
    assert "λ = 0.000" in words()
    handle.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    looked(r"0\.020")
    asr = lambda: float(re.search(r"exact on .*ASR\(T\) ([\d.]+) %", words())[1])
    before, captions = asr(), page.locator("table:has-text('with trigger')").first.inner_text()
    box, rail = handle.bounding_box(), page.locator(".noUi-base").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(rail["x"] + 0.6 * rail["width"], box["y"] + 5, steps=8)
    page.mouse.up()
    looked(r"0\.[56]\d+")
    assert (
        asr() < before
        and page.locator("table:has-text('with trigger')").first.inner_text() != captions
    )
    page.get_by_role("button", name="1: end").click()
    looked(r"1\.000")
    assert "recorded" in words()
    page.get_by_role("button", name="the rule's λ").click()
    looked(r"0\.\d+")


def test_saved_page_without_network(page, tmp_path, saved):
    page.goto(f"file://{saved}")
    page.wait_for_selector("#fig .main-svg")
    words = lambda: page.locator("#words").inner_text()
    assert "λ = 0.000" in words() and "recorded" in words()
    asr = lambda: float(re.search(r"ASR\(T\) ([\d.]+)", words())[1])
    before, captions = asr(), page.locator("#sheet").inner_text()
    page.locator("#lam").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert "λ = 0.015" in words() and "interpolated" in words()
    page.get_by_role("button", name="1: end").click()
    assert (
        "λ = 1.000" in words()
        and asr() < before
        and page.locator("#sheet").inner_text() != captions
    )
    rail = page.locator("#lam").bounding_box()
    page.mouse.click(rail["x"] + rail["width"] * 0.4, rail["y"] + rail["height"] / 2)
    assert re.search(r"λ = 0\.[34]\d+", words())
    x = page.evaluate("fig.data[fig.layout.meta.moving + 1].x[0]")
    assert abs(x - float(page.locator("#lam").input_value())) < 1e-9, (
        "the marker stands where the slider stands"
    )
    shot(page, "saved")
    assert page.errors == []


@pytest.fixture
def saved(tmp_path):
    from lfpm_nb.explore import PathExplorer
    from lfpm_nb.recorded import load_recorded

    explorer = PathExplorer(load_recorded(tiny=True), n=48)
    path = explorer.save_html(tmp_path / "page.html")
    explorer.close()
    return path


MARK = """<img src=x onerror="document.title='ran'"><script>document.title='ran'</script>"""


def test_names_in_pages_are_text(page, tmp_path, monkeypatch):
    """A harmless marker as a method, a class, a configuration and a note.

    It is read, it does not run."""
    from lfpm_nb.explore import PathCore, PathExplorer
    from lfpm_nb.purify import KINDS, path_page
    from lfpm_nb.defend import Defended
    from lfpm_nb.recorded import load_recorded
    from lfpm_nb.report import write_report
    from test_report import ideal, made_up

    rec = load_recorded(tiny=True)
    end = PathCore.of(rec, ["LFPM"], n=8).ends["LFPM"]
    suite = replace(
        rec.suite, tasks=[replace(t, classes=[MARK] * len(t.classes)) for t in rec.suite.tasks]
    )
    core = PathCore(
        rec.clip,
        rec.both["poisoned"],
        {MARK: end},
        suite,
        rec.recorded.replace({"method": {"LFPM": MARK}}),
        {MARK: 0.5},
        {},
        n=8,
    )
    saved = PathExplorer(core).save_html(tmp_path / "saved.html")
    df = ideal((0,))["main"]
    run = made_up(tmp_path / "runs", df=df.replace({"method": {"LFPM": MARK}}))
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    (run / "status.json").write_text(json.dumps(status | dict(config=MARK)), encoding="utf-8")
    report = write_report(tmp_path / "out", roots=[tmp_path / "runs"])
    rows = [dict(lam=lam, accuracy=50.0, changed=0.0, n=9) for lam in (0.0, 1.0)]
    card = dict(
        model=MARK,
        path=rows,
        outcome=dict(state="purified", found=True, notes=[MARK]),
        kind=KINDS[1],
    )
    (tmp_path / "path.html").write_text(path_page(MARK, Defended({}, 1.0), card), encoding="utf-8")
    (tmp_path / "probe.html").write_text(f"<title>p</title>{MARK}", encoding="utf-8")
    page.goto(f"file://{tmp_path / 'probe.html'}")
    page.wait_for_function("document.title == 'ran'")  # the marker does run where it is no text
    page.errors.clear()
    shown = (
        (saved, "#fig .main-svg", ("#words", "#sheet")),
        (report, "h2", ("details.made summary", "td")),
        (tmp_path / "path.html", ".main-svg", ("h1", "p", "li")),
    )
    for file, drawn, where in shown:
        page.goto(f"file://{file}")
        page.wait_for_selector(drawn, state="attached")
        if file == saved:
            page.get_by_role("button", name="1: end").click()
        page.wait_for_timeout(500)
        for at in where:
            assert any(MARK in t for t in page.locator(at).all_inner_texts()), (file, at)
        assert page.title() != "ran" and page.locator("img[src=x]").count() == 0, file
    assert page.errors == []


def address(tmp_path) -> str:
    "What `lfpm explore` printed: the address with this start's token."
    return re.search(
        r"http://127\.0\.0\.1:\d+/\?token=\S+",
        (tmp_path / "server.log").read_text(encoding="utf-8"),
    )[0]


def test_voila(page, serve, tmp_path):
    port = free_port()
    serve(
        [str(Path(sys.executable).with_name("lfpm")), "explore", f"--port={port}"],
        f"http://127.0.0.1:{port}/login",
    )
    page.goto(address(tmp_path), timeout=120_000)
    drive(page)
    shot(page, "voila")
    assert page.errors == []


def test_explore_lets_nobody_else_in(serve, tmp_path):
    """No kernel without the token.

    Another host's name, as a rebound page has it, is refused everywhere."""
    import http.client

    port = free_port()
    serve(
        [str(Path(sys.executable).with_name("lfpm")), "explore", f"--port={port}"],
        f"http://127.0.0.1:{port}/login",
    )
    token = address(tmp_path).split("token=")[1]
    socket_path = "/api/kernels/12345678-1234-1234-1234-123456789012/channels"
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }

    def ask(path: str, host: str = f"127.0.0.1:{port}", **headers) -> tuple[int, str]:
        c = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        c.request("GET", path, headers={"Host": host} | headers)
        r = c.getresponse()
        return r.status, r.getheader("Location") or ""

    for path in ("/", "/?token=guessed"):
        status, to = ask(path)
        assert status == 302 and to.startswith("/login")
    assert ask(socket_path, **upgrade)[0] == 403
    for path in ("/", "/login", f"/?token={token}"):
        assert ask(path, "rebound.example")[0] == 403
    assert (
        ask(
            f"{socket_path}?token={token}",
            "rebound.example",
            Origin="http://rebound.example",
            **upgrade,
        )[0]
        == 403
    )
    servers = [
        p for p in psutil.process_iter(["cmdline"]) if f"--port={port}" in (p.info["cmdline"] or ())
    ]
    started = [" ".join(c.cmdline()) for p in servers for c in p.children(recursive=True)]
    kernels = [c for c in started if "ipykernel_launcher" in c]
    assert servers and kernels == [], "nobody was given a kernel"


@pytest.mark.parametrize(
    "name, drawn",
    [("merge", ".bartext"), ("subspace", ".trace.scatter .point[style*='rgb(0, 0, 0)']")],
)
def test_voila_draws_what_the_words_say(page, serve, tmp_path, monkeypatch, name, drawn):
    """What a figure is given before its page is there to see it would be lost.

    The first view must have its numbers from birth."""
    from lfpm_nb.explore import voila_template

    for k, v in voila_template(tmp_path).items():
        monkeypatch.setenv(k, v)
    port = free_port()
    serve(
        [
            sys.executable,
            "-m",
            "voila",
            str(ROOT / "nbs" / "explore" / f"{name}.ipynb"),
            "--no-browser",
            f"--port={port}",
            "--template=lfpm",
        ],
        f"http://127.0.0.1:{port}/",
    )
    page.goto(f"http://127.0.0.1:{port}/", timeout=120_000)
    page.wait_for_selector(".js-plotly-plot .xtick", timeout=60_000)
    page.wait_for_function("document.body.innerText.includes('exact')", timeout=60_000)
    marks = page.locator(f".js-plotly-plot {drawn}")
    assert marks.count() >= 3
    if name == "merge":
        assert float(marks.last.text_content().split()[0]) > 50, (
            "the poisoned merge obeys the trigger"
        )
    shot(page, f"voila-{name}")
    assert page.errors == []


def open_lab(page, serve, tmp_path, name, port):
    "JupyterLab with a copy of one explorer's notebook, all cells run."
    settings = tmp_path / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        '{"fetchNews": "false", "checkForUpdates": false}', encoding="utf-8"
    )
    shutil.copy(ROOT / "nbs" / "explore" / f"{name}.ipynb", tmp_path / f"{name}.ipynb")
    serve(
        [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            f"--port={port}",
            "--ServerApp.token=",
            "--ServerApp.password=",
            "--allow-root",
            f"--notebook-dir={tmp_path}",
        ],
        f"http://127.0.0.1:{port}/api",
    )
    page.goto(f"http://127.0.0.1:{port}/lab/tree/{name}.ipynb", timeout=120_000)
    page.locator(".jp-Notebook").wait_for(timeout=60_000)
    page.wait_for_timeout(4000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()


def test_jupyterlab(page, serve, tmp_path):
    open_lab(page, serve, tmp_path, "path", free_port())
    drive(page)
    shot(page, "lab")
    assert [e for e in page.errors if "path.ipynb" not in e] == []


@pytest.mark.parametrize("name", ["merge", "ctl", "subspace"])
def test_other_explorers_in_jupyterlab(page, serve, tmp_path, name):
    open_lab(page, serve, tmp_path, name, free_port())
    state = lambda: page.locator(".widget-html-content").last.inner_text()
    handle = page.locator(".noUi-handle").first
    handle.wait_for(timeout=90_000)
    words = lambda: page.locator(".widget-html-content").first.inner_text()

    def until(true, what):
        deadline = time.time() + 60
        while not true():
            assert time.time() < deadline, f"{what}: {words()} / {state()}"
            page.wait_for_timeout(200)

    until(lambda: "exact" in state(), "the first exact figures")
    before = words()
    handle.focus()
    page.keyboard.press("ArrowRight")
    until(lambda: words() != before and "exact" in state(), "the figures one step to the right")
    shot(page, name)
    assert [e for e in page.errors if f"{name}.ipynb" not in e] == []
