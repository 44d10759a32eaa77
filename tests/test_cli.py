"""The `lfpm` command: what it prints, what it refuses, and its exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from lfpm_nb import cli, experiment as E
from lfpm_nb.attack import attacks
from lfpm_nb.clip import data_cards
from lfpm_nb.defend import defences
from lfpm_nb.path import lam_rules
from lfpm_nb.settings import parameters
from lfpm_nb.runs import finish, planned, read_status
from lfpm_nb.merge import merges
from conftest import fake
from test_results import paths


@pytest.fixture
def runs(dirs):
    return dirs / "runs"


def test_doctor(lfpm, dirs):
    code, out, err = lfpm("doctor")
    lines = dict(l.split(None, 1) for l in out.splitlines() if " " in l)
    assert (
        code == 0
        and err == ""
        and {
            "python",
            "torch",
            "open_clip",
            "lfpm_nb",
            "device",
            "threads",
            "backbones",
            "runs",
            "cache",
        }
        <= lines.keys()
    )
    assert (
        lines["runs"].strip() == str(dirs / "runs")
        and lines["cache"].strip() == str(dirs / "cache")
        and all(b in lines["backbones"] for b in data_cards())
    )
    assert "nothing is missing" in out and lines["notebooks"].strip() == f"run in {sys.executable}"


def test_doctor_says_what_is_missing_and_how_to_get_it(lfpm, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr(cli, "data_cards", dict)
    code, out, _ = lfpm("doctor")
    assert (
        code == 0
        and "pip install ipywidgets" in out
        and "nothing is missing" not in out
        and "lfpm run pretrain" in out
    )


def test_methods_lists_every_kind_with_its_needs(lfpm, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    code, out, _ = lfpm("methods")  # no terminal: an entry is a line, for grep
    assert code == 0
    for reg in (merges, attacks, defences, lam_rules):
        assert f"{reg.kind}s" in out.splitlines()
        for name, m in reg.items():
            line = next(l for l in out.splitlines() if l.split()[:1] == [name])
            assert (
                m["long"] in line
                and all(n in line for n in m["needs"] or ["weights only"])
                and m["source"] in line
            )


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["data", "--help"],
        ["methods"],
        ["run", "--list"],
        ["run", "main", "--dry-run"],
        ["data", "list"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("columns", [80, 120])
def test_lists_fit_the_window_and_lose_no_word(lfpm, monkeypatch, args, columns):
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = lfpm(*args)[1]
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, err = lfpm(*args)
    assert (
        (code, err) == (0, "")
        and out.split() == wide.split()
        and max(map(len, out.splitlines())) <= columns
    )
    assert not [l for l in out.splitlines() if l.endswith("...") and not l.startswith("Usage")], (
        "a summary longer than its line"
    )


@pytest.mark.parametrize("preset", ["lab", "tiny"])
def test_dry_run_prints_every_parameter_and_runs_nothing(lfpm, dirs, monkeypatch, preset):
    monkeypatch.setenv("COLUMNS", "10000")  # an entry a line, whatever window the tests run in
    monkeypatch.setattr(cli, "run_notebook", lambda *a, **k: pytest.fail("it ran"))
    code, out, err = lfpm(
        "run", "main", "--preset", preset, "-p", "scale=0.35", "--seed", "5", "--dry-run"
    )
    want, helps = planned("main", preset, {"scale": "0.35"}, 5).passed, parameters("main")
    assert code == 0 and err == "" and not (dirs / "runs").exists()
    lines = {l.split()[0]: l for l in out.splitlines()}
    assert list(lines) == list(helps)
    for k, line in lines.items():
        assert json.dumps(want[k]) in line and helps[k][1] in line
    assert "0.35" in lines["scale"] and lines["seed"].split()[1] == "5"


def test_run_passes_everything_on(lfpm, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "run_notebook", lambda *a: seen.append(a) or Path("out"))
    assert lfpm(
        "run",
        "main",
        "--preset",
        "tiny",
        "-p",
        "lam=0.5",
        "-p",
        "target_class=stop=1",
        "--seed",
        "3",
        "--force",
    )[:2] == (0, "results in out\n")
    assert seen == [("main", "tiny", {"lam": "0.5", "target_class": "stop=1"}, 3, True)]


@pytest.mark.parametrize(
    "error, code",
    [
        (ValueError("no"), 2),
        (FileNotFoundError("no"), 2),
        (PermissionError("no"), 2),
        (RuntimeError("no"), 1),
    ],
)
def test_errors_become_one_line_and_an_exit_code(lfpm, monkeypatch, error, code):
    def fails(*a):
        raise error

    monkeypatch.setattr(cli, "run_notebook", fails)
    assert lfpm("run", "main") == (code, "", "lfpm: no\n")


def test_ctrl_c_says_that_nothing_is_lost(lfpm, monkeypatch):
    def stopped(*a):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_notebook", stopped)
    code, out, err = lfpm("run", "main")
    assert (
        code == 130
        and out == ""
        and "stopped; finished stages are kept, so the same command continues" in err
        and "Traceback" not in err
    )


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["run", "--help"],
        ["table", "--help"],
        ["doctor", "--help"],
        ["methods", "--help"],
    ],
)
def test_help_teaches(args):
    result = CliRunner().invoke(cli.app, args)
    assert result.exit_code == 0
    words = re.sub(r"\s+", " ", result.output)
    need = {
        "run": ("--preset", "key=value", "--seed", "--dry-run", "--force", "tiny", "main"),
        "table": ("--preset", "--json", "mean ± std"),
        "--help": ("doctor", "methods", "run", "table", "lfpm run main --preset tiny"),
    }.get(args[0], ("Usage",))
    assert all(w.lower() in words.lower() for w in need), words


# --- table --------------------------------------------------------------------------------------

KEYS = {"method", "CA", "ASR_T", "ASR_N", "path_ASR", "n_seeds"}


def test_table_json_is_nothing_but_json(lfpm, runs):
    for seed in (0, 1):
        fake(runs, f"s{seed}", {"TA": 70 + seed, "LFPM": 69}, seed=seed)
    fake(runs, "other", {"TA": 1}, config="bbbb", age=900)
    code, out, err = lfpm("table", "main", "--json")
    rows = json.loads(out)
    assert (
        code == 0
        and [r["method"] for r in rows] == ["TA", "LFPM"]
        and all(KEYS <= r.keys() for r in rows)
    )
    assert (
        rows[0]["CA"] == 70.5
        and rows[0]["n_seeds"] == 2
        and rows[0]["ASR_T"] is None
        and "1 finished runs of other configurations" in err
    )


def test_table_prints_markdown_and_where_the_figure_is(lfpm, runs):
    out = fake(runs, "s0", {"TA": 70}, seed=0)
    code, text, err = lfpm("table", "main")
    assert (
        code == 0
        and err == ""
        and text.splitlines()[0].startswith("| method |")
        and "| TA | 70.0 |" in text
        and text.rstrip().endswith(str(out / "path.html"))
    )
    assert len({l.count("|") for l in text.splitlines() if l.startswith("|")}) == 1


BROKEN = {
    "status.json": [
        b"",
        b"{",
        b"[]",
        b'["done"]',
        b"3",
        b'"done"',
        b"{}",
        b'{"state": "done"}',
        b'{"state": {}}',
        b"\xff\xfe",
        b'{"state": "done", "metrics": 3}',
        b'{"state": "failed"}',
        b'{"state": "failed", "error": "", "preset": "lab"}',
        b'{"state": "failed", "error": ["x"], "preset": "lab"}',
        None,
    ],
    "metrics.parquet": [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", None],
    "params.json": [b"", b"[]", b"3", b"{", b"\xff", b"{}", None],
}


def spoil(file, content: bytes | None) -> None:
    file.unlink()
    if content is not None:
        file.write_bytes(content)


@pytest.mark.parametrize(
    "name, content", [(n, c) for n, contents in BROKEN.items() for c in contents]
)
@pytest.mark.parametrize("believed", [False, True])
def test_nothing_in_the_runs_folder_ends_in_a_traceback(
    lfpm, runs, tmp_path, name, content, believed
):
    """A broken file beside a good run, alone, and as what `explore` is to open.

    `believed`: the status names the broken table's hash."""
    good, bad = (
        fake(runs, "lab-s0-aaaa", {"TA": 70}),
        fake(runs, "lab-s1-aaaa", {"TA": 999}, seed=1),
    )
    spoil(bad / name, content)
    if believed and name == "metrics.parquet":
        finish(bad, **{k: v for k, v in read_status(bad).items() if k not in ("state", "metrics")})
    (runs / "lab-s0-aaaa").mkdir()
    (runs / "unheard of").mkdir()
    (runs / "main" / "a file").write_text("x", encoding="utf-8")
    (runs / "lobam").write_text("no folder", encoding="utf-8")
    whole = content == b"{}" and name == "params.json"  # it lacks nothing that the table needs
    code, out, err = lfpm("table", "main")
    assert (
        code == 0
        and ("| TA | 70.0 |" in out) != whole
        and ("main/lab-s1-aaaa" in err) != whole
        and "Traceback" not in err
    ), err
    (sweep := tmp_path / "s.yaml").write_text("preset: tiny\nruns: [main]", encoding="utf-8")
    assert lfpm("sweep", str(sweep), "--dry-run")[0] == 0
    code, out, err = lfpm("explore", "--run", str(bad), "--html", str(tmp_path / "x.html"))
    assert code == 2 and err.startswith("lfpm: ") and err.count("\n") == 1, err
    shutil.rmtree(good)
    code, out, err = lfpm("table", "main")
    assert whole or (
        code == 2 and out == "" and err.count("\n") == 1 and "no finished run of main" in err
    ), err


def test_table_against_a_method(lfpm, runs):
    folder = fake(runs, "s0", {"TA": 70})
    both = paths(
        {"LFPM": ((70, 69, 60), (90, 2, 0)), "SAM": ((70, 69, 60), (90, 40, 5))},
        {"LFPM": 0.5, "SAM": 1.0},
    )
    pd.concat(
        [pd.read_parquet(folder / "metrics.parquet").query("kind == 'model'"), both]
    ).to_parquet(folder / "metrics.parquet")
    finish(
        folder, **{k: v for k, v in read_status(folder).items() if k not in ("state", "metrics")}
    )
    code, text, err = lfpm("table", "main", "--against", "lfpm")
    assert code == 0 and "| SAM | 40.0 | 38.0 |" in text, text
    assert "LFPM" in lfpm("table", "main", "--against", "LFMP")[2]


def test_table_of_another_preset(lfpm, runs):
    fake(runs, "t", {"TA": 5}, preset="tiny")
    assert lfpm("table", "main")[0] == 2 and "5.0" in lfpm("table", "main", "--preset", "tiny")[1]


def test_table_without_runs(lfpm, dirs):
    code, out, err = lfpm("table", "main", "--json")
    assert (
        (code, out, err.count("\n")) == (2, "", 1)
        and "no finished run of main" in err
        and "lfpm run main" in err
    )


def test_table_refuses_unknown_names(lfpm, dirs):
    assert "unknown run 'mian'; did you mean 'main'" in lfpm("table", "mian")[2]
    assert "did you mean 'tiny'" in lfpm("table", "main", "--preset", "tinny")[2]


@pytest.mark.parametrize(
    "command", [("run", "main", "--preset", "tiny"), ("sweep", "all-lab")], ids=" ".join
)
def test_what_several_processes_would_spoil_is_refused(lfpm, dirs, monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "4")
    code, out, err = lfpm(*command)
    assert (
        (code, out) == (2, "")
        and f"lfpm {command[0]} was started in 4 processes" in err
        and "lfpm purify" in err
        and not (dirs / "runs").exists()
    )


# --- as a program -------------------------------------------------------------------------------


def test_the_command_itself(dirs):
    "One process from the shell: the installed entry point, an error without a traceback."
    code = "import sys; from lfpm_nb.cli import main; sys.argv = ['lfpm', 'run', 'mian']; main()"
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert (
        r.returncode == 2
        and r.stdout == ""
        and r.stderr.strip().splitlines()[-1] == "lfpm: unknown run 'mian'; did you mean 'main'?"
        and "Traceback" not in r.stderr
    )


@pytest.mark.parametrize(
    "code",
    [
        "import sys; from lfpm_nb.cli import main; sys.argv = ['lfpm', 'methods']; main()",
        "import sys; from lfpm_nb.cli import main; "
        "sys.argv = 'lfpm run main --preset tiny --dry-run'.split(); main()",
        "from lfpm_nb.runs import planned; print(planned('main', 'tiny').config)",
    ],
    ids=["methods", "dry run", "configuration"],
)
def test_the_locale_changes_nothing(dirs, code):
    "ASCII is the strictest locale: whatever is read or printed by it fails at the first λ."

    def said(**env):
        r = subprocess.run([sys.executable, "-c", code], capture_output=True, env=os.environ | env)
        assert r.returncode == 0 and not r.stderr, r.stderr.decode(errors="replace")
        return r.stdout.decode("utf-8")

    assert said(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0") == said(PYTHONUTF8="1") != ""


@pytest.mark.parametrize(
    "given, want",
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")],
    ids=["ours", "the user's own"],
)
def test_threads_wait_without_spinning_unless_told_otherwise(given, want):
    """Asked of OpenMP itself, as the command loads it.

    Set too late, a policy would be there and not be read."""
    env = (
        {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
        | {"OMP_DISPLAY_ENV": "TRUE"}
        | given
    )
    loaded = "import os; from lfpm_nb.cli import main; import torch; "
    code = loaded + "print(os.environ['OMP_WAIT_POLICY'])"
    r = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", env=env
    )
    assert r.returncode == 0 and r.stdout.strip() == want, "what a run's kernel inherits"
    said = re.findall(r"OMP_WAIT_POLICY\s*=\s*'(\w+)'", r.stderr)
    if not said:
        pytest.skip("this OpenMP does not show its settings")
    assert set(said) == {want}
