"""Sweeps: a file becomes points, points become runs on Dask workers.

What is finished stays finished, whoever is killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lfpm_nb import sweep as S
from lfpm_nb.core import write_json
from lfpm_nb.runs import experiments, finish
from lfpm_nb.sweep import Point, finished, interleave, overview, read_sweep, sweep, using

ROOT = Path(S.__file__).parents[1]

# --- the file -----------------------------------------------------------------------------------


def sweep_file(folder, text):
    (folder / "s.yaml").write_text(text, encoding="utf-8")
    return folder / "s.yaml"


@pytest.mark.parametrize(
    "text, message",
    [
        ("runs: []", "expected a list of one run or more"),
        ("seeds: [0]", "lacks runs"),
        ("runs: main", "expected a list of one run or more"),
        ("run: [main]", "unknown key in .*s.yaml 'run'; did you mean 'runs'"),
        ("runs: [mian]", "unknown run in .*s.yaml 'mian'; did you mean 'main'"),
        (
            "runs: [{run: main, grid: {scal: [1]}}]",
            "unknown parameter of main 'scal'; did you mean 'scale'",
        ),
        (
            "runs: [{run: main, grid: {scale: []}}]",
            "scale of main is .*expected a list of one value or more",
        ),
        ("runs: [{run: main, grid: {scale: 0.3}}]", "expected a list of one value or more"),
        ("runs: [main]\nseeds: []", "seeds of main is"),
        ("runs: [main]\npreset: tinny", "unknown preset of main 'tinny'; did you mean 'tiny'"),
        ("runs: [{grid: {}}]", "is not a run"),
        ("runs: [{run: main, girds: {}}]", "unknown key of a run in .*'girds'"),
        ("runs: [main, main]", "'main s0' and 'main s0' are the same run; remove one"),
        ("runs: [main, {run: main, grid: {scale: [0.3]}}]", "are the same run"),
        ("runs: [{run: main, grid: {lam: [2]}}]", r"a number in \[0, 1\]"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_sweep(sweep_file(tmp_path, text))


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sweep at .*none.yaml"):
        read_sweep(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="unknown sweep"):
        read_sweep("none")


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "data" / "sweeps").glob("*.yaml")))
def test_shipped_sweeps_are_whole(name):
    title, points = read_sweep(name)
    assert title and points and all(S.experiments()[p.name].minutes.get(p.preset) for p in points)


def test_a_grid_is_every_combination_for_every_seed(tmp_path):
    text = (
        "preset: tiny\nseeds: [0, 1]\nruns:\n"
        "- {run: main, grid: {scale: [0.2, 0.4], A: [true, false]}}\n"
        "- {run: ctl, seeds: [7], preset: lab}"
    )
    _, points = read_sweep(sweep_file(tmp_path, text))
    assert len(points) == 2 * 2 * 2 + 1 and {
        (p.seed, p.given.get("scale"), p.given.get("A")) for p in points[:-1]
    } == {(s, a, b) for s in (0, 1) for a in (0.2, 0.4) for b in (True, False)}
    assert (points[-1].name, points[-1].preset, points[-1].seed) == ("ctl", "lab", 7) and points[
        0
    ].preset == "tiny"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=12))
def test_interleaving_keeps_each_seeds_order_and_separates_seeds(pairs):
    points = [Point(str(n), "tiny", s) for s, n in pairs]
    mixed = interleave(points)
    assert sorted(map(id, mixed)) == sorted(map(id, points))
    for s in range(4):
        assert [p for p in mixed if p.seed == s] == [p for p in points if p.seed == s]
    counts = [sum(p.seed == s for p in points) for s in range(4)]
    if len(set(c for c in counts if c)) == 1 and sum(map(bool, counts)) > 1:
        assert all(a.seed != b.seed for a, b in zip(mixed, mixed[1:]))


def test_a_runs_process_is_told_its_threads_in_every_dialect(monkeypatch):
    """Dask leaves MKL_NUM_THREADS=1 in its workers and in whoever started them.

    And torch obeys it before OMP_NUM_THREADS."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    for n, v in zip(names, ("1", "1", None)):
        monkeypatch.setenv(n, v) if v else monkeypatch.delenv(n, raising=False)
    with using(2, {}):
        told = subprocess.run(
            [sys.executable, "-c", f"import os; print(*[os.environ[n] for n in {names}])"],
            capture_output=True,
            text=True,
        ).stdout.split()
    assert told == ["2"] * 3 and [os.environ.get(n) for n in names] == ["1", "1", None]


def test_threads_and_environment_are_as_before_afterwards():
    before, omp = torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]
    with pytest.raises(KeyError), using(3, {"LFPM_X": "1", "LFPM_Y": None}):
        assert (
            torch.get_num_threads() == 3
            and os.environ["OMP_NUM_THREADS"] == "3"
            and os.environ["LFPM_X"] == "1"
            and "LFPM_Y" not in os.environ
        )
        raise KeyError
    assert (
        torch.get_num_threads() == before
        and os.environ["OMP_NUM_THREADS"] == omp
        and "LFPM_X" not in os.environ
    )


# --- the sweep, with runs that do nothing, on Dask threads of this process ----------------------


@pytest.fixture
def runs(dirs, monkeypatch):
    "Runs that only write a status; `runs.bad` names seeds that fail, `runs.ran` what was executed."
    from distributed import Client
    import contextlib

    @contextlib.contextmanager
    def local(workers, scheduler):
        with Client(
            processes=False, n_workers=workers, threads_per_worker=1, dashboard_address=None
        ) as client:
            yield client

    def execute(plan, force=False):
        runs.ran.append(plan.settings.seed)
        if plan.settings.seed in runs.bad:
            raise RuntimeError("main failed in cell 3: too much\nmore")
        finish(plan.out)
        return plan.out

    runs = type(
        "Runs",
        (),
        dict(
            ran=[],
            bad=set(),
            file=sweep_file(dirs, "preset: tiny\nseeds: [0, 1, 2]\nruns: [main]"),
            root=dirs,
        ),
    )
    monkeypatch.setattr(S, "cluster", local)
    monkeypatch.setattr(S, "execute", execute)
    return runs


def test_a_failed_run_is_recorded_and_the_rest_go_on(runs):
    runs.bad = {1}
    t = sweep(runs.file, threads=torch.get_num_threads())
    assert (
        t.state.tolist() == ["done", "failed", "done"]
        and "too much" in t.error[1]
        and sorted(runs.ran) == [0, 1, 2]
    )
    assert [
        r["state"]
        for r in json.loads((runs.root / "runs" / "sweeps" / "s.json").read_text(encoding="utf-8"))
    ].count("failed") == 1


def test_a_worker_has_no_run_in_its_queue_beside_the_one_it_does(runs, monkeypatch):
    "Dask blames every run in a dead worker's queue for its death."
    from distributed import get_worker

    queued = []

    def execute(plan, force=False):
        tasks = get_worker().state.tasks.values()
        queued.append(sum(t.state in ("executing", "ready", "waiting") for t in tasks))
        return plan.out

    monkeypatch.setattr(S, "execute", execute)
    assert set(sweep(runs.file, workers=1).state) == {"done"}
    assert queued == [1, 1, 1]


def test_without_any_worker_what_is_left_has_failed(runs, monkeypatch):
    from distributed import Client
    import contextlib

    @contextlib.contextmanager
    def deserted(workers, scheduler):
        with Client(processes=False, n_workers=0, dashboard_address=None) as client:
            yield client

    monkeypatch.setattr(S, "cluster", deserted)
    monkeypatch.setattr(S, "NO_WORKER", 1)
    t = sweep(runs.file)
    assert (
        set(t.state) == {"failed"}
        and t.error.str.contains("no worker has been there for 1 s; start one, then --resume").all()
        and not runs.ran
    )
    assert (
        len(json.loads((runs.root / "runs" / "sweeps" / "s.json").read_text(encoding="utf-8"))) == 3
    )


def test_runs_do_not_inherit_dasks_thrifty_malloc(runs, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    seen = []
    monkeypatch.setattr(
        S,
        "execute",
        lambda plan, force=False: seen.append(os.environ.get("MALLOC_TRIM_THRESHOLD_")) or plan.out,
    )
    assert set(sweep(runs.file).state) == {"done"} and seen == [None] * 3


def test_resume_repeats_nothing_finished_and_tries_the_failed_again(runs):
    runs.bad = {1}
    sweep(runs.file)
    runs.ran.clear()
    runs.bad = set()
    with pytest.raises(ValueError, match="2 of 3 runs are finished already; --resume keeps them"):
        sweep(runs.file)
    t = sweep(runs.file, resume=True)
    assert runs.ran == [1] and t.state.tolist() == ["skipped", "done", "skipped"]
    assert sweep(runs.file, resume=True).state.tolist() == ["skipped"] * 3 and runs.ran == [1]
    sweep(runs.file, force=True)
    assert sorted(runs.ran) == [0, 1, 1, 2]


def test_committed_results_count_as_finished(runs, monkeypatch):
    plan = read_sweep(runs.file)[1][1].plan()
    assert finished(plan) is None
    monkeypatch.setattr(S, "proj_path", lambda *p: runs.root.joinpath("committed", *p))
    folder = runs.root / "committed" / "data" / "results" / "main" / plan.out.name
    write_json(folder / "status.json", dict(state="failed"))
    assert finished(plan) is None
    finish(folder)
    assert finished(plan) == folder


def test_a_half_written_folder_is_run_again(runs):
    plan = read_sweep(runs.file)[1][0].plan()
    plan.out.mkdir(parents=True)
    (plan.out / "status.json").write_text('{"state": "do', encoding="utf-8")
    (plan.out / "metrics.parquet").write_bytes(b"PAR1")
    assert sweep(runs.file).state.tolist() == ["done"] * 3


def test_threads_belong_to_the_configuration(runs):
    one, two = (overview(runs.file, threads=n).point[0] for n in (1, 2))
    with using(1, {}):
        a = one.plan().config
    with using(2, {}):
        b = two.plan().config
    assert a != b


def test_a_scheduler_that_is_not_there(dirs, lfpm):
    file = sweep_file(dirs, "preset: tiny\nruns: [main]")
    code, _, err = lfpm("sweep", str(file), "--scheduler", "127.0.0.1:9")
    assert (
        code == 2 and "no Dask scheduler answers at 127.0.0.1:9" in err and "dask scheduler" in err
    )


@pytest.mark.parametrize("n", [1, 3])
def test_as_many_workers_as_asked_for(n):
    with S.cluster(n, None) as client:
        assert list(client.nthreads().values()) == [1] * n


def test_dry_run_lists_and_does_nothing(dirs, lfpm):
    code, out, _ = lfpm(
        "sweep", str(sweep_file(dirs, "preset: tiny\nseeds: [0, 3]\nruns: [main]")), "--dry-run"
    )
    assert (
        code == 0 and "main s3" in out and out.count("to do") == 2 and not (dirs / "runs").exists()
    )


# --- real processes, really killed (slow) -------------------------------------------------------

TOY = [
    'seed: int = 0  # seed\nx: float = 1.0  # factor\nout_dir: str = ""  # folder',
    """
import os, signal, time, torch, pandas as pd
from pathlib import Path
from lfpm_nb.core import Stages, generator, writing
# of this kernel the parent is the worker
if x < 0: os.kill({-1.0: os.getppid(), -2.0: os.getpid()}[x], signal.SIGKILL)
stages = Stages()
def said(what):
    with open(Path(os.environ["LFPM_RUNS"]) / "log", "a") as f: f.write(what + "\\n")
def base():
    time.sleep(.5); said(f"base {seed}")
    return {"w": torch.randn(64, 64, generator=generator("toy", seed))}, {}
w = stages("base", (seed,), base)[0]["w"]
def own():
    time.sleep(.5); said(f"own {seed} {x}")
    return {"y": torch.linalg.matrix_exp(x * w / 10)}, {}
y = stages("own", (x, w), own)[0]["y"]
values = dict(sum=y.sum().item(), max=y.max().item())
rows = [dict(method="toy", metric=k, value=v, seed=seed) for k, v in values.items()]
df = pd.DataFrame(rows)
with writing(Path(out_dir) / "metrics.parquet") as tmp: df.to_parquet(tmp)""",
]


@pytest.fixture
def toy(tmp_path):
    """A copy of the package with one small run notebook.

    `toy.start(root, *args)` is `lfpm sweep` there."""
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT / "lfpm_nb", tree / "lfpm_nb", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tree / "nbs" / "runs").mkdir(parents=True)
    (tree / "data" / "experiments").mkdir(parents=True)
    (tree / "data" / "sweeps").mkdir()
    nb = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(c) for c in TOY],
        metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")),
    )
    nb.cells[0].metadata.tags = ["parameters"]
    nbformat.write(nb, tree / "nbs" / "runs" / "toy.ipynb")
    for name in ("main", "purify"):
        shutil.copy(
            ROOT / "nbs" / "runs" / f"{name}.ipynb", tree / "nbs" / "runs"
        )  # the library reads their parameters
    file = sweep_file(tmp_path, "seeds: [0, 1]\nruns: [{run: toy, grid: {x: [1.0, 2.0]}}]")

    def env(root):
        return os.environ | dict(
            PYTHONPATH=str(tree),
            LFPM_RUNS=str(root / "runs"),
            LFPM_CACHE=str(root / "cache"),
            OMP_NUM_THREADS="1",
        )

    def start(root, *args, module="import sys; from lfpm_nb.cli import main; main()"):
        (root / "runs").mkdir(parents=True, exist_ok=True)
        with open(root / "out.txt", "a", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, "-c", module, "sweep", str(file), *args],
                env=env(root),
                cwd=root,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    return type("Toy", (), dict(start=staticmethod(start), env=staticmethod(env)))


def log(root):
    return sorted((root / "runs" / "log").read_text(encoding="utf-8").split("\n")[:-1])


def numbers(root) -> pd.DataFrame:
    found = [
        pd.read_parquet(f.parent / "metrics.parquet").assign(run=f.parent.name)
        for f in sorted((root / "runs" / "toy").glob("*/status.json"))
        if json.loads(f.read_text(encoding="utf-8"))["state"] == "done"
    ]
    return pd.concat(found, ignore_index=True)


def kill_some(p, who):
    "SIGKILL the sweep with all it started, one worker, or one kernel."
    family = psutil.Process(p.pid).children(recursive=True)
    named = lambda word: [q for q in family if word in " ".join(q.cmdline())]
    victims = {
        "sweep": [psutil.Process(p.pid), *family],
        "worker": named("spawn_main")[:1] or family[:1],
        "run": named("ipykernel_launcher")[:1] or family[:1],
    }[who]
    for q in victims:
        try:
            q.kill()
        except psutil.NoSuchProcess:
            pass


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_numbers(toy, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert toy.start(whole, "--workers", "2").wait(400) == 0, (whole / "out.txt").read_text(
        encoding="utf-8"
    )
    assert len(numbers(whole)) == 8 and numbers(whole).groupby(
        "metric"
    ).value.nunique().tolist() == [4, 4]
    assert log(whole) == sorted(
        ["base 0", "base 1", *(f"own {s} {x}" for s in (0, 1) for x in (1.0, 2.0))]
    ), "a shared stage is computed once"
    rng = random.Random(time.time_ns())
    for who in ("run", "worker", "sweep"):
        p = toy.start(broken, "--workers", "2", "--resume")
        deadline = time.time() + rng.uniform(6, 20)
        while p.poll() is None and time.time() < deadline:
            time.sleep(0.1)
        if p.poll() is None:
            kill_some(p, who)
        if who == "sweep":
            time.sleep(3)  # orphaned kernels notice that their parent is gone
        else:
            p.wait(400)
    assert toy.start(broken, "--workers", "2", "--resume").wait(400) == 0, (
        broken / "out.txt"
    ).read_text(encoding="utf-8")
    pd.testing.assert_frame_equal(numbers(broken), numbers(whole), check_exact=True)


@pytest.mark.slow
def test_what_kills_its_worker_again_and_again_has_failed(toy, tmp_path, monkeypatch):
    """One worker, and three runs: one kills it, one has its kernel killed, one is well.

    As the system kills when memory is out. Dask looks for lost workers at once here, not after
    15 s."""
    monkeypatch.setenv("DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT", "1s")
    root, file = tmp_path / "deadly", tmp_path / "s.yaml"
    file.write_text("runs: [{run: toy, grid: {x: [-1.0, -2.0, 1.0]}}]", encoding="utf-8")
    assert toy.start(root, "--workers", "1").wait(500) == 1, (root / "out.txt").read_text(
        encoding="utf-8"
    )
    found = {
        r["run"]: r
        for r in json.loads((root / "runs" / "sweeps" / "s.json").read_text(encoding="utf-8"))
    }
    assert found["toy s0 x=1.0"]["state"] == "done"
    assert (
        found["toy s0 x=-1.0"]["state"] == "failed"
        and "KilledWorker" in found["toy s0 x=-1.0"]["error"]
    )
    assert (
        found["toy s0 x=-2.0"]["state"] == "failed"
        and "the kernel of toy died" in found["toy s0 x=-2.0"]["error"]
    )


@pytest.mark.slow
def test_a_scheduler_and_two_workers_started_separately(toy, tmp_path):
    root = tmp_path / "remote"

    def dask(what, *args):
        return subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.dask_{what}", *args],
            env=toy.env(root),
            cwd=root,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    address = root / "address.json"
    root.mkdir()
    started = [
        dask(
            "scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--no-dashboard",
            "--scheduler-file",
            str(address),
        )
    ]
    try:
        for _ in range(300):
            if address.exists():
                break
            time.sleep(0.1)
        where = json.loads(address.read_text(encoding="utf-8"))["address"]
        started += [
            dask(
                "worker",
                where,
                "--nthreads",
                "1",
                "--no-dashboard",
                "--memory-limit",
                "0",
                "--local-directory",
                str(root),
            )
            for _ in range(2)
        ]
        assert toy.start(root, "--scheduler", where).wait(400) == 0, (root / "out.txt").read_text(
            encoding="utf-8"
        )
        assert (
            len(numbers(root)) == 8
            and (root / "out.txt").read_text(encoding="utf-8").count(" done ") == 4
        )
    finally:
        for p in started:
            os.killpg(p.pid, signal.SIGKILL)


# --- every experiment ---------------------------------------------------------------------------

OWN = {
    "backbone",
    "pretrain",
    "purify",
    "report",
}  # they need pictures of one's own, or files, or make no numbers; each has tests of its own


def test_all_tiny_names_every_experiment():
    assert {p.name for p in read_sweep("all-tiny")[1]} == set(experiments()) - OWN
