"""Parameters, presets, cached parts of the main run, run folders and the table over seeds."""
import json
import os
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
import torch

from conftest import new_pico
from lfpm_nb import clip as C
from lfpm_nb import experiment as E
from lfpm_nb.clip import ship_clip
from lfpm_nb.core import Stages
from lfpm_nb.experiment import (COLUMNS, PRESETS, Lab, MainParams, config_hash, load_runs, notebooks, parameters, parse, path_lines, run_notebook,
                                settings_of, status, table, to_markdown, versus)

# --- parameters --------------------------------------------------------------------------------------------------------

def test_main_params_are_the_notebooks_parameters():
    own = {f.name: getattr(MainParams(), f.name) for f in fields(MainParams)}
    cell = {k: v for k, (v, _) in parameters("main").items() if k != "out_dir"}
    assert list(own) == list(cell), "names and order"
    assert own == cell and {k: type(v) for k, v in own.items()} == {k: type(v) for k, v in cell.items()}, "checking leaves the defaults as they are"
    one, two = MainParams(), MainParams()
    one.tasks.append("digits"); one.options["TA"] = {}
    assert two.tasks == MainParams().tasks and two.options == {}, "no two share a list"


def test_all_names_every_method():
    P = MainParams(merges=["all"], defences=["all"], clean_defences=[])
    assert P.merges == list(E.merges) and P.defences == list(E.defences) and P.clean_defences == []


def test_several_attackers():
    P = MainParams(adversary="letters, land", target="signs,flags", target_class="yield,Japan")
    assert [(a.adversary, a.target, a.target_class) for a in P.attackers] == [("letters", "signs", "yield"), ("land", "flags", "Japan")]


def test_stage_one_reads_no_other_strength_than_its_key_holds(pico):
    "A setting that Stage I reads but its cache key lacks would give stale prompts."
    from lfpm_nb.antibackdoor import Strengths, stage_one
    from lfpm_nb.subspace import Shadow
    read = set()
    class Seen(Strengths):
        def __getattribute__(self, k):
            if k in type(self).__dataclass_fields__: read.add(k)
            return super().__getattribute__(k)
    for A in (True, False):
        s = Seen(rank="rule", rho="rule", prompt_steps=1, semantic=(1.,), A=A)
        read.clear()
        stage_one(pico, pico.state(), Shadow.of(pico, 64, 32, 0), s, 0)
        assert read <= set(E.STAGE_ONE) and {"rho", "semantic", "A"} <= read


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_sets_of_known_parameters(name):
    known = parameters(name)
    assert set(PRESETS[name]) >= {"tiny", "lab"} and PRESETS[name]["lab"] == {}
    for preset, values in PRESETS[name].items():
        assert set(values) <= set(known) and all(type(v) is type(known[k][0]) for k, v in values.items()), preset
        got = settings_of(name, preset)
        assert list(got) == list(known) and all(got[k] == values.get(k, known[k][0]) for k in known)
    assert all(text for _, text in known.values()), "every parameter is explained"


def test_settings_are_defaults_then_preset_then_given_then_seed():
    s = settings_of("MAIN", "tiny", {"n_train": "77", "defences": "lfpm", "A": "false", "gamma": 0.5}, seed=4)
    assert (s["n_train"], s["A"], s["gamma"], s["seed"], s["n_test"]) == (77, False, 0.5, 4, PRESETS["main"]["tiny"]["n_test"])
    assert s["scale"] == parameters("main")["scale"][0]


def test_spellings_of_the_same_settings_are_the_same():
    one, two = (settings_of("main", "tiny", dict(attack=a, defences=d, lam=l, semantic=c)) for a, d, l, c in (
        ("badmerging", "LFPM", "0.5", "1,2"), ("BadMerging (off-task)", "lfpm", "0.50", "1.0,2.0")))
    assert config_hash("main", one) == config_hash("main", two)


@pytest.mark.parametrize("text, default, want", [
    ("3", 1, 3), ("-3", 1, -3), ("1e-3", .1, 1e-3), ("2", .5, 2.), ("true", False, True), ("False", True, False), ("0", True, False), ("rule", "x", "rule"),
    ("a,b", ["x"], ["a", "b"]), ("a", [], ["a"]), ('["a b", "c"]', [], ["a b", "c"]), ("", [], []), ("a=b", "x", "a=b")])
def test_parse(text, default, want): assert parse("p", text, default) == want and type(parse("p", text, default)) is type(want)


@pytest.mark.parametrize("text, default, kind", [("one", 1, "int"), ("1.5", 1, "int"), ("x", .5, "float"), ("yes!", True, "bool"), ("[a", [], "list")])
def test_parse_says_what_was_expected(text, default, kind):
    with pytest.raises(ValueError, match=f"p='.*' is not a {kind}; the default is") as e: parse("p", text, default)
    assert repr(text) in str(e.value)


@pytest.mark.parametrize("name, preset, given, message", [
    ("mian", "tiny", {}, "unknown run 'mian'; did you mean 'main'"), ("main", "tinny", {}, "unknown preset of main 'tinny'; did you mean 'tiny'"),
    ("main", "tiny", {"lamda": "1"}, "unknown parameter of main 'lamda'; did you mean 'lam'"),
    ("main", "tiny", {"seed": "one"}, "seed='one' is not a int"), ("main", "tiny", {"attack": "badmergin"}, "did you mean 'badmerging'"),
    ("main", "tiny", {"merges": "TIS"}, "unknown merge 'TIS'"), ("main", "tiny", {"defences": "LFMP"}, "did you mean 'LFPM'"),
    ("main", "tiny", {"clean_defences": "LFMP"}, "did you mean 'LFPM'"), ("main", "tiny", {"adversary": "signs"}, "two different tasks"),
    ("main", "tiny", {"target": "sign"}, "did you mean 'signs'"), ("main", "tiny", {"adversary": "shapes"}, "must be one of tasks"),
    ("main", "tiny", {"target_class": "yeld"}, "did you mean 'yield'"), ("main", "tiny", {"tasks": "letters,signs,letters"}, "lists a task twice"),
    ("main", "tiny", {"lam": "1.2"}, r"expected 'rule' or a number in \[0, 1\]"), ("main", "tiny", {"lam": "-1"}, r"\[0, 1\]"), ("main", "tiny", {"lam": "nan"}, r"\[0, 1\]"),
    ("main", "tiny", {"lam": "often"}, r"expected 'rule' or a number in \[0, 1\]"), ("main", "tiny", {"path_from": "0.9", "path_to": "0.2"}, "0 <= a <= b <= 1"),
    ("main", "tiny", {"start": "here"}, "expected 'merged' or 'pretrained'"), ("main", "tiny", {"strength": "much"}, "strength is 'much'"), ("main", "tiny", {"strength": "-1"}, "learning-rate factor"),
    ("main", "tiny", {"options": '{"TIES": {"densty": 0.1}}'}, "unknown option of TIES 'densty'; did you mean 'density'"),
    ("main", "tiny", {"options": '{"TEIS": {}}'}, "did you mean 'TIES'"), ("main", "tiny", {"options": "[1]"}, "is not a dict"),
    ("main", "tiny", {"adversary": "letters,land"}, "as many of each"),
    ("main", "tiny", {"adversary": "letters,letters", "target": "signs,flags", "target_class": "yield,Japan"}, "names 'letters' twice")])
def test_bad_settings_are_refused_with_a_hint(name, preset, given, message):
    with pytest.raises(ValueError, match=message): settings_of(name, preset, given)


# --- bad input through the command: one clear line, nothing started, nothing left behind -----------------------------------------

@pytest.fixture
def refused(lfpm, dirs, monkeypatch):
    "Run `lfpm run main --preset tiny …`; it must stop with one line before the notebook starts and leave no folder."
    def started(*a, **k): raise AssertionError("the notebook was started")
    monkeypatch.setattr(papermill, "execute_notebook", started)

    def call(*args, name="main", preset="tiny"):
        code, out, err = lfpm("run", name, "--preset", preset, *args)
        assert code == 2 and out == "", (code, out, err)
        assert err.startswith("lfpm: ") and err.count("\n") == 1 and "Traceback" not in err, err
        runs = Path(os.environ["LFPM_RUNS"])
        assert not (runs.exists() and any(runs.rglob("*"))) and not list(dirs.rglob("status.json")), "something was left behind"
        return err
    return call


@pytest.mark.parametrize("args, message", [
    (("-p", "tasks=letters,signs,nosuchtask"), "unknown task 'nosuchtask'"), (("-p", "tasks=letters,signs,texture"), "did you mean 'textures'"),
    (("-p", "attack=badmergin"), "did you mean 'badmerging'"), (("-p", "merges=TAA"), "did you mean 'TA'"), (("-p", "defences=LFMP"), "did you mean 'LFPM'"),
    (("-p", "lam=1.5"), "[0, 1]"), (("-p", "lam=often"), "expected 'rule' or a number in [0, 1]"), (("-p", "adversary=signs"), "two different tasks"),
    (("-p", "target_class=yeld"), "did you mean 'yield'"), (("-p", "target=handwritten", "-p", "target_class=eleventy"), "unknown class of handwritten 'eleventy'"),
    (("-p", "backbone=lfpm-lob"), "did you mean 'lfpm-lab'"), (("-p", "lamm=1"), "did you mean 'lam'"), (("-p", "lam"), "is not key=value"), (("-p", "seed=x"), "is not a int"),
    (("-p", "n_train=0"), "n_train"), (("-p", "side=33"), "side"), (("-p", "lam_n=1"), "lam_n"), (("-p", "held=0"), "held"),
    (("-p", "rank=many"), "rank"), (("-p", "semantic=much"), "semantic"), (("-p", "semantic="), "semantic"), (("-p", "rho=much"), "rho")])
def test_bad_parameters(refused, args, message): assert message in refused(*args)


def test_bad_names(refused):
    assert "did you mean 'main'" in refused(name="mian") and "did you mean 'tiny'" in refused(preset="tinny")


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    "A data folder with one backbone called pico, which the next test may spoil; returns its weights file."
    monkeypatch.setattr(C, "proj_path", lambda *parts: tmp_path.joinpath("checkout", *parts))
    return ship_clip(new_pico(), tmp_path / "checkout" / "data", steps=0)


def test_a_missing_checkpoint(refused, own_data):
    own_data.unlink()
    assert "no checkpoint at" in refused("-p", "backbone=pico")


def test_a_damaged_checkpoint(refused, own_data):
    own_data.write_bytes(own_data.read_bytes()[:1000])
    assert "is damaged" in refused("-p", "backbone=pico")


def test_a_checkpoint_of_another_architecture(refused, own_data):
    card = own_data.with_name("pico.card.json")
    c = json.loads(card.read_text()); c["config"]["vision_cfg"]["layers"] = 3
    card.write_text(json.dumps(c))
    assert "differ in" in refused("-p", "backbone=pico")


def test_nan_in_the_weights(refused, own_data):
    import hashlib
    from safetensors.torch import load_file, save_file
    state = load_file(own_data); state["visual.proj"][0, 0] = float("nan")
    save_file(state, own_data, {"quick_gelu": "False"})
    card = own_data.with_name("pico.card.json")
    card.write_text(json.dumps(json.loads(card.read_text()) | {"sha256": hashlib.sha256(own_data.read_bytes()).hexdigest()}))
    assert "NaN" in refused("-p", "backbone=pico")


def test_bad_image_folders(refused, tmp_path, monkeypatch):
    from PIL import Image
    monkeypatch.setenv("LFPM_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "mine" / "cat").mkdir(parents=True)
    assert "holds no images" in refused("-p", "tasks=letters,signs,mine")
    for c, n in (("cat", 1), ("dog", 3)):
        for i in range(n):
            (tmp_path / "data" / "mine" / c).mkdir(exist_ok=True)
            Image.new("L", (9 + i, 20), i).save(tmp_path / "data" / "mine" / c / f"{i}.png")
    assert "class 'cat' has 1 image" in refused("-p", "tasks=letters,signs,mine")


def test_a_folder_that_cannot_be_written(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("LFPM_RUNS", str(tmp_path / "file" / "runs"))
    assert "cannot write results to" in refused() and (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(refused, tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir(mode=0o500)
    monkeypatch.setenv("LFPM_RUNS", str(tmp_path / "shut" / "runs"))
    assert "cannot write results to" in refused()


def test_a_full_disk(refused, monkeypatch):
    def full(self, data): raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device" in refused()


# --- the lab: what is computed again, and what not -------------------------------------------------------------------------------

TINY = dict(tasks=["letters", "signs"], n_train=48, n_test=24, n_target=36, epochs=1, batch=32, trigger_steps=2, shadow_n=64, held=32, rank=4, rho=.1, prompt_steps=2, semantic=[1., 3.],
            anti_epochs=1, anti_batch=32, lam_n=3, path_n=8)


def everything(lab) -> list:
    "All of the main run for the first merge and LFPM."
    for poisoned in (True, False):
        lab.measured(f"individual{'' if poisoned else ' (clean)'}", lab.models(poisoned))
        lab.measured(f"TA{'' if poisoned else ' (clean)'}", lab.merged("TA", poisoned)[0])
    lab.defend_and_measure("TA", "LFPM", lab.merged("TA")[0], True)
    return lab.rows


@pytest.fixture(scope="module")
def tiny_lab(pico, tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        clip = replace(pico, card=pico.card | dict(sha256="0" * 64))
        m.setattr(E, "load_clip", lambda name: clip)
        lab = Lab(MainParams(**TINY), Stages(tmp_path_factory.mktemp("stages")))
        everything(lab)
        yield lab


def again(lab, **change) -> set:
    "Names of the stages computed anew when the settings change."
    other = Lab(MainParams(**{**TINY, **change}), Stages(lab.stages.root))
    everything(other)
    return {n for n, _, reused in other.stages.log if not reused}


def test_nothing_is_computed_twice(tiny_lab):
    rows = Lab(MainParams(**TINY), Stages(tiny_lab.stages.root))
    assert repr(everything(rows)) == repr(tiny_lab.rows) and all(reused for *_, reused in rows.stages.log)


TRAINED = {"tune-letters", "tune-signs", "attack-badmerging"}


@pytest.mark.parametrize("change, new", [
    (dict(lam_n=4), {"path"}), (dict(path_n=9), {"path"}), (dict(scale=.4), {"merge-TA", "measure", "stage1", "defend-LFPM", "path"}), (dict(gamma=.5), {"defend-LFPM", "measure", "path"}),
    (dict(options={"badmerging": {"alpha": 4.}}), {"attack-badmerging", "merge-TA", "measure", "stage1", "defend-LFPM", "path"}), (dict(options={"TA": {"scale": .45}}), {"merge-TA", "measure", "stage1", "defend-LFPM", "path"})])
def test_only_what_depends_on_a_setting_is_computed_again(tiny_lab, change, new):
    got = again(tiny_lab, **change)
    assert got <= new and (got & {"path", "defend-LFPM"}), got


def test_test_images_do_not_train(tiny_lab):
    assert not again(tiny_lab, n_test=23) & (TRAINED | {"stage1", "defend-LFPM"}), "contributors depend on their training images only"


def test_another_lam_does_not_train_again(tiny_lab):
    assert not again(tiny_lab, lam=0.25) & (TRAINED | {"stage1", "defend-LFPM"}), "theta_anti does not depend on lambda"


def test_a_seed_changes_data_training_trigger_and_shadow(tiny_lab):
    other = Lab(MainParams(**TINY, seed=1), Stages(tiny_lab.stages.root))
    assert all(not torch.equal(other.tasks[n].train_x, t.train_x) and not torch.equal(other.tasks[n].test_x, t.test_x) for n, t in tiny_lab.tasks.items())
    assert not torch.equal(other.shadow.x, tiny_lab.shadow.x) and not torch.equal(other.poisoned["letters"][1].patch, tiny_lab.poisoned["letters"][1].patch)
    assert other._pre == tiny_lab._pre, "only the backbone is fixed"


def test_models_hold_one_poisoned_contributor(tiny_lab):
    clean, bad = tiny_lab.models(False), tiny_lab.models(True)
    same = {n: all(torch.equal(clean[n][k], bad[n][k]) for k in clean[n]) for n in clean}
    assert same == {"letters": False, "signs": True} and list(bad) == ["letters", "signs"]


def test_rows_are_tidy(tiny_lab, tmp_path):
    df = tiny_lab.frame()
    assert set(df.kind) == {"model", "path", "summary", "seconds"} and (df.seed == 0).all() and df[df.metric != "ASR_Nc"].value.notna().all()
    rates = df[df.metric.isin(["CA", "ASR_T", "ASR_N", "floor_none", "floor_grey"])]            # (an untrained model may be right nowhere: no ASR_Nc)
    assert rates.value.between(0, 100).all() and (rates.n > 0).all()
    single = rates[(rates.task != "average")]
    assert (single.lo <= single.value + 1e-9).all() and (single.value <= single.hi + 1e-9).all(), "each rate has its interval"
    assert not df[df.kind == "model"].duplicated(["method", "task", "metric"]).any() and not df[df.kind == "path"].duplicated(["method", "task", "metric", "lam"]).any()
    t = table(df).set_index("method")
    assert list(t.index) == ["individual", "TA", "individual (clean)", "TA (clean)", "LFPM"]
    line = df[(df.kind == "path") & (df.method == "LFPM") & (df.task == "average") & (df.metric == "ASR_T")].sort_values("lam").value.tolist()
    assert t.path_ASR["LFPM"] == pytest.approx(np.trapezoid(line, dx=1 / (len(line) - 1))) and pd.isna(t.path_ASR["TA"]) and 0 <= t.lam["LFPM"] <= 1


def test_saved_files(tiny_lab, tmp_path):
    tiny_lab.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["metrics.parquet", "params.json", "path.html", "path.png"]
    assert pd.read_parquet(tmp_path / "out" / "metrics.parquet").equals(tiny_lab.frame().reset_index(drop=True))
    p = json.loads((tmp_path / "out" / "params.json").read_text())
    assert p["params"] == json.loads(json.dumps(asdict(tiny_lab.P))) and {"torch", "python", "lfpm_nb", "device", "threads"} <= p["versions"].keys()
    assert p["backbone"] == "0" * 64 and {"hash", "time"} <= p.keys()
    assert {"lam", "lam_rule", "strength", "knob", "passes", "seconds", "peak_mb"} <= p["defences"]["LFPM"].keys()
    assert {s["name"] for s in p["stages"]} >= TRAINED and all(s["seconds"] >= 0 for s in p["stages"])
    html = (tmp_path / "out" / "path.html").read_text()
    assert "LFPM" in html and "TA (clean), same trigger" in html and not any(f'src="http{s}:' in html for s in ("", "s")), "it needs no network"


def test_figure_lines_are_the_rows(tiny_lab):
    df = tiny_lab.frame()
    lines, flat = path_lines(df)
    assert set(lines) == {("LFPM", "CA"), ("LFPM", "ASR_T")} and all(g.lam.tolist() == [0, .5, 1] for g in lines.values())
    pick = lambda m, metric: df[(df.method == m) & (df.task == "average") & (df.metric == metric) & (df.kind == "model")].value.item()
    assert flat == {"TA (clean), same trigger": pick("TA (clean)", "ASR_T"), "TA, no trigger": pick("TA", "floor_none"), "TA, grey patch": pick("TA", "floor_grey")}


# --- run folders -----------------------------------------------------------------------------------------------------------------

def fake(runs, folder, values, seed=0, preset="lab", config="aaaa", state="done", age=0., **more):
    "A results folder with CA of each method; `age` seconds old."
    out = Path(runs) / "main" / folder
    out.mkdir(parents=True)
    rows = [dict(method=m, kind="model", task="average", metric="CA", lam=float("nan"), value=float(v), n=10, lo=None, hi=None, seed=seed) for m, v in values.items()]
    rows += [dict(method=m, kind="path", task="average", metric="CA", lam=.5, value=999., n=10, lo=None, hi=None, seed=seed) for m in values]
    rows += [dict(method=m, kind="model", task="signs", metric="CA", lam=float("nan"), value=999., n=10, lo=1., hi=2., seed=seed) for m in values]
    pd.DataFrame(rows).to_parquet(out / "metrics.parquet")
    if state:
        (out / "status.json").write_text(json.dumps(dict(state=state, run="main", preset=preset, config=config, seed=seed, **more)))
        os.utime(out / "status.json", (time.time() - age,) * 2)
    return out


@pytest.fixture
def runs(dirs): return dirs / "runs"


def test_table_is_mean_and_std_over_seeds(runs):
    for seed, ca in enumerate((70, 72, 77)): fake(runs, f"s{seed}", {"TA": ca, "LFPM": ca - 1}, seed=seed)
    df, info = load_runs("main", "lab")
    t = table(df)
    assert t.method.tolist() == ["TA", "LFPM"] and t.n_seeds.tolist() == [3, 3] and info["others"] == 0
    assert t.CA.tolist() == [73, 72] and t.CA_std[0] == pytest.approx(np.std([70, 72, 77], ddof=1)) and t.ASR_T.isna().all()
    assert "| TA | 73.0 ± 3.6 | 3 |" in to_markdown(t) and "ASR" not in to_markdown(t), "a column without a number is left out"
    assert "| TA | 73.0 ± 3.6 | – | 3 |" in to_markdown(t.assign(ASR_T=[np.nan, 5.]))


def paths(curves, lams, seeds=(0,)):
    "Path rows from {method: (CA, ASR_T) along lam} and the methods' chosen lam."
    grid = np.linspace(0, 1, len(next(iter(curves.values()))[0]))
    at = lambda m, kind, metric, value, lam, seed: dict(method=m, kind=kind, task="average", metric=metric, lam=lam, value=float(value), n=10, seed=seed)
    rows = [at(m, "path", k, v + seed, l, seed) for seed in seeds for m, c in curves.items() for k, vs in zip(("CA", "ASR_T"), c) for l, v in zip(grid, vs)]
    return pd.DataFrame(rows + [at(m, "summary", "lam", l, l, seed) for seed in seeds for m, l in lams.items()])


def test_versus_reads_whole_paths_at_the_same_price():
    curves = {"LFPM": ((70, 69, 60), (90, 2, 0)), "near": ((70, 68, 67.5), (90, 50, 9)), "cheap": ((70, 90, 90), (90, 1, 1)), "never": ((70, 69, 69), (90, 90, 90))}
    t = versus(paths(curves, {"LFPM": .5, "near": 1., "cheap": 1., "never": 1.}, seeds=(0, 1))).set_index("method")
    assert t.ASR_same_CA["near"] == 9.5 and t.dASR["near"] == 7 and t.dASR_std["near"] == 0, "the lowest within 2 points, mean of two seeds"
    assert t.n_CA["near"] == 0 and np.isnan(t.CA_same_ASR["near"]), "its attack success never falls to LFPM's"
    assert t.CA_same_ASR["cheap"] == 90.5 and t.dCA["cheap"] == 21 and t.dASR["never"] == 88
    assert t.dASR["LFPM"] == t.dCA["LFPM"] == 0 and (t.n_seeds == 2).all() and t.n_ASR["cheap"] == 2, "its start costs as much"
    assert versus(paths(curves, {"LFPM": .5}), ca=1.2).set_index("method").dASR["near"] == 48 and versus(paths(curves, {"LFPM": .5}), asr=7).set_index("method").dCA["near"] == -1.5


def test_table_never_mixes_presets_or_configurations(runs):
    fake(runs, "old", {"TA": 10}, seed=1, config="bbbb", age=500)
    fake(runs, "tiny", {"TA": 20}, seed=2, preset="tiny", config="cccc")
    fake(runs, "new", {"TA": 30}, seed=0, config="aaaa", age=100)
    df, info = load_runs("main", "lab")
    assert table(df).CA.tolist() == [30] and table(df).n_seeds.tolist() == [1] and (info["config"], info["others"]) == ("aaaa", 1)
    assert table(load_runs("main", "tiny")[0]).CA.tolist() == [20]
    df, info = load_runs("main", "lab", "bbbb")
    assert table(df).CA.tolist() == [10] and info["known"] == ["aaaa"]
    with pytest.raises(ValueError, match="unknown configuration of main 'bbba'; did you mean 'bbbb'"): load_runs("main", "lab", "bbba")
    os.utime(runs / "main" / "old" / "status.json")                      # now the newest
    df, info = load_runs("main", "lab")
    assert table(df).CA.tolist() == [10] and info["config"] == "bbbb"


def test_each_seed_counts_once_and_the_newest_run_wins(runs):
    fake(runs, "copy", {"TA": 10}, seed=0, age=500)
    fake(runs, "run", {"TA": 30}, seed=0)
    fake(runs, "other", {"TA": 50}, seed=1, age=900)
    t = table(load_runs("main", "lab")[0])
    assert t.n_seeds.tolist() == [2] and t.CA.tolist() == [40]


def test_failed_and_interrupted_runs_are_ignored(runs):
    fake(runs, "failed", {"TA": 10}, seed=1, state="failed")
    fake(runs, "interrupted", {"TA": 10}, seed=2, state=None)
    with pytest.raises(FileNotFoundError, match="no finished run of main with preset lab .* make one: lfpm run main --preset lab"): load_runs("main", "lab")
    fake(runs, "good", {"TA": 30}, seed=0, age=900)
    df, info = load_runs("main", "lab")
    assert table(df).n_seeds.tolist() == [1] and info["others"] == 0 and [f.name for f in info["folders"]] == ["good"]


def test_status(tmp_path):
    assert status(tmp_path) == "absent"
    for text, want in (('{"state": "done"}', "done"), ('{"state"', "absent"), ('{}', "absent"), ('{"state": "failed"}', "failed")):
        (tmp_path / "status.json").write_text(text)
        assert status(tmp_path) == want


def test_configurations_differ_in_all_but_seed_and_folder(monkeypatch):
    s = settings_of("main", "tiny")
    one = config_hash("main", s)
    assert one == config_hash("main", {**s, "seed": 7, "out_dir": "x"}) and len(one) == 8
    others = [config_hash("main", {**s, k: v}) for k, v in (("scale", .31), ("lam", "0.5"), ("tasks", s["tasks"][::-1]), ("A", not s["A"]))]
    monkeypatch.setattr(E, "versions", lambda: dict(threads=99))
    others.append(config_hash("main", s))
    assert len({one, *others}) == 6


def test_another_backbone_file_is_another_configuration(own_data):
    s = settings_of("main", "tiny", {"backbone": "pico"})
    one = config_hash("main", s)
    clip = new_pico()
    with torch.no_grad(): clip.visual.proj.add_(.1)
    ship_clip(clip, own_data.parent, steps=1)
    assert config_hash("main", s) != one, "new weights under the old name must not be taken for a finished run"


def test_other_pictures_of_ones_own_are_another_configuration(tmp_path):
    s = settings_of("main", "tiny")
    s["tasks"] = s["tasks"] + [str(tmp_path / "mine")]
    (tmp_path / "mine" / "cat").mkdir(parents=True)
    (tmp_path / "mine" / "cat" / "1.png").write_bytes(b"a")
    one = config_hash("main", s)
    assert one == config_hash("main", s)
    (tmp_path / "mine" / "cat" / "1.png").write_bytes(b"other")
    assert config_hash("main", s) != one


def test_a_finished_run_is_reused_without_starting_anything(runs, monkeypatch):
    monkeypatch.setattr(papermill, "execute_notebook", lambda *a, **k: pytest.fail("the notebook was started"))
    s = settings_of("main", "tiny")
    out = fake(runs, f"tiny-s0-{config_hash('main', s)}", {"TA": 1}, preset="tiny", config=config_hash("main", s))
    assert run_notebook("main", "tiny") == out.resolve()


@pytest.fixture
def papermilled(dirs, monkeypatch):
    "papermill replaced: the list of its calls, and what it shall raise."
    calls, error = [], []
    def execute(notebook, out, settings, **k):
        calls.append(settings); Path(out).write_text("{}")
        if error: raise error[0]
    monkeypatch.setattr(papermill, "execute_notebook", execute)
    for k in ("LFPM_FORCE", "LFPM_LIVE"): monkeypatch.setenv(k, "0")
    return calls, error


def test_status_is_written_last_and_tells_the_run(papermilled):
    out = run_notebook("main", "tiny", {"scale": "0.35"}, seed=3)
    s = json.loads((out / "status.json").read_text())
    assert (s["state"], s["run"], s["preset"], s["seed"]) == ("done", "main", "tiny", 3) and s["config"] in out.name and out.name.startswith("tiny-s3-")
    assert papermilled[0][0]["scale"] == .35 and papermilled[0][0]["out_dir"] == str(out)
    run_notebook("main", "tiny", {"scale": "0.35"}, seed=3)
    assert len(papermilled[0]) == 1
    run_notebook("main", "tiny", {"scale": "0.35"}, seed=3, force=True)
    assert len(papermilled[0]) == 2


def test_ctrl_c_leaves_no_results_folder(papermilled):
    papermilled[1].append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt): run_notebook("main", "tiny")
    assert list((E.runs_dir() / "main").iterdir()) == []


def test_a_failed_run_keeps_its_notebook_and_is_run_again(papermilled):
    papermilled[1].append(papermill.PapermillExecutionError(3, 3, "lab = Lab(P)", "ValueError", "too much", []))
    with pytest.raises(RuntimeError, match="main failed in cell 3: ValueError: too much"): run_notebook("main", "tiny")
    out, = (E.runs_dir() / "main").iterdir()
    assert status(out) == "failed" and (out / "notebook.ipynb").exists() and "too much" in json.loads((out / "status.json").read_text())["error"]
    papermilled[1].clear()
    assert run_notebook("main", "tiny") == out.resolve() and status(out) == "done"
