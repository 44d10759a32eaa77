"""The path explorer's core and widget.

What moves, what is exact, what is refused, and that nothing is left behind."""

import copy
import gc
import json
import re
import threading
import weakref

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import near, new_pico, small_task
from lfpm_nb import explore as X
from lfpm_nb.attack import Trigger
from lfpm_nb.core import proj_path
from lfpm_nb.explore import (
    KEEP,
    PathCore,
    PathExplorer,
    between,
    open_run,
    page_of,
    read_grid,
    same_origin,
    voila_template,
)
from lfpm_nb.explorers import (
    CTLCore,
    CTLExplorer,
    MergeCore,
    MergeExplorer,
    SubspaceCore,
    SubspaceExplorer,
)
from lfpm_nb.measure import Goal, Suite
from lfpm_nb.recorded import Recorded


def recorded_rows(names, n=5):
    return pd.DataFrame(
        [
            dict(kind="path", task="average", method=m, metric=k, lam=l, value=v)
            for m in names
            for k, a, b in (("CA", 70, 50), ("ASR_T", 90, 0), ("ASR_N", 40, 10))
            for l, v in zip(np.linspace(0, 1, n), np.linspace(a, b, n))
        ]
    )


SUITES = {}


def small_suite(clip):
    "Made once: heads take longer than all else."
    goal = Goal(3, Trigger(torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(1)), None))
    if id(clip) not in SUITES:
        SUITES[id(clip)] = (
            clip,
            Suite.of(clip, [small_task("signs"), small_task("land")], {"signs": goal}),
        )
    return SUITES[id(clip)][1]


def make(clip, names=("LFPM", "SAM"), n=24, **more):
    given = dict(
        start=near(clip, 1),
        ends={m: near(clip, 2 + i, 0.01) for i, m in enumerate(names)},
        suite=small_suite(clip),
        rows=recorded_rows(names),
        chosen=dict.fromkeys(names, 0.4),
        flat={"TA (clean), same trigger": dict(CA=72.0, ASR_T=0.2)},
        n=n,
    )
    return PathCore(clip, **(given | more))


@pytest.fixture
def core(pico):
    return make(pico)


def test_between_is_linear_and_knows_its_points(core):
    g = core.grids["LFPM"]
    assert (
        read_grid(g, 0.5) == dict(CA=60.0, ASR_T=45.0, ASR_N=25.0, on=True)
        and not read_grid(g, 0.6)["on"]
        and read_grid(g, 0.6)["CA"] == pytest.approx(58)
    )


def test_both_ends_are_the_models_bit_for_bit(core):
    for lam, state in ((0.0, core.start), (1.0, core.ends["LFPM"])):
        assert all(torch.equal(v, state[k]) for k, v in core.path.at(lam).state_dict().items())


def test_exact_is_the_mixed_model_and_is_cached(core, pico):
    from lfpm_nb.clip import features, logits
    from lfpm_nb.path import lerp

    look = core.exact(0.3)
    h = features(pico, pico.with_state(lerp(core.start, core.ends["LFPM"], 0.3)), core.x)
    assert torch.equal(look["pred"], logits(h, core.W).argmax(1).cpu()) and look["xy"].shape == (
        2 * core.n,
        2,
    )
    assert (core.y != core.target).all() and look["ASR_T"] == pytest.approx(
        100 * (look["pred"][core.n :] == core.target).float().mean().item()
    )
    assert (
        core.exact(0.3) is look
        and core.move(0.3)["look"] is look
        and core.move(0.31)["look"] is not look
    )


def test_the_map_does_not_turn_while_walking(core):
    axes = core.axes[1].clone()
    for lam in (0.1, 0.9):
        core.exact(lam)
    assert torch.equal(axes, core.axes[1])
    core.select("SAM")
    assert not torch.equal(axes, core.axes[1]) and core.cache == {}


def test_an_interruption_in_the_middle_leaves_a_right_model(core, monkeypatch):
    want = core.exact(0.6)["pred"]
    core.cache.clear()
    real = X.Path.at

    def broken(self, lam):
        real(self, lam)
        raise KeyboardInterrupt

    monkeypatch.setattr(X.Path, "at", broken)
    with pytest.raises(KeyboardInterrupt):
        core.exact(0.6)
    assert core.cache == {}, "nothing half-done is kept"
    monkeypatch.undo()
    assert torch.equal(core.exact(0.6)["pred"], want) and not core.lock.locked()


def test_an_interrupted_choice_of_another_path_changes_nothing(core, monkeypatch):
    path, axes, coarse, real, calls = core.path, core.axes, core.coarse, PathCore._features, []

    def broken(self, path, lam):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(lam)
        return real(self, path, lam)

    monkeypatch.setattr(PathCore, "_features", broken)
    with pytest.raises(KeyboardInterrupt):
        core.select("SAM")
    assert (
        core.name == "LFPM"
        and core.path is path
        and core.axes is axes
        and core.coarse is coarse
        and not core.lock.locked()
    )
    monkeypatch.undo()
    core.select("SAM")
    assert core.name == "SAM" and core.path is not path


def test_two_explorers_do_not_share_a_model(pico):
    a, b = make(pico), make(pico)
    want = a.exact(0.2)["pred"]
    b.exact(0.9)
    a.cache.clear()
    assert torch.equal(a.exact(0.2)["pred"], want) and {
        v.data_ptr() for v in a.path.out.values()
    }.isdisjoint(v.data_ptr() for v in b.path.out.values())


def test_two_models_of_different_origin(pico):
    "Same shapes, other seed: no path leads from one to the other."
    other = {
        k: torch.randn(v.shape, generator=torch.Generator().manual_seed(5))
        if v.is_floating_point()
        else v
        for k, v in pico.state().items()
    }
    with pytest.raises(
        ValueError,
        match="the end called LFPM: their weights have a cosine of -?0.0.*same pretrained one",
    ):
        make(pico, ends={"LFPM": other})
    same_origin(near(pico, 1), near(pico, 2), "two neighbours")


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(ends={}), "at least one end"),
        (dict(rows=recorded_rows(["LFPM", "SAM"], 1)), "at least 2"),
        (dict(n=0), "expected 1 to"),
        (dict(n=10**6), "stays in memory"),
    ],
)
def test_bad_input(pico, change, why):
    with pytest.raises(ValueError, match=why):
        make(pico, **change)


def test_other_shapes_no_trigger_and_lambda_outside(pico, lab, core):
    with pytest.raises(ValueError, match="the end called LFPM"):
        make(pico, ends={"LFPM": lab.state()})
    with pytest.raises(ValueError, match="no triggered images"):
        make(pico, suite=Suite.of(pico, [small_task("land")], {}))
    with pytest.raises(ValueError, match="expected a number in"):
        core.move(1.2)
    with pytest.raises(ValueError, match="SAM"):
        core.select("SAN")


def settle(e):
    if e.timer:
        e.timer.join()


def test_widget_drag_then_rest(core):
    e = PathExplorer(core, rest=0.02)
    view = e.show()
    assert e.show() is view, "opened twice: the same widget"
    settle(e)
    k = e.fig.layout.meta["moving"]
    e.slider.value = 0.3
    assert (
        "interpolated" in e.words.value
        and "exact" not in e.words.value
        and e.box.value == 0.3
        and e.fig.data[k + 1].x == (0.3,)
    )
    settle(e)
    assert (
        f"exact on {core.n} pictures" in e.words.value
        and e.state.value == f"exact at λ = 0.300, n = {core.n}"
    )
    e.box.value = 0.5
    assert e.slider.value == 0.5 and "recorded" in e.words.value
    for b, lam in zip(e.buttons, (0.0, 0.4, 1.0)):
        b.click()
        assert e.slider.value == lam
    e.close()


def test_newest_wins(core, monkeypatch):
    e = PathExplorer(core, rest=0.01)
    e.show()
    settle(e)
    go, began, real = threading.Event(), threading.Event(), core.exact
    monkeypatch.setattr(core, "exact", lambda lam: (began.set(), go.wait(30), real(lam))[2])
    e.slider.value = 0.2
    first = e.timer
    assert began.wait(30)
    e.slider.value = 0.8
    go.set()
    first.join()
    settle(e)
    assert "0.800" in e.words.value and "0.800" in e.state.value
    e.close()


def test_an_error_is_shown_in_the_status_line(core, monkeypatch):
    e = PathExplorer(core, rest=0.01)
    e.show()
    settle(e)
    monkeypatch.setattr(
        core, "exact", lambda lam: (_ for _ in ()).throw(RuntimeError("out of <memory>"))
    )
    e.slider.value = 0.7
    settle(e)
    assert e.state.value == "<b>error:</b> RuntimeError: out of &lt;memory&gt;"
    e.close()


def test_another_defence(core):
    e = PathExplorer(core, rest=0.01)
    e.show()
    settle(e)
    e.pick.value = "SAM"
    settle(e)
    assert "<b>SAM, λ" in e.words.value and core.name == "SAM"
    e.close()


def test_two_hundred_drags_leave_nothing(core):
    e = PathExplorer(core, rest=0.5)
    e.show()
    settle(e)
    from ipywidgets import Widget

    every = (
        getattr(Widget, "_instances", None)
        or __import__("ipywidgets.widgets.widget", fromlist=["_instances"])._instances
    )
    n, threads = len(every), threading.active_count()
    for i in range(200):
        e.slider.value = (i % 199) / 199
    assert len(every) == n and threading.active_count() <= threads + 200
    settle(e)
    for t in threading.enumerate():
        if isinstance(t, threading.Timer):
            t.join(30)  # called off; on a busy machine the last ones take a while to end
    assert threading.active_count() <= threads + 1
    e.close()
    gc.collect()
    assert len(every) <= n - 10
    with pytest.raises(ValueError, match="was closed"):
        e.show()
    assert e._repr_mimebundle_() == {"text/plain": "PathExplorer (closed)"}


def test_closing_frees_models_and_pictures(pico):
    e = PathExplorer(make(pico), rest=0.01)
    e.show()
    settle(e)
    e.slider.value = 0.3
    settle(e)
    left = [weakref.ref(x) for x in (e.core, e.core.path, e.core.path.visual, e.core.x)]
    e.close()
    gc.collect()
    assert [r() for r in left] == [None] * 4


def test_a_known_place_is_exact_at_once(core, monkeypatch):
    e = PathExplorer(core, rest=0.01)
    e.show()
    settle(e)
    e.slider.value = 0.3
    settle(e)
    e.slider.value = 0.6
    settle(e)
    monkeypatch.setattr(PathCore, "_features", lambda *_: pytest.fail("evaluated again"))
    e.slider.value = 0.3
    assert e.state.value == f"exact at λ = 0.300, n = {core.n}" and "exact on" in e.words.value
    e.close()


def test_it_rests_a_sixth_of_a_second_before_it_evaluates(core, monkeypatch):
    "The clock is ours: what would go off after the rest is kept, and only the last one is let go."

    class Kept(threading.Timer):
        def start(self):
            set_up.append(self)

        def join(self):
            self.finished.is_set() or self.function(*self.args)

    e, set_up, seen = PathExplorer(core), [], []
    e.show()
    settle(e)
    monkeypatch.setattr(X.threading, "Timer", Kept)
    real = core.exact
    monkeypatch.setattr(core, "exact", lambda lam: (seen.append(lam), real(lam))[1])
    for i in range(20):
        e.slider.value = 0.5 + i / 100
    assert seen == [] and len(set_up) == 20 and {t.interval for t in set_up} == {e.rest} == {0.15}
    assert all(t.finished.is_set() for t in set_up[:-1]), (
        "a new drag calls the last one's evaluation off"
    )
    settle(e)
    assert seen == [pytest.approx(0.69)] and "0.690" in e.state.value, (
        "twenty drags, one evaluation"
    )
    e.close()


def test_picture_stands_in_where_widgets_do_not_run(core, monkeypatch):
    e = PathExplorer(core)
    bundle = e._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/png"} and e.view is None, "no kernel here"
    e.close()


@pytest.mark.parametrize("names", [("LFPM",), tuple(f"m{i}" for i in range(10))])
def test_one_and_ten_methods(pico, names):
    e = PathExplorer(make(pico, names, n=8))
    fig = X.figure(e.core)
    assert (
        len(fig.data) == 3 * len(names) + 2 + 5 and fig.layout.meta["moving"] == 3 * len(names) + 2
    )
    shapes = [(t.line.dash, t.marker.symbol) for t in fig.data if t.name in names]
    assert len(set(shapes)) >= min(len(names), 8), (
        "dash and marker tell eight methods apart: colour is not the only code"
    )
    assert len(
        {(*x, t.line.color) for x, t in zip(shapes, (t for t in fig.data if t.name in names))}
    ) == len(names)
    assert len(e.static()) > 5000
    e.close()


def test_saved_page(core, tmp_path):
    e = PathExplorer(core)
    small, whole = (
        e.save_html(tmp_path / "small.html", cdn=True),
        e.save_html(tmp_path / "whole.html"),
    )
    text = small.read_text(encoding="utf-8")
    data = json.loads(re.search(r"const D=(\{.*?\}), fig=", text)[1].replace("<\\/", "</"))
    assert (
        [x["lam"] for x in data["looks"]] == pytest.approx(np.linspace(0, 1, 11))
        and len(data["pngs"]) == 12
        and data["CA"][0] == 70
    )
    assert (
        "cdn.plot.ly" in text
        and small.stat().st_size < 400_000
        and 'src="https' not in whole.read_text(encoding="utf-8")
    )
    with pytest.raises(OSError):
        e.save_html(tmp_path / "small.html" / "x.html")
    e.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A folder as `lfpm run main` leaves it, of a very small run, and the stages behind it."
    from dataclasses import asdict
    from lfpm_nb.core import Stages, versions, write_json
    from lfpm_nb.experiment import Lab
    from lfpm_nb.settings import MainParams
    from lfpm_nb.runs import finish

    root = tmp_path_factory.mktemp("finished")
    P = MainParams(
        tasks=["letters", "signs"],
        defences=["fine-tuning"],
        clean_defences=[],
        n_train=96,
        n_test=40,
        n_target=60,
        epochs=1,
        trigger_steps=2,
        shadow_n=96,
        held=32,
        prompt_steps=1,
        semantic=[1.0],
        anti_epochs=1,
        lam_n=5,
        path_n=30,
    )
    lab = Lab(P, Stages(root / "cache"))
    for kind in (False, True):
        lab.measured("TA" if kind else "TA (clean)", lab.merged("TA", kind)[0])
    lab.defend_and_measure("TA", "fine-tuning", lab.merged("TA")[0], True)
    out = root / "main" / "tiny-s0-00000000"
    out.mkdir(parents=True)
    lab.frame().to_parquet(out / "metrics.parquet")
    write_json(out / "params.json", dict(params=asdict(P), versions=versions()))
    finish(
        out, preset="tiny", config="00000000", seed=0, started="2026-01-01 10:00:00", seconds=1.0
    )
    return out


def test_readouts_equal_the_runs_rows_to_the_last_digit(finished, monkeypatch):
    """A run of this machine, opened again.

    At 0, 0.5 and 1 what the slider says, a fresh measurement of the mixed model, and
    metrics.parquet are one number."""
    monkeypatch.setenv("LFPM_CACHE", str(finished.parent.parent / "cache"))
    e, rows = (
        PathExplorer(open_run(finished, n=16), rest=0.01),
        pd.read_parquet(finished / "metrics.parquet"),
    )
    e.show()
    settle(e)
    for lam in (0.0, 0.5, 1.0):
        e.slider.value = lam
        at = (
            rows[(rows.kind == "path") & (rows.task == "average") & (rows.lam == lam)]
            .set_index("metric")
            .value
        )
        assert e.core.row(lam, 30) == {k: at[k] for k in KEEP}
        assert (
            f"λ = {lam:.3f}</b> · recorded: CA {at['CA']:.1f} %, ASR(T) {at['ASR_T']:.1f} %, "
            f"ASR(N) {at['ASR_N']:.1f} %" in e.words.value
        )
        settle(e)
    e.close()


def test_runs_that_cannot_be_opened(finished, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run in"):
        open_run(tmp_path)
    monkeypatch.setenv("LFPM_CACHE", str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="Run it again with the same settings"):
        open_run(finished)
    import shutil

    shutil.copytree(finished, tmp_path / "other")
    card = json.loads((finished / "params.json").read_text(encoding="utf-8"))
    (tmp_path / "other" / "params.json").write_text(
        json.dumps(card | dict(params=dict(merged="a.safetensors"))), encoding="utf-8"
    )
    with pytest.raises(ValueError, match="run of another notebook"):
        open_run(tmp_path / "other")


def test_the_command_opens_a_run_and_two_files(finished, monkeypatch, tmp_path, lfpm):
    from lfpm_nb.core import save_state

    monkeypatch.setenv("LFPM_CACHE", str(finished.parent.parent / "cache"))
    assert lfpm("explore", "--run", str(finished), "--html", str(tmp_path / "run.html"), "--cdn")[
        0
    ] == 0 and "fine-tuning" in (tmp_path / "run.html").read_text(encoding="utf-8")
    assert (
        "no finished run"
        in lfpm("explore", "--run", str(tmp_path), "--html", str(tmp_path / "x.html"))[2]
    )
    save_state(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    code, _, err = lfpm(
        "explore",
        "--models",
        str(tmp_path / "a.safetensors"),
        str(tmp_path / "a.safetensors"),
        "--html",
        str(tmp_path / "x.html"),
    )
    assert code == 2 and err.startswith("lfpm: ") and not (tmp_path / "x.html").exists()
    page = json.loads(
        page_of("open_run('somewhere')", "Run x", tmp_path).read_text(encoding="utf-8")
    )
    assert "PathExplorer(open_run('somewhere'))" in page["cells"][1]["source"]


def test_between_any_two_models_of_the_lab(finished, monkeypatch):
    from lfpm_nb.core import Stages
    from lfpm_nb.experiment import Lab
    from lfpm_nb.settings import MainParams

    params = json.loads((finished / "params.json").read_text(encoding="utf-8"))["params"]
    lab = Lab(MainParams(**params), Stages(finished.parent.parent / "cache"))
    a, b = lab.contributor("signs"), lab.merged("TA")[0]
    core = between(lab, a, b, "merged", n=12, points=3, images=20)
    assert (
        core.chosen == {}
        and list(core.grids["merged"].lam) == [0, 0.5, 1]
        and all(torch.equal(v, b[k]) for k, v in core.path.at(1.0).state_dict().items())
    )
    e = PathExplorer(core, rest=0.01)
    e.show()
    settle(e)
    assert [x.description for x in e.buttons] == ["0: start", "1: end"] and len(e.static()) > 5000
    assert "the rule" not in e.save_html(finished / "x.html", cdn=True).read_text(encoding="utf-8")
    e.close()


def test_readouts_repeat_the_recorded_rows():
    """The shipped recording, on whatever processor this is.

    Sums round differently from one to the next, so a few pictures at the border of two classes
    may change sides (0.1 points of 1,050 are one); a run of this machine repeats to the last
    digit (above)."""
    rec = Recorded(proj_path("data", "recorded", "lab"))
    core = PathCore.of(rec, ["LFPM"], n=16)
    for lam in (0.0, 0.5, 1.0):
        row, v = core.row(lam, rec.P.path_n), core.move(lam)["values"]["LFPM"]
        assert v["on"] and all(abs(row[k] - v[k]) < 0.35 for k in KEEP), {
            k: (row[k], v[k]) for k in KEEP
        }


def test_voila_template_asks_nobody_outside(tmp_path):
    env = voila_template(tmp_path)
    page = (tmp_path / "voila" / "templates" / "lfpm" / "index.html.j2").read_text(encoding="utf-8")
    assert (
        "https://cdn" not in page
        and "notebook_css" in page
        and str(tmp_path) in env["JUPYTER_PATH"]
    )


@pytest.mark.slow
def test_device_path_on_a_random_vit_b32():
    """The same code on CLIP's real shapes.

    Images and both models on one device, weights mixed in place."""
    import open_clip
    from lfpm_nb.clip import Clip

    pico = new_pico()
    model = open_clip.create_model("ViT-B-32", pretrained=None).eval().requires_grad_(False)
    clip = Clip(model, pico.tokenizer, pico.card)
    state = clip.state()
    end = {k: v + 0.01 * v.std() if v.is_floating_point() else v for k, v in state.items()}
    task = small_task("signs")
    task = type(task)(
        task.name,
        task.classes,
        task.templates,
        task.train_x[:2],
        task.train_y[:2],
        torch.nn.functional.interpolate(task.test_x[:12].float(), size=224).to(torch.uint8),
        task.test_y[:12],
    )
    W = torch.randn(len(task.classes), 512)
    suite = Suite([task], {"signs": W}, {"signs": Goal(3, Trigger(torch.rand(3, 22, 22), None))})
    core = PathCore(
        clip, state, {"LFPM": end}, suite, recorded_rows(["LFPM"]), {"LFPM": 0.4}, {}, n=4
    )
    where = {v.data_ptr() for v in core.path.out.values()}
    core.exact(0.25)
    core.exact(0.75)
    assert {v.data_ptr() for v in core.path.out.values()} == where and core.x.device == next(
        core.path.visual.parameters()
    ).device


# --- merge, CTL and subspace --------------------------------------------------------------------


@pytest.fixture(scope="module")
def rec():
    return Recorded(proj_path("data", "recorded", "lab"), tiny=True)


@pytest.fixture(scope="module")
def cores(rec, pico):
    return dict(
        merge=MergeCore(rec, n=12, coarse=12),
        ctl=CTLCore(
            pico, near(pico, 1), near(pico, 2), small_task("signs").test_x[:8], points=3, rule=0.4
        ),
        subspace=SubspaceCore(rec, n=24),
    )


def test_a_learned_subspace_does_not_depend_on_the_precision(rec, in_both):
    "Its U is trained on features: rounding would be enlarged, and the figures have a decimal."
    rounded, full = in_both(lambda: SubspaceCore(rec, n=24, ranks=(1, 8)).lines)
    assert rounded == full


@pytest.fixture(params=["merge", "ctl", "subspace"])
def other(request, cores):
    "Each further explorer with two places of its main slider, both off the grid."
    core = cores[request.param]
    e, at = {
        "merge": (MergeExplorer, (0.45, 0.85)),
        "ctl": (CTLExplorer, (0.3, 0.7)),
        "subspace": (SubspaceExplorer, (6, 24)),
    }[request.param]
    e = e(core, rest=0.02)
    for k in set(core.cache) - set(getattr(core, "ranks", ())):
        del core.cache[k]
    assert e.show() is e.show()
    settle(e)
    e.main, e.box1 = (e.sliders[0], e.boxes[0]) if request.param == "merge" else (e.slider, e.box)
    yield e, at
    if e.core is not None:
        e.close()


def test_every_slider_guesses_then_knows(other):
    e, (a, b) = other
    e.main.value = a
    assert e.state.value.startswith("interpolated") and e.box1.value == a
    settle(e)
    assert e.state.value.startswith("exact") and f"n = {e.core.n}" in e.state.value
    e.box1.value = b
    assert e.main.value == b
    settle(e)
    for button in e.buttons:
        button.click()
    assert e.main.value == e.main.max, "the last button goes to the end"
    settle(e)
    assert e.state.value.startswith("exact")


def test_every_slider_shows_the_newest_and_caches(other, monkeypatch):
    e, (a, b) = other
    go, began, real, seen = threading.Event(), threading.Event(), e.core.exact, []
    monkeypatch.setattr(
        e.core,
        "exact",
        lambda *given: (seen.append(given[0]), began.set(), go.wait(30), real(*given))[3],
    )
    e.main.value = a
    first = e.timer
    assert began.wait(30)
    e.main.value = b
    go.set()
    first.join()
    settle(e)
    last, n = e.state.value, len(e.core.cache)
    assert len(seen) == 2 and last.startswith("exact")
    real(seen[-1])
    assert len(e.core.cache) == n, "known already"


def test_every_slider_says_what_went_wrong(other, monkeypatch):
    e, (a, b) = other
    monkeypatch.setattr(
        e.core, "exact", lambda *_: (_ for _ in ()).throw(RuntimeError("out of <memory>"))
    )
    e.main.value = a
    settle(e)
    assert e.state.value == "<b>error:</b> RuntimeError: out of &lt;memory&gt;"
    e.close()
    with pytest.raises(ValueError, match="was closed"):
        e.show()


@pytest.mark.parametrize("name", ["merge", "ctl", "subspace"])
def test_closing_lets_every_core_go(cores, name):
    core = copy.copy(cores[name])
    core.cache, left = dict(core.cache), weakref.ref(core)
    e = dict(merge=MergeExplorer, ctl=CTLExplorer, subspace=SubspaceExplorer)[name](core, rest=0.01)
    e.show()
    settle(e)
    del core
    e.close()
    gc.collect()
    assert left() is None


def test_merge_core_adds_up_single_effects(cores, rec):
    core = cores["merge"]
    scale, k = rec.P.scale, len(core.names)
    at, alone = core.profiles(True)["at"], core.profiles(True)["alone"]
    assert (
        core.move([0.0] + [scale] * (k - 1))
        == alone[core.names[0]][at.index(0.0)]
        == core.exact([0.0] + [scale] * (k - 1))
    )
    assert core.move([scale] * k) == core.exact([scale] * k)
    assert all(0 <= v <= 100 for v in core.move([1.0] * k).values())


def test_further_bad_inputs(pico, rec, cores):
    x = small_task("signs").test_x[:4]
    with pytest.raises(ValueError, match="grid of 1 λ; expected at least 2"):
        CTLCore(pico, near(pico, 1), near(pico, 2), x, points=1)
    with pytest.raises(ValueError, match="expected 1 to"):
        CTLCore(pico, near(pico, 1), near(pico, 2), x[:0])
    with pytest.raises(ValueError, match="differ in"):
        CTLCore(pico, near(pico, 1), {"x": torch.zeros(2)}, x)
    with pytest.raises(ValueError, match="grid of 1 ranks"):
        SubspaceCore(rec, ranks=(4,))
    for make_one in (MergeCore, SubspaceCore):
        with pytest.raises(ValueError, match="expected 1 to 4096"):
            make_one(rec, n=10**6)
    with pytest.raises(ValueError, match="2 coefficients for 6 contributors"):
        cores["merge"].mix([0.3, 0.3], True)
