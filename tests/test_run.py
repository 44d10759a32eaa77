"""The main run from end to end, as `lfpm run main` does it; interrupted and started again."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import papermill
import psutil
import pytest

from lfpm_nb.cli import app
from lfpm_nb.core import damage, versions
from lfpm_nb.runs import Finished, load_runs, look, run_notebook, settings_of, status
from lfpm_nb.settings import notebooks
from typer.testing import CliRunner

ROWS = [
    "individual (clean)",
    "individual",
    "letters alone, poisoned",
    "TA (clean)",
    "TA",
    "fine-tuning",
    "LFPM",
    "LFPM (clean)",
]
SMALL = dict(
    tasks="letters,signs,textures",
    n_train=96,
    n_test=48,
    n_target=90,
    trigger_steps=3,
    shadow_n=96,
    held=64,
    lam_n=3,
    path_n=24,
)
GIVEN = {k: str(v) for k, v in SMALL.items()}
FILES = ["metrics.parquet", "notebook.ipynb", "params.json", "path.html", "path.png", "status.json"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "$LFPM_RUNS and $LFPM_CACHE of this module's run."
    root = tmp_path_factory.mktemp("main")
    with pytest.MonkeyPatch.context() as m:
        for k, v in dict(
            LFPM_RUNS=root / "runs", LFPM_CACHE=root / "cache", LFPM_FORCE=0, LFPM_LIVE=0
        ).items():
            m.setenv(k, str(v))
        yield root


@pytest.fixture(scope="module")
def out(home):
    return run_notebook("main", "tiny", GIVEN)


def test_files_and_status(out, home):
    assert (
        sorted(p.name for p in out.iterdir()) == FILES
        and out.parent == (home / "runs" / "main").resolve()
    )
    s = json.loads((out / "status.json").read_text(encoding="utf-8"))
    assert (
        (s["state"], s["preset"], s["seed"]) == ("done", "tiny", 0)
        and s["config"] in out.name
        and s["seconds"] > 0
    )
    assert all(
        (out / "status.json").stat().st_mtime_ns >= p.stat().st_mtime_ns for p in out.iterdir()
    ), "written last"
    assert (out / "path.png").read_bytes()[:4] == b"\x89PNG" and (
        out / "path.html"
    ).stat().st_size > 1e6


def test_params_are_what_was_asked_and_what_it_ran_on(out):
    p = json.loads((out / "params.json").read_text(encoding="utf-8"))
    want = settings_of("main", "tiny", GIVEN)
    assert p["params"] == asdict(want) and p["config"] in out.name
    assert (
        p["versions"]["threads"] == int(os.environ["OMP_NUM_THREADS"])
        and p["versions"]["device"] == "cpu"
    )
    assert p["versions"]["precision"] == versions()["precision"]
    assert {s["name"] for s in p["stages"]} >= {
        "tune-letters",
        "tune-signs",
        "tune-textures",
        "attack-badmerging",
        "stage1",
        "defend-LFPM",
        "defend-fine-tuning",
        "measure",
        "path",
    }


def test_the_notebook_shows_its_results_and_holds_no_widgets(out):
    nb = json.loads((out / "notebook.ipynb").read_text(encoding="utf-8"))
    assert "widgets" not in nb["metadata"] and (out / "notebook.ipynb").stat().st_size < 400_000
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    text = json.dumps(outputs)
    assert (
        not any(o["output_type"] == "error" for o in outputs)
        and "image/png" in text
        and "LFPM (clean)" in text
    )


def test_metrics_are_complete(out):
    df = pd.read_parquet(out / "metrics.parquet")
    tasks = [*SMALL["tasks"].split(","), "average"]
    for m in ROWS:
        ca = df[(df.method == m) & (df.kind == "model") & (df.metric == "CA")]
        assert (
            ca.task.tolist() == tasks
            and ca.value.between(0, 100).all()
            and ca.n.tolist() == [48, 90, 48, 186]
        )
    for m in ("fine-tuning", "LFPM", "LFPM (clean)"):
        path = df[
            (df.method == m) & (df.kind == "path") & (df.task == "average") & (df.metric == "ASR_T")
        ]
        assert sorted(path.lam) == [0, 0.5, 1]
        at0 = path[path.lam == 0].value.item()
        own = df[
            (df.method == ("TA (clean)" if "clean" in m else "TA"))
            & (df.kind == "model")
            & (df.task == "average")
            & (df.metric == "ASR_T")
        ].value.item()
        assert at0 == own, "the path starts at the merged model"


def test_the_tables_rows(out, home):
    r = CliRunner().invoke(app, ["table", "main", "--preset", "tiny", "--json"])
    rows = {row["method"]: row for row in json.loads(r.stdout)}
    assert list(rows) == ROWS and all(
        row["n_seeds"] == 1 and 0 <= row["CA"] <= 100 for row in rows.values()
    )
    for m, row in rows.items():
        assert (
            (row["path_ASR"] is not None)
            == (row["lam"] is not None)
            == (m in ("fine-tuning", "LFPM", "LFPM (clean)"))
        )
    assert str(out) in CliRunner().invoke(app, ["table", "main", "--preset", "tiny"]).stdout


def test_again_nothing_is_started(out, monkeypatch):
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    monkeypatch.setattr(
        papermill, "execute_notebook", lambda *a, **k: pytest.fail("the notebook was started")
    )
    assert run_notebook("main", "tiny", GIVEN) == out
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


@pytest.mark.slow
def test_three_ways_lead_to_one_configuration(out, home, tmp_path):
    """`lfpm run`, `papermill` and `pm.execute_notebook`.

    The same hash and, stage for stage, the same numbers."""
    import papermill as pm

    own = json.loads((out / "params.json").read_text(encoding="utf-8"))["config"]
    numbers = (
        pd.read_parquet(out / "metrics.parquet").query("kind != 'seconds'").reset_index(drop=True)
    )
    book, by_hand = notebooks()["main"], home / "runs" / "main" / "by-hand"
    words = [w for k, v in GIVEN.items() for w in ("-p", k, v)]

    def shell():
        command = [
            sys.executable,
            "-m",
            "papermill",
            book,
            tmp_path / "a.ipynb",
            "-p",
            "preset",
            "tiny",
            *words,
        ]
        subprocess.run([str(w) for w in command], check=True, capture_output=True)

    def python():
        given = SMALL | dict(preset="tiny", tasks=SMALL["tasks"].split(","))
        pm.execute_notebook(book, tmp_path / "b.ipynb", given, progress_bar=False)

    for way in (shell, python):
        shutil.rmtree(by_hand, ignore_errors=True)
        way()
        assert json.loads((by_hand / "params.json").read_text(encoding="utf-8"))["config"] == own
        found = (
            pd.read_parquet(by_hand / "metrics.parquet")
            .query("kind != 'seconds'")
            .reset_index(drop=True)
        )
        pd.testing.assert_frame_equal(found, numbers, check_exact=True)


# --- flipped bits -------------------------------------------------------------------------------


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as f:
        f.seek(bit // 8)
        byte = f.read(1)[0]
        f.seek(bit // 8)
        f.write(bytes([byte ^ 1 << bit % 8]))


def test_every_flipped_bit_of_a_run_is_noticed(out, home):
    """200 seeded flips, each alone.

    Anywhere in a stage's file or in the table, half of them among the first 4,096 bytes."""
    table, draw = out / "metrics.parquet", random.Random(0)
    stages = sorted((home / "cache").rglob("*.safetensors"))
    assert len(stages) > 10 and not any(map(damage, stages)) and isinstance(look(out), Finished)
    missed = []
    for i in range(200):
        path = table if i % 4 == 0 else draw.choice(stages)
        size = path.stat().st_size
        bit = draw.randrange(8 * (min(size, 4096) if i % 8 < 4 else size))
        flip(path, bit)
        if path == table:
            noticed = status(out) == "damaged" and isinstance(look(out), str)
        else:
            noticed = bool(damage(path))
        flip(path, bit)
        if not noticed:
            missed.append((path.name, bit))
    assert missed == [] and status(out) == "done"


def test_a_flipped_table_is_never_shown(out, home):
    flip(out / "metrics.parquet", 4000)
    try:
        with pytest.raises(FileNotFoundError, match="no finished run of main .* is damaged"):
            load_runs("main", "tiny")
    finally:
        flip(out / "metrics.parquet", 4000)
    assert load_runs("main", "tiny")[1]["folders"] == [out]


# --- interrupted (slow) -------------------------------------------------------------------------


def start(root: Path) -> subprocess.Popen:
    "`lfpm run main --preset tiny …` in a session of its own, results and stages under `root`."
    env = os.environ | dict(
        LFPM_RUNS=str(root / "runs"), LFPM_CACHE=str(root / "cache"), LFPM_FORCE="0"
    )
    args = [a for k, v in GIVEN.items() for a in ("-p", f"{k}={v}")]
    code = "import sys; from lfpm_nb.cli import main; main()"
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "log.txt", "a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-c", code, "run", "main", "--preset", "tiny", *args],
            env=env,
            start_new_session=True,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # a runner in the background may ignore it


def stages(root: Path) -> int:
    return len(list((root / "cache").rglob("*.safetensors")))


def wait_for_stages(p: subprocess.Popen, root: Path, n: int):
    t0 = time.time()
    while stages(root) < n:
        assert p.poll() is None and time.time() - t0 < 400, (root / "log.txt").read_text(
            encoding="utf-8"
        )
        time.sleep(0.05)


def kill(p: subprocess.Popen):
    "The command and its kernel, at once and without warning."
    family = [psutil.Process(p.pid), *psutil.Process(p.pid).children(recursive=True)]
    for q in family:
        q.kill()
    psutil.wait_procs(family, timeout=20)
    p.wait()


def metrics(root: Path) -> pd.DataFrame:
    "All rows but times and memory."
    (folder,) = (root / "runs" / "main").iterdir()
    assert (
        sorted(p.name for p in folder.iterdir()) == FILES
        and json.loads((folder / "status.json").read_text(encoding="utf-8"))["state"] == "done"
    )
    df = pd.read_parquet(folder / "metrics.parquet")
    return df[~df.metric.isin(["seconds", "cpu_seconds", "peak_mb"])].reset_index(drop=True)


@pytest.mark.slow
def test_killed_at_several_stages_it_ends_with_the_same_numbers(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    p = start(whole)
    assert p.wait(500) == 0, (whole / "log.txt").read_text(encoding="utf-8")
    total = stages(whole)
    for at in sorted({1 + os.getpid() % 3, total // 2, total - 2}):
        p = start(broken)
        wait_for_stages(p, broken, at)
        kill(p)
        assert not list(broken.rglob("status.json")) and not list(
            broken.rglob("metrics.parquet")
        ), f"killed after {at} of {total} stages, yet there is a result"
    kept = {f: f.stat().st_mtime_ns for f in (broken / "cache").rglob("*.safetensors")}
    assert start(broken).wait(500) == 0, (broken / "log.txt").read_text(encoding="utf-8")
    assert all(f.stat().st_mtime_ns == t for f, t in kept.items()), (
        "finished stages were not computed again"
    )
    pd.testing.assert_frame_equal(metrics(broken), metrics(whole), check_exact=True)


@pytest.mark.slow
def test_ctrl_c_leaves_no_results_folder_and_no_process(tmp_path):
    p = start(tmp_path)
    wait_for_stages(p, tmp_path, 2)
    family = psutil.Process(p.pid).children(recursive=True)
    p.send_signal(signal.SIGINT)
    assert p.wait(60) == 130, (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert (
        not list((tmp_path / "runs").rglob("*.*"))
        and not list((tmp_path / "runs" / "main").iterdir())
        and stages(tmp_path) >= 2
    )
    assert "lfpm: stopped; finished stages are kept" in (tmp_path / "log.txt").read_text(
        encoding="utf-8"
    )
    assert not psutil.wait_procs(family, timeout=20)[1], "the kernel is still running"
