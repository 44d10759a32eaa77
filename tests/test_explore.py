"""The path explorer's core and widget: what moves, what is exact, what is refused, and that nothing is left behind."""
import gc
import json
import re
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import near, new_pico, small_task
from lfpm_nb import explore as X
from lfpm_nb.attack import Trigger
from lfpm_nb.core import proj_path
from lfpm_nb.explore import KEEP, PathCore, PathExplorer, grid_of, read_grid, voila_template
from lfpm_nb.measure import Goal, Suite
from lfpm_nb.recorded import Recorded


def recorded_rows(names, n=5):
    return pd.DataFrame([dict(kind="path", task="average", method=m, metric=k, lam=l, value=v) for m in names
                         for k, a, b in (("CA", 70, 50), ("ASR_T", 90, 0), ("ASR_N", 40, 10)) for l, v in zip(np.linspace(0, 1, n), np.linspace(a, b, n))])


def make(clip, names=("LFPM", "SAM"), n=24, **more):
    goal = Goal(3, Trigger(torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(1)), None))
    suite = Suite.of(clip, [small_task("signs"), small_task("land")], {"signs": goal})
    given = dict(start=near(clip, 1), ends={m: near(clip, 2 + i, .05) for i, m in enumerate(names)}, suite=suite, rows=recorded_rows(names),
                 chosen=dict.fromkeys(names, .4), flat={"TA (clean), same trigger": 0.2}, n=n)
    return PathCore(clip, **(given | more))


@pytest.fixture
def core(pico): return make(pico)


def test_between_is_linear_and_knows_its_points(core):
    g = core.grids["LFPM"]
    assert read_grid(g, .5) == dict(CA=60., ASR_T=45., ASR_N=25., on=True) and not read_grid(g, .6)["on"] and read_grid(g, .6)["CA"] == pytest.approx(58)


def test_both_ends_are_the_models_bit_for_bit(core):
    for lam, state in ((0., core.start), (1., core.ends["LFPM"])):
        assert all(torch.equal(v, state[k]) for k, v in core.path.at(lam).state_dict().items())


def test_exact_is_the_mixed_model_and_is_cached(core, pico):
    from lfpm_nb.clip import features, logits
    from lfpm_nb.path import lerp
    look = core.exact(.3)
    h = features(pico, pico.with_state(lerp(core.start, core.ends["LFPM"], .3)), core.x)
    assert torch.equal(look["pred"], logits(h, core.W).argmax(1).cpu()) and look["xy"].shape == (2 * core.n, 2)
    assert (core.y != core.target).all() and look["ASR_T"] == pytest.approx(100 * (look["pred"][core.n:] == core.target).float().mean().item())
    assert core.exact(.3) is look and core.move(.3)["look"] is look and core.move(.31)["look"] is not look


def test_the_map_does_not_turn_while_walking(core):
    axes = core.axes.clone()
    for lam in (.1, .9): core.exact(lam)
    assert torch.equal(axes, core.axes)
    core.select("SAM")
    assert not torch.equal(axes, core.axes) and core.cache == {}


def test_an_interruption_in_the_middle_leaves_a_right_model(core, monkeypatch):
    want = core.exact(.6)["pred"]
    core.cache.clear()
    real = X.Path.at
    def broken(self, lam):
        real(self, lam)
        raise KeyboardInterrupt
    monkeypatch.setattr(X.Path, "at", broken)
    with pytest.raises(KeyboardInterrupt): core.exact(.6)
    assert core.cache == {}, "nothing half-done is kept"
    monkeypatch.undo()
    assert torch.equal(core.exact(.6)["pred"], want) and not core.lock.locked()


@pytest.mark.parametrize("change, why", [
    (dict(ends={}), "at least one end"), (dict(rows=recorded_rows(["LFPM", "SAM"], 1)), "at least 2"), (dict(n=0), "expected 1 to"), (dict(n=10 ** 6), "stays in memory"),
])
def test_bad_input(pico, change, why):
    with pytest.raises(ValueError, match=why): make(pico, **change)


def test_other_shapes_no_trigger_and_lambda_outside(pico, lab, core):
    with pytest.raises(ValueError, match="the end called LFPM"): make(pico, ends={"LFPM": lab.state()})
    with pytest.raises(ValueError, match="no triggered images"): make(pico, suite=Suite.of(pico, [small_task("land")], {}))
    with pytest.raises(ValueError, match="expected a number in"): core.move(1.2)
    with pytest.raises(ValueError, match="SAM"): core.select("SAN")


def settle(e):
    if e.timer: e.timer.join()


def test_widget_drag_then_rest(core):
    e = PathExplorer(core, rest=.02)
    view = e.show()
    assert e.show() is view, "opened twice: the same widget"
    settle(e)
    k = e.fig.layout.meta["moving"]
    e.slider.value = .3
    assert "interpolated" in e.words.value and "exact" not in e.words.value and e.box.value == .3 and e.fig.data[k + 1].x == (.3,)
    settle(e)
    assert f"exact on {core.n} pictures" in e.words.value and e.state.value == f"exact at λ = 0.300, n = {core.n}"
    e.box.value = .5
    assert e.slider.value == .5 and "recorded" in e.words.value
    for b, lam in zip(e.buttons, (0., .4, 1.)):
        b.click()
        assert e.slider.value == lam
    e.close()


def test_newest_wins(core, monkeypatch):
    e = PathExplorer(core, rest=.01)
    e.show(); settle(e)
    go, real = threading.Event(), core.exact
    monkeypatch.setattr(core, "exact", lambda lam: (go.wait(5), real(lam))[1])
    e.slider.value = .2
    first = e.timer
    time.sleep(.1)
    e.slider.value = .8
    go.set(); first.join(); settle(e)
    assert "0.800" in e.words.value and "0.800" in e.state.value
    e.close()


def test_an_error_is_shown_in_the_status_line(core, monkeypatch):
    e = PathExplorer(core, rest=.01)
    e.show(); settle(e)
    monkeypatch.setattr(core, "exact", lambda lam: (_ for _ in ()).throw(RuntimeError("out of <memory>")))
    e.slider.value = .7
    settle(e)
    assert e.state.value == "<b>error:</b> RuntimeError: out of &lt;memory&gt;"
    e.close()


def test_another_defence(core):
    e = PathExplorer(core, rest=.01)
    e.show(); settle(e)
    e.pick.value = "SAM"
    settle(e)
    assert "<b>SAM, λ" in e.words.value and core.name == "SAM"
    e.close()


def test_two_hundred_drags_leave_nothing(core):
    e = PathExplorer(core, rest=.5)
    e.show(); settle(e)
    from ipywidgets import Widget
    every = getattr(Widget, "_instances", None) or __import__("ipywidgets.widgets.widget", fromlist=["_instances"])._instances
    n, threads = len(every), threading.active_count()
    for i in range(200): e.slider.value = (i % 199) / 199
    assert len(every) == n and threading.active_count() <= threads + 200
    settle(e)
    time.sleep(.05)
    assert threading.active_count() <= threads + 1
    e.close()
    gc.collect()
    assert len(every) <= n - 10 and core.path is None
    with pytest.raises(ValueError, match="was closed"): e.show()


def test_picture_stands_in_where_widgets_do_not_run(core, monkeypatch):
    e = PathExplorer(core)
    bundle = e._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/png"} and e.view is None, "no kernel here"
    e.close()


@pytest.mark.parametrize("names", [("LFPM",), tuple(f"m{i}" for i in range(10))])
def test_one_and_ten_methods(pico, names):
    e = PathExplorer(make(pico, names, n=8))
    fig = X.figure(e.core)
    assert len(fig.data) == 3 * len(names) + 1 + 5 and fig.layout.meta["moving"] == 3 * len(names) + 1
    assert len(e.static()) > 5000
    e.close()


def test_saved_page(core, tmp_path):
    e = PathExplorer(core)
    small, whole = e.save_html(tmp_path / "small.html", cdn=True), e.save_html(tmp_path / "whole.html")
    text = small.read_text(encoding="utf-8")
    data = json.loads(re.search(r"const D=(\{.*?\}), fig=", text)[1].replace("<\\/", "</"))
    assert [x["lam"] for x in data["looks"]] == pytest.approx(np.linspace(0, 1, 11)) and len(data["pngs"]) == 12 and data["CA"][0] == 70
    assert "cdn.plot.ly" in text and small.stat().st_size < 400_000 and 'src="https' not in whole.read_text(encoding="utf-8")
    with pytest.raises(OSError): e.save_html(tmp_path / "small.html" / "x.html")
    e.close()


def test_readouts_repeat_the_recorded_rows():
    """At 0, 0.5 and 1 a measurement of all tasks gives what the shipped table says: to the printed digit on the processor that recorded it (an EPYC), on
    another, whose sums round differently, up to a few pictures at the border of two classes (0.1 points of 1,050 are one)."""
    rec = Recorded(proj_path("data", "recorded", "lab"))
    core = PathCore.of(rec, ["LFPM"], n=16)
    for lam in (0., .5, 1.):
        row, v = core.row(lam, rec.P.path_n), core.move(lam)["values"]["LFPM"]
        assert v["on"] and all(abs(row[k] - v[k]) < 0.35 for k in KEEP), {k: (row[k], v[k]) for k in KEEP}


def test_voila_template_asks_nobody_outside(tmp_path):
    env = voila_template(tmp_path)
    page = (tmp_path / "voila" / "templates" / "lfpm" / "index.html.j2").read_text()
    assert "https://cdn" not in page and "notebook_css" in page and str(tmp_path) in env["JUPYTER_PATH"]


@pytest.mark.slow
def test_device_path_on_a_random_vit_b32():
    "The same code on CLIP's real shapes: images and both models on one device, weights mixed in place."
    import open_clip
    from lfpm_nb.clip import Clip, new_card
    pico = new_pico()
    model = open_clip.create_model("ViT-B-32", pretrained=None).eval().requires_grad_(False)
    clip = Clip(model, pico.tokenizer, pico.card)
    state = clip.state()
    end = {k: v + .01 * v.std() if v.is_floating_point() else v for k, v in state.items()}
    task = small_task("signs")
    task = type(task)(task.name, task.classes, task.templates, task.train_x[:2], task.train_y[:2],
                      torch.nn.functional.interpolate(task.test_x[:12].float(), size=224).to(torch.uint8), task.test_y[:12])
    W = torch.randn(len(task.classes), 512)
    suite = Suite([task], {"signs": W}, {"signs": Goal(3, Trigger(torch.rand(3, 22, 22), None))})
    core = PathCore(clip, state, {"LFPM": end}, suite, recorded_rows(["LFPM"]), {"LFPM": .4}, {}, n=4)
    where = {v.data_ptr() for v in core.path.out.values()}
    core.exact(.25); core.exact(.75)
    assert {v.data_ptr() for v in core.path.out.values()} == where and core.x.device == next(core.path.visual.parameters()).device
