"""Experiments as data, settings, run folders, reading runs back."""

import json
import os
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest
import torch
import yaml

from conftest import fake, new_pico
from lfpm_nb import clip
from lfpm_nb import runs as E
from lfpm_nb.clip import ship_clip
from lfpm_nb.core import write_json
from lfpm_nb.settings import around, notebooks, parameters
from lfpm_nb.results import table
from lfpm_nb.runs import (
    config_hash,
    execute,
    experiments,
    finish,
    latest,
    load_runs,
    planned,
    presets,
    read_aliases,
    run_notebook,
    settings_of,
    status,
)


@pytest.mark.parametrize("name", sorted(experiments()))
def test_an_experiment_is_known_parameters_and_sizes(name):
    e = experiments()[name]
    known, sizes = parameters(e.notebook), presets(e)
    assert (
        {"tiny", "lab"} <= set(sizes)
        and sizes["lab"] == {}
        and e.title
        and {"tiny", "lab"} <= set(e.minutes)
    ), "sizes, a title and minutes"
    for preset, values in sizes.items():
        values = e.parameters | values
        assert set(values) <= set(known) and all(
            type(v) is type(known[k][0]) for k, v in values.items()
        ), preset
        got = asdict(settings_of(name, preset))
        assert {*got, *around(e.notebook)} == set(known)
        assert all(got[k] == values.get(k, known[k][0]) for k in got if values.get(k) != ["all"])
    assert all(text for _, text in known.values()), "every parameter is explained"


def test_no_two_experiments_are_the_same_run():
    plans = [planned(n, "tiny") for n in experiments()]
    assert len({p.config for p in plans}) == len(plans)


@pytest.fixture
def yamls(tmp_path, monkeypatch):
    "`write(name, text)` -> experiments() with data/experiments replaced by what was written."
    (tmp_path / "experiments").mkdir()
    monkeypatch.setattr(E, "proj_path", lambda *p: tmp_path / "experiments")

    def write(name, text):
        (tmp_path / "experiments" / f"{name}.yaml").write_text(text, encoding="utf-8")
        return experiments()

    return write


def test_a_notebook_without_yaml_is_an_experiment(yamls):
    every = yamls(
        "mine",
        "title: t\nnotebook: main\nparameters: {scale: 0.5}\npresets: {small: {n_train: 50}}",
    )
    assert (
        set(every) == {"mine", *notebooks()} and settings_of("ctl").n == parameters("ctl")["n"][0]
    )
    assert (settings_of("mine", "small").scale, settings_of("mine", "small").n_train) == (
        0.5,
        50,
    ) and list(presets(every["mine"])) == ["lab", "small"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("title: [", "x.yaml is not YAML"),
        ("- a", "x.yaml holds a list; expected lines of `key: value`"),
        ("title: t\nnotbook: main", "unknown key in .*x.yaml 'notbook'; did you mean 'notebook'"),
        ("title: t", "x.yaml lacks notebook"),
        ("title: t\nnotebook: mian", "unknown notebook in .*x.yaml 'mian'; did you mean 'main'"),
        ("title: t\nnotebook: main\nparameters: {scal: 1}", "unknown parameter of x 'scal'"),
        ("title: t\nnotebook: main\npresets: {lab: {sed: 1}}", "unknown parameter of x 'sed'"),
    ],
)
def test_bad_experiments_say_where_and_what(yamls, text, message):
    with pytest.raises(ValueError, match=message):
        yamls("x", text)
        settings_of("x")


def test_settings_are_defaults_then_preset_then_given_then_seed():
    s = settings_of(
        "MAIN", "tiny", {"n_train": "77", "defences": "lfpm", "A": "false", "gamma": 0.5}, seed=4
    )
    assert (s.n_train, s.partition, s.gamma, s.seed, s.n_test) == (
        77,
        False,
        0.5,
        4,
        presets(experiments()["main"])["tiny"]["n_test"],
    )
    assert s.scale == parameters("main")["scale"][0]


def test_spellings_of_the_same_settings_are_the_same():
    one, two = (
        settings_of("main", "tiny", dict(attack=a, defences=d, lam=l, semantic=c))
        for a, d, l, c in (
            ("badmerging", "LFPM", "0.5", "1,2"),
            ("BadMerging (off-task)", "lfpm", "0.50", "1.0,2.0"),
        )
    )
    assert config_hash("main", one) == config_hash("main", two)


@pytest.mark.parametrize(
    "name, preset, given, message",
    [
        ("mian", "tiny", {}, "unknown run 'mian'; did you mean 'main'"),
        ("main", "tinny", {}, "unknown preset of main 'tinny'; did you mean 'tiny'"),
        ("main", "tiny", {"lamda": "1"}, "unknown parameter of main 'lamda'; did you mean 'lam'"),
        ("main", "tiny", {"seed": "one"}, "seed is 'one'; expected a whole number from 0 on"),
        ("main", "tiny", {"attack": "badmergin"}, "did you mean 'badmerging'"),
        ("main", "tiny", {"merges": "TIS"}, "unknown merge 'TIS'"),
        ("main", "tiny", {"defences": "LFMP"}, "did you mean 'LFPM'"),
        ("main", "tiny", {"clean_defences": "LFMP"}, "did you mean 'LFPM'"),
        ("main", "tiny", {"adversary": "signs"}, "two different tasks"),
        ("main", "tiny", {"target": "sign"}, "did you mean 'signs'"),
        ("main", "tiny", {"adversary": "shapes"}, "must be one of tasks"),
        ("main", "tiny", {"target_class": "yeld"}, "did you mean 'yield'"),
        ("main", "tiny", {"tasks": "letters,signs,letters"}, "lists a task twice"),
        ("main", "tiny", {"lam": "1.2"}, r"a number in \[0, 1\]"),
        ("main", "tiny", {"lam": "-1"}, r"\[0, 1\]"),
        ("main", "tiny", {"lam": "nan"}, r"\[0, 1\]"),
        ("main", "tiny", {"lam": "often"}, r"a number in \[0, 1\]"),
        ("main", "tiny", {"path_from": "0.9", "path_to": "0.2"}, "0 <= a <= b <= 1"),
        ("main", "tiny", {"start": "here"}, "expected 'merged' or 'pretrained'"),
        ("main", "tiny", {"strength": "much"}, "strength is 'much'"),
        ("main", "tiny", {"strength": "-1"}, "learning-rate factor"),
        (
            "main",
            "tiny",
            {"options": '{"TIES": {"densty": 0.1}}'},
            "unknown option of TIES 'densty'; did you mean 'density'",
        ),
        ("main", "tiny", {"options": '{"TEIS": {}}'}, "did you mean 'TIES'"),
        ("main", "tiny", {"options": "[1]"}, "expected a table as JSON"),
        ("main", "tiny", {"adversary": "letters,land"}, "as many of each"),
        (
            "main",
            "tiny",
            {
                "adversary": "letters,letters",
                "target": "signs,flags",
                "target_class": "yield,Japan",
            },
            "names 'letters' twice",
        ),
    ],
)
def test_bad_settings_are_refused_with_a_hint(name, preset, given, message):
    with pytest.raises(ValueError, match=message):
        settings_of(name, preset, given)


# --- bad input through the command: one clear line, nothing started, nothing left behind --------


@pytest.fixture
def refused(lfpm, dirs, monkeypatch):
    """Run `lfpm run main --preset tiny …`; it must stop with one line before the notebook starts.

    And leave no folder."""

    def started(*a, **k):
        raise AssertionError("the notebook was started")

    monkeypatch.setattr(papermill, "execute_notebook", started)

    def call(*args, name="main", preset="tiny"):
        code, out, err = lfpm("run", name, "--preset", preset, *args)
        assert code == 2 and out == "", (code, out, err)
        assert err.startswith("lfpm: ") and err.count("\n") == 1 and "Traceback" not in err, err
        runs = Path(os.environ["LFPM_RUNS"])
        assert not (runs.exists() and any(runs.rglob("*"))) and not list(
            dirs.rglob("status.json")
        ), "something was left behind"
        return err

    return call


@pytest.mark.parametrize(
    "args, message",
    [
        (("-p", "tasks=letters,signs,nosuchtask"), "unknown task 'nosuchtask'"),
        (("-p", "tasks=letters,signs,texture"), "did you mean 'textures'"),
        (("-p", "attack=badmergin"), "did you mean 'badmerging'"),
        (("-p", "merges=TAA"), "did you mean 'TA'"),
        (("-p", "defences=LFMP"), "did you mean 'LFPM'"),
        (("-p", "lam=1.5"), "[0, 1]"),
        (("-p", "lam=often"), "expected a rule (knee, level, calm) or a number in [0, 1]"),
        (("-p", "adversary=signs"), "two different tasks"),
        (("-p", "target_class=yeld"), "did you mean 'yield'"),
        (
            ("-p", "target=handwritten", "-p", "target_class=eleventy"),
            "unknown class of handwritten 'eleventy'",
        ),
        (("-p", "backbone=lfpm-lob"), "did you mean 'lfpm-lab'"),
        (("-p", "lamm=1"), "did you mean 'lam'"),
        (("-p", "lam"), "is not key=value"),
        (("-p", "seed=x"), "expected a whole number"),
        (("-p", "n_train=0"), "n_train"),
        (("-p", "side=33"), "side"),
        (("-p", "lam_n=1"), "lam_n"),
        (("-p", "held=0"), "held"),
        (("-p", "rank=many"), "rank"),
        (("-p", "semantic=much"), "semantic"),
        (("-p", "semantic="), "semantic"),
        (("-p", "rho=much"), "rho"),
    ],
)
def test_bad_parameters(refused, args, message):
    assert message in refused(*args)


def test_bad_names(refused):
    assert "did you mean 'main'" in refused(name="mian") and "did you mean 'tiny'" in refused(
        preset="tinny"
    )


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """A data folder with one backbone called pico, which the next test may spoil.

    Returns its weights file."""
    monkeypatch.setattr(clip, "proj_path", lambda *parts: tmp_path.joinpath("checkout", *parts))
    return ship_clip(new_pico(), tmp_path / "checkout" / "data", steps=0)


def test_a_missing_checkpoint(refused, own_data):
    own_data.unlink()
    assert "no checkpoint at" in refused("-p", "backbone=pico")


def test_a_damaged_checkpoint(refused, own_data):
    own_data.write_bytes(own_data.read_bytes()[:1000])
    assert "is damaged" in refused("-p", "backbone=pico")


def test_a_checkpoint_of_another_architecture(refused, own_data):
    card = own_data.with_name("pico.card.json")
    c = json.loads(card.read_text(encoding="utf-8"))
    c["config"]["vision_cfg"]["layers"] = 3
    card.write_text(json.dumps(c), encoding="utf-8")
    assert "differ in" in refused("-p", "backbone=pico")


def test_nan_in_the_weights(refused, own_data):
    import hashlib
    from safetensors.torch import load_file, save_file

    state = load_file(own_data)
    state["visual.proj"][0, 0] = float("nan")
    save_file(state, own_data, {"quick_gelu": "False"})
    card = own_data.with_name("pico.card.json")
    card.write_text(
        json.dumps(
            json.loads(card.read_text(encoding="utf-8"))
            | {"sha256": hashlib.sha256(own_data.read_bytes()).hexdigest()}
        ),
        encoding="utf-8",
    )
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
    (tmp_path / "file").write_text("x", encoding="utf-8")
    monkeypatch.setenv("LFPM_RUNS", str(tmp_path / "file" / "runs"))
    assert (
        "cannot write results to" in refused()
        and (tmp_path / "file").read_text(encoding="utf-8") == "x"
    )


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_read_only_folder(refused, tmp_path, monkeypatch):
    (tmp_path / "shut").mkdir(mode=0o500)
    monkeypatch.setenv("LFPM_RUNS", str(tmp_path / "shut" / "runs"))
    assert "cannot write results to" in refused()


def test_a_full_disk(refused, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device" in refused()


# --- run folders --------------------------------------------------------------------------------


def test_table_never_mixes_presets_or_configurations(runs):
    fake(runs, "old", {"TA": 10}, seed=1, config="bbbb", age=500)
    fake(runs, "tiny", {"TA": 20}, seed=2, preset="tiny", config="cccc")
    fake(runs, "new", {"TA": 30}, seed=0, config="aaaa", age=100)
    df, info = load_runs("main", "lab")
    assert (
        table(df).CA.tolist() == [30]
        and table(df).n_seeds.tolist() == [1]
        and (info["config"], info["others"]) == ("aaaa", 1)
    )
    assert table(load_runs("main", "tiny")[0]).CA.tolist() == [20]
    df, info = load_runs("main", "lab", "bbbb")
    assert table(df).CA.tolist() == [10] and info["known"] == ["aaaa"]
    with pytest.raises(
        ValueError, match="unknown configuration of main 'bbba'; did you mean 'bbbb'"
    ):
        load_runs("main", "lab", "bbba")
    os.utime(
        runs / "main" / "old" / "status.json"
    )  # touched, as by a clone: that makes it no newer
    assert load_runs("main", "lab")[1]["config"] == "aaaa"
    fake(runs, "again", {"TA": 11}, seed=1, config="bbbb")
    df, info = load_runs("main", "lab")
    assert table(df).CA.tolist() == [11] and info["config"] == "bbbb"


def test_each_seed_counts_once_and_the_newest_run_wins(runs):
    fake(runs, "copy", {"TA": 10}, seed=0, age=500)
    fake(runs, "run", {"TA": 30}, seed=0)
    fake(runs, "other", {"TA": 50}, seed=1, age=900)
    t = table(load_runs("main", "lab")[0])
    assert t.n_seeds.tolist() == [2] and t.CA.tolist() == [40]


def test_failed_and_interrupted_runs_are_ignored(runs):
    fake(runs, "failed", {"TA": 10}, seed=1, state="failed")
    fake(runs, "interrupted", {"TA": 10}, seed=2, state=None)
    with pytest.raises(
        FileNotFoundError,
        match="no finished run of main with preset lab .* make one: lfpm run main --preset lab",
    ):
        load_runs("main", "lab")
    fake(runs, "good", {"TA": 30}, seed=0, age=900)
    df, info = load_runs("main", "lab")
    assert (
        table(df).n_seeds.tolist() == [1]
        and info["others"] == 0
        and [f.name for f in info["folders"]] == ["good"]
    )


def test_status(tmp_path):
    assert status(tmp_path) == "absent"
    for text, want in (
        ('{"state": "done"}', "damaged"),
        ('{"state": "done", "metrics": null}', "done"),
        ('{"state"', "absent"),
        ("{}", "absent"),
        ('{"state": "failed"}', "failed"),
        ('["done"]', "absent"),
        ("", "absent"),
        ('{"state": ["done"]}', "absent"),
    ):
        (tmp_path / "status.json").write_text(text, encoding="utf-8")
        assert status(tmp_path) == want, text


def test_a_table_is_read_only_as_it_was_written(runs, lfpm):
    "Other bytes, no bytes, no hash: never a number, always a name and a reason; the rest is shown."
    folders = [fake(runs, f"s{i}", {"TA": 10 * i}, seed=i) for i in range(5)]
    table = folders[1] / "metrics.parquet"
    table.write_bytes(table.read_bytes().replace(b"TA", b"TB"))
    (folders[2] / "metrics.parquet").unlink()
    said = E.read_status(folders[3])
    write_json(folders[3] / "status.json", {k: v for k, v in said.items() if k != "metrics"})
    (folders[4] / "params.json").write_text('{"params": {', encoding="utf-8")
    assert [status(f) for f in folders] == ["done", *4 * ["damaged"]]
    df, info = load_runs("main", "lab")
    assert set(df.seed) == {0} and list(info["left"]) == [
        "main/s1",
        "main/s2",
        "main/s3",
        "main/s4",
    ]
    code, out, err = lfpm("table", "main")
    assert code == 0 and "| TA | 0.0 |" in out
    for name, why in (
        ("s1", "is damaged"),
        ("s2", "no file"),
        ("s3", "no hash of metrics.parquet"),
        ("s4", "half-written"),
    ):
        assert len([l for l in err.splitlines() if f"main/{name}" in l and why in l]) == 1, err
    (folders[0] / "status.json").unlink()
    code, out, err = lfpm("table", "main")
    assert (
        (code, out, err.count("\n")) == (2, "", 1)
        and "no finished run of main" in err
        and "main/s1" in err
    )


@pytest.mark.parametrize("key", sorted(E.NEEDED))
@pytest.mark.parametrize("value", [None, [1]])
def test_a_status_that_lacks_something_is_left_out(runs, lfpm, key, value):
    fake(runs, "lab-s0-aaaa", {"TA": 70})
    bad = fake(runs, "lab-s1-aaaa", {"TA": 999}, seed=1)
    write_json(bad / "status.json", E.read_status(bad) | {key: value})
    code, out, err = lfpm("table", "main")
    assert code == 0 and "| TA | 70.0 |" in out
    assert err == f"(left out: main/lab-s1-aaaa: half-written: its status lacks {key})\n"


def test_a_finished_run_whose_table_changed_is_made_again(papermilled, capsys):
    out = run_notebook("main", "tiny")
    (out / "metrics.parquet").write_bytes(b"a table that no run wrote")
    assert status(out) == "done", "this run wrote no table"
    finish(out, preset="tiny")
    (out / "metrics.parquet").write_bytes(b"a table that some run wrote")
    assert status(out) == "damaged"
    assert run_notebook("main", "tiny") == out and len(papermilled[0]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(out) in err and "counts as not finished" in err


def test_configurations_differ_in_all_but_seed_and_folder(monkeypatch):
    s = settings_of("main", "tiny")
    one = config_hash("main", s)
    assert one == config_hash("main", replace(s, seed=7)) and len(one) == 8
    others = [
        config_hash("main", replace(s, **{k: v}))
        for k, v in (
            ("scale", 0.31),
            ("lam", "0.5"),
            ("tasks", s.tasks[::-1]),
            ("partition", not s.partition),
        )
    ]
    monkeypatch.setattr(E, "versions", lambda: dict(threads=99))
    others.append(config_hash("main", s))
    assert len({one, *others}) == 6


def test_another_backbone_file_is_another_configuration(own_data):
    s = settings_of("main", "tiny", {"backbone": "pico"})
    one = config_hash("main", s)
    clip = new_pico()
    with torch.no_grad():
        clip.visual.proj.add_(0.1)
    ship_clip(clip, own_data.parent, steps=1)
    assert config_hash("main", s) != one, (
        "new weights under the old name must not be taken for a finished run"
    )


def test_other_pictures_of_ones_own_are_another_configuration(tmp_path):
    s = settings_of("main", "tiny")
    s = replace(s, tasks=[*s.tasks, str(tmp_path / "mine")])
    (tmp_path / "mine" / "cat").mkdir(parents=True)
    (tmp_path / "mine" / "cat" / "1.png").write_bytes(b"a")
    one = config_hash("main", s)
    assert one == config_hash("main", s)
    (tmp_path / "mine" / "cat" / "1.png").write_bytes(b"other")
    assert config_hash("main", s) != one


# --- two names of the same numbers --------------------------------------------------------------

A, B, C = "aaaaaaaa", "bbbbbbbb", "cccccccc"
ALIAS = dict(
    experiment="main",
    preset="lab",
    was=A,
    now=B,
    old="1" * 40,
    new="2" * 40,
    compared=["run main --preset tiny"],
    numbers=533,
    largest=0.0,
    machine="a processor",
    date="2026-01-01",
)


@pytest.fixture
def aliases(tmp_path, monkeypatch):
    "`write(entry, ...)`: the aliases of the shipped results are these; returns their file."
    file = tmp_path / "aliases.yaml"
    monkeypatch.setattr(E, "aliases_file", lambda: file)

    def write(*entries, text=None):
        file.write_text(
            yaml.safe_dump([ALIAS | e for e in entries]) if text is None else text, encoding="utf-8"
        )
        return file

    return write


def test_names_lead_to_the_latest(aliases):
    known = read_aliases(aliases({}, dict(was=B, now=C), dict(preset="tiny", was=A, now=C)))
    assert [latest("main", "lab", c, known) for c in (A, B, C, "dddddddd")] == [C, C, C, "dddddddd"]
    assert latest("main", "tiny", A, known) == C and latest("lobam", "lab", A, known) == A
    assert (
        read_aliases(Path("no such file")) == []
        and read_aliases(aliases(text="# nothing yet\n")) == []
    )


@pytest.mark.parametrize(
    "entries, message",
    [
        ([dict(experiment="mian")], "unknown experiment 'mian'"),
        ([dict(preset="labb")], "main has no preset 'labb'"),
        ([dict(wsa=A)], "unknown field 'wsa'"),
        ([dict(was=12345678)], "was is 12345678; expected a str"),
        ([dict(now="bbbb")], "now is 'bbbb'; expected 8 hex digits"),
        ([dict(largest=1e-9)], "difference 1e-09; expected some and 0"),
        ([dict(numbers=0)], "0 numbers"),
        ([dict(compared="main")], "expected a list"),
        ([{}, dict(now=C)], f"main lab {A} has two meanings"),
        ([dict(now=A)], "in a circle"),
        ([{}, dict(was=B, now=C), dict(was=C, now=A)], "in a circle"),
    ],
)
def test_an_alias_that_cannot_be_is_refused_in_one_line(aliases, runs, lfpm, entries, message):
    file = aliases(*entries)
    with pytest.raises(ValueError, match=message) as e:
        read_aliases(file)
    fake(runs, "s0", {"TA": 1})
    code, out, err = lfpm("table", "main")
    assert str(file) in str(e.value) and (code, out, err) == (2, "", f"lfpm: {e.value}\n")


@pytest.mark.parametrize("field", sorted(ALIAS))
def test_an_alias_says_everything(aliases, field):
    file = aliases(text=yaml.safe_dump([{k: v for k, v in ALIAS.items() if k != field}]))
    with pytest.raises(ValueError, match=f"an entry lacks {field}"):
        read_aliases(file)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [", "is not YAML"),
        ("main: lab", "holds a dict; expected a list of aliases"),
        ("- main", "'main' is no mapping"),
    ],
)
def test_a_file_that_holds_no_aliases(aliases, text, message):
    with pytest.raises(ValueError, match=message):
        read_aliases(aliases(text=text))


def test_runs_under_both_names_are_one_configuration(aliases, runs, lfpm):
    aliases({}, dict(was=B, now=C))
    fake(runs, "one", {"TA": 10}, seed=0, config=A, age=900)
    fake(runs, "two", {"TA": 20}, seed=1, config=C, age=500)
    fake(runs, "three", {"TA": 90}, seed=2, config="dddddddd", age=100)
    fake(runs, "twice", {"TA": 30}, seed=0, config=B, age=200)
    df, info = load_runs("main", "lab", A)
    assert (
        table(df).CA.tolist() == [25]
        and info["config"] == C
        and list(info["made"]) == [B]
        and info["known"] == ["dddddddd"]
    )
    assert (
        load_runs("main", "lab", C)[1]["folders"] == info["folders"]
        and load_runs("main", "lab")[1]["config"] == "dddddddd"
    )
    code, out, err = lfpm("table", "main", "--config", A)
    compared = "533 numbers compared between commits 11111111 and 22222222, largest difference 0"
    assert code == 0 and f"configuration {C} (made as {B}: {compared})" in out
    aliases(text="[]")
    assert table(load_runs("main", "lab", A)[0]).CA.tolist() == [10], (
        "without an alias they are strangers"
    )


def test_the_report_reads_aliases_too(aliases, runs):
    from lfpm_nb.report import read_results

    aliases({})
    for seed, config in ((0, A), (1, B)):
        fake(runs, f"lab-s{seed}-{config}", {"TA": 10}, seed=seed, config=config)
    r, left = read_results("main", "lab", runs)
    assert (r.config, r.seeds, r.others, left) == (B, [0, 1], {}, {}) and any(
        f"made as {A}: 533 numbers" in n for n in r.notes
    )


def test_a_run_that_was_finished_under_another_name_is_not_made_again(aliases, papermilled):
    plan = planned("main", "tiny")
    (older := plan.out.with_name(f"tiny-s0-{A}")).mkdir(parents=True)
    finish(older)
    aliases(dict(preset="tiny", now=plan.config))
    assert execute(plan) == older and papermilled[0] == []
    assert execute(plan, force=True) == plan.out and len(papermilled[0]) == 1, (
        "made anew under its own name"
    )
    assert execute(plan) == plan.out


def test_another_name_alone_is_another_run(aliases, papermilled):
    plan = planned("main", "tiny")
    (older := plan.out.with_name(f"tiny-s0-{A}")).mkdir(parents=True)
    finish(older)
    for entry in (
        dict(preset="lab", now=plan.config),
        dict(experiment="lobam", preset="tiny", now=plan.config),
        dict(preset="tiny", now=B),
    ):
        aliases(entry)
        assert E.done_folder(plan, E.runs_dir()) is None, entry


def test_a_finished_run_is_reused_without_starting_anything(runs, monkeypatch):
    monkeypatch.setattr(
        papermill, "execute_notebook", lambda *a, **k: pytest.fail("the notebook was started")
    )
    s = settings_of("main", "tiny")
    out = fake(
        runs,
        f"tiny-s0-{config_hash('main', s)}",
        {"TA": 1},
        preset="tiny",
        config=config_hash("main", s),
    )
    assert run_notebook("main", "tiny") == out.resolve()


@pytest.fixture
def papermilled(dirs, monkeypatch):
    "papermill replaced: the list of its calls, and what it shall raise."
    calls, error = [], []

    def execute(notebook, out, settings, **k):
        calls.append(settings)
        Path(out).write_text("{}", encoding="utf-8")
        if error:
            raise error[0]

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    for k in ("LFPM_FORCE", "LFPM_LIVE"):
        monkeypatch.setenv(k, "0")
    return calls, error


def test_status_is_written_last_and_tells_the_run(papermilled):
    out = run_notebook("main", "tiny", {"scale": "0.35"}, seed=3)
    s = json.loads((out / "status.json").read_text(encoding="utf-8"))
    assert (
        (s["state"], s["run"], s["preset"], s["seed"]) == ("done", "main", "tiny", 3)
        and s["config"] in out.name
        and out.name.startswith("tiny-s3-")
    )
    assert papermilled[0][0]["scale"] == 0.35 and papermilled[0][0]["out_dir"] == str(out)
    run_notebook("main", "tiny", {"scale": "0.35"}, seed=3)
    assert len(papermilled[0]) == 1
    run_notebook("main", "tiny", {"scale": "0.35"}, seed=3, force=True)
    assert len(papermilled[0]) == 2


def test_ctrl_c_leaves_no_results_folder(papermilled):
    papermilled[1].append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_notebook("main", "tiny")
    assert list((E.runs_dir() / "main").iterdir()) == []


def test_a_failed_run_keeps_its_notebook_and_is_run_again(papermilled):
    papermilled[1].append(
        papermill.PapermillExecutionError(3, 3, "lab = Lab(P)", "ValueError", "too much", [])
    )
    with pytest.raises(RuntimeError, match="main failed in cell 3: ValueError: too much"):
        run_notebook("main", "tiny")
    (out,) = (E.runs_dir() / "main").iterdir()
    assert (
        status(out) == "failed"
        and (out / "notebook.ipynb").exists()
        and "too much" in json.loads((out / "status.json").read_text(encoding="utf-8"))["error"]
    )
    papermilled[1].clear()
    assert run_notebook("main", "tiny") == out.resolve() and status(out) == "done"


def test_a_dead_kernel_is_a_failed_run(papermilled):
    from nbclient.exceptions import DeadKernelError

    papermilled[1].append(DeadKernelError("Kernel died"))
    with pytest.raises(RuntimeError, match="the kernel of main died .* the same command continues"):
        run_notebook("main", "tiny")
    (out,) = (E.runs_dir() / "main").iterdir()
    assert status(out) == "failed"


def test_a_run_is_this_interpreters_whatever_kernelspec_there_is(tmp_path, monkeypatch, capfd):
    """A `python3` kernelspec that is found first and can only fail is not asked.

    And no word on eavesdroppers, for none can listen."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-c", "import sys; sys.exit('the wrong kernel')", "{connection_file}"]
    (spec / "kernel.json").write_text(
        json.dumps(dict(argv=argv, display_name="wrong", language="python")), encoding="utf-8"
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    who = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("import sys; print('by', sys.executable)")],
        metadata=dict(kernelspec=dict(name="python3", display_name="x", language="python")),
    )
    nbformat.write(who, tmp_path / "who.ipynb")
    monkeypatch.setattr(E, "notebooks", lambda: {"who": tmp_path / "who.ipynb"})
    E._papermill(SimpleNamespace(name="who", notebook="who", passed={}, out=tmp_path))
    out, err = capfd.readouterr()
    assert f"by {sys.executable}\n" in out and "eavesdropping" not in out + err


def test_what_shows_numbers_is_no_part_of_a_configuration(monkeypatch, tmp_path):
    from lfpm_nb import core

    package, copy = Path(core.__file__).parent, tmp_path / "lfpm_nb"
    one = config_hash("main", settings_of("main", "tiny"))
    copy.mkdir()
    for d in ("nbs", "data"):
        (tmp_path / d).symlink_to(package.parent / d)
    for f in package.glob("*.py"):
        (copy / f.name).write_text(
            f.read_text(encoding="utf-8")
            + "\nx_new = 1\n" * (f.stem in ("results", "runs", "explore", "cli")),
            encoding="utf-8",
        )
    monkeypatch.setattr(core, "__file__", str(copy / "core.py"))
    assert config_hash("main", settings_of("main", "tiny")) == one
    with open(copy / "path.py", "a", encoding="utf-8") as f:
        f.write("# a comment\n")
    assert config_hash("main", settings_of("main", "tiny")) == one
    with open(copy / "path.py", "a", encoding="utf-8") as f:
        f.write("x_new = 1\n")
    assert config_hash("main", settings_of("main", "tiny")) != one


def test_two_processes_want_the_same_run(papermilled):
    "The second waits and finds it done."
    plan, both = planned("main", "tiny"), []
    threads = [threading.Thread(target=lambda: both.append(execute(plan))) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert both == [plan.out] * 2 and len(papermilled[0]) == 1


def test_a_preset_set_to_nothing_is_not_there(yamls):
    every = yamls("main", "title: t\nnotebook: main\npresets: {lab: {}, big: {n_train: 50}}")
    every = yamls("mine", "title: t\nnotebook: main\npresets: {big: null}")
    assert list(presets(every["main"])) == ["lab", "big"] and list(presets(every["mine"])) == [
        "lab"
    ]
    with pytest.raises(ValueError, match="unknown preset of mine 'big'"):
        settings_of("mine", "big")


def test_a_backbone_that_is_not_here_says_how_to_make_it(lfpm, dirs, monkeypatch):
    from lfpm_nb import clip

    monkeypatch.setattr(clip, "data_cards", lambda: {})
    # another test may have loaded it, and then open_clip knows the name
    monkeypatch.setattr(clip, "plain_models", lambda: ["ViT-B-32-quickgelu"])
    code, _, err = lfpm("run", "main", "--preset", "small-real")
    assert code == 2
    assert "lfpm run pretrain" in err
    assert "LFPM_DATA" in err


def test_an_experiment_answers_to_the_tables_it_fills(yamls):
    yamls("mine", "title: t\nnotebook: main\nalso: [cost, path]")
    assert (
        planned("cost").name == planned("Path").name == planned("mine").name == "mine"
        and planned("cost").out == planned("mine").out
    )
    with pytest.raises(ValueError, match="did you mean 'cost'"):
        planned("costs")
