"""One door: what a run can be told, by whichever way it is told.

It is read alike or refused before anything runs."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, strategies as st
from papermill.cli import _resolve_type
from papermill.translators import PythonTranslator

from lfpm_nb.attack import attacks
from lfpm_nb.core import code_hash
from lfpm_nb.defend import defences, knobs
from lfpm_nb.merge import merges
from lfpm_nb.path import lam_rules
from lfpm_nb.runs import config_hash, here, planned, settings_of
from lfpm_nb.settings import (
    RUNS,
    MainParams,
    around,
    notebooks,
    parameter_cell,
    parameters,
    spellings,
)
from lfpm_nb.sweep import read_sweep


# --- a class and the cell that papermill fills --------------------------------------------------


def cell_of(name: str) -> str:
    "The source of a run notebook's parameters cell."
    cells = json.loads(notebooks()[name].read_text(encoding="utf-8"))["cells"]
    return next(
        "".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])
    )


@pytest.mark.parametrize("name", sorted(notebooks()))
def test_the_parameters_cell_is_the_classs_copy(name):
    assert cell_of(name) == parameter_cell(name), (
        "write lfpm_nb.settings.parameter_cell(name) into the cell"
    )


@pytest.mark.parametrize("name", sorted(RUNS))
def test_checking_leaves_the_defaults_as_they_are(name):
    plain = asdict(RUNS[name]())
    assert plain | {k: v for k, (v, _) in around(name).items()} == {
        k: v for k, (v, _) in parameters(name).items()
    }
    assert all(text for _, text in parameters(name).values()), "every setting is explained"


def test_no_two_share_a_list():
    one, two = MainParams(), MainParams()
    one.tasks.append("digits")
    one.options["TA"] = {}
    assert two.tasks == MainParams().tasks
    assert two.options == {}


def test_all_names_every_method():
    P = MainParams(merges=["all"], defences=["all"], clean_defences=[])
    assert P.merges == list(merges)
    assert P.defences == list(defences)
    assert P.clean_defences == []


def test_several_attackers():
    P = MainParams(adversary="letters, land", target="signs,flags", target_class="yield,Japan")
    found = [(a.adversary, a.target, a.target_class) for a in P.attackers]
    assert found == [("letters", "signs", "yield"), ("land", "flags", "Japan")]


def test_each_adversary_may_have_an_attack_of_his_own():
    on_task = dict(adversary="letters,land", target="letters,land", target_class="B,harbour")
    P = MainParams(attack="BadViT, trojvit", **on_task)
    assert P.attack == "badvit,trojvit"
    assert [a.attack for a in P.attackers] == ["badvit", "trojvit"]
    assert [a.attack for a in MainParams().attackers] == ["badmerging"]
    with pytest.raises(ValueError, match="as many of each"):
        MainParams(attack="badvit,trojvit,lobam", **on_task)
    with pytest.raises(ValueError, match="badmerging is off-task"):
        MainParams(attack="badvit,badmerging", **on_task)


def test_letters_are_aliases():
    names = dict(A="partition", B="worst_prompt", C="path_loss")
    for letter, name in names.items():
        other = not getattr(MainParams(), name)
        assert getattr(MainParams(**{letter: other}), name) is other
        assert settings_of("main", given={letter: other}) == settings_of(
            "main", given={name: other}
        )
    with pytest.raises(ValueError, match="partition of main is given twice, also as partition"):
        settings_of("main", given=dict(A=True, partition=False))


# --- four doors ---------------------------------------------------------------------------------


def by_shell(k, text, preset="tiny"):
    return planned("main", preset, {k: text}).settings


def by_sweep(k, text, folder, preset="tiny"):
    file = Path(folder) / "sweep.yaml"
    values = [yaml.safe_load(text)]
    seeds = k.lower() == "seed"
    entry = dict(run="main", seeds=values) if seeds else dict(run="main", grid={k: values})
    file.write_text(yaml.safe_dump(dict(preset=preset, runs=[entry])), encoding="utf-8")
    return read_sweep(file)[1][0].plan().settings


def by_papermill(k, value, preset="tiny"):
    """What the notebook's second cell makes of what papermill injects.

    `-p` resolves text as papermill does."""
    injected = (
        "# Parameters\n"
        + PythonTranslator().codify({k: value, "preset": preset}, "").split("\n", 1)[-1]
    )
    ns = {}
    exec(cell_of("main"), ns)
    exec(injected, ns)
    return here("main", ns | dict(In=["", cell_of("main"), injected])).settings


def by_python(k, text):
    return settings_of("main", "tiny", {k: yaml.safe_load(text)})


DOORS = {
    "shell -p": lambda k, t, d: by_shell(k, t),
    "sweep": by_sweep,
    "papermill -p": lambda k, t, d: by_papermill(k, _resolve_type(t)),
    "papermill -y": lambda k, t, d: by_papermill(k, yaml.safe_load(t)),
    "Python": lambda k, t, d: by_python(k, t),
}
NO = "refused"
# papermill's -p makes the number 1.0 of it before we see it
ELSE = {("papermill -p", "seed", "1e0"): 1}
# (setting, text, value): the text is what a user writes behind `=` or `:`; YAML's doors see what
# YAML makes of it
FORMS = [
    ("seed", "5", 5),
    ("seed", "'5'", 5),
    ("seed", "5.0", 5),
    ("seed", "1.5", NO),
    ("seed", "1e0", NO),
    ("seed", "yes", NO),
    ("seed", "null", NO),
    ("seed", "-1", NO),
    ("seed", "../x", NO),
    ("seed", "", NO),
    ("seed", "true", NO),
    ("n_train", "77", 77),
    ("n_train", "0", NO),
    ("n_train", "many", NO),
    ("epochs", "'2'", 2),
    ("epochs", "1.5", NO),
    ("epochs", "[1]", NO),
    ("lam_n", "1", NO),
    ("lr", "1e-4", 1e-4),
    ("lr", "1.0e-4", 1e-4),
    ("lr", "nan", NO),
    ("lr", ".nan", NO),
    ("lr", "-1", NO),
    ("lr", "inf", NO),
    ("lr", "1,5", NO),
    ("scale", "1", 1.0),
    ("scale", "1.0", 1.0),
    ("scale", "null", NO),
    ("scale", "{a: 1}", NO),
    ("lam", "0.50", 0.5),
    ("lam", "knee", "knee"),
    ("lam", "Level", "level"),
    ("lam", "1.2", NO),
    ("lam", "false", NO),
    ("strength", "rule", "rule"),
    ("strength", "much", NO),
    ("rank", "rule", "rule"),
    ("rank", "32", 32),
    ("rank", "0", NO),
    ("rho", "0.1", 0.1),
    ("rho", "x", NO),
    ("A", "false", False),
    ("A", "False", False),
    ("A", "0", False),
    ("A", "true", True),
    ("A", "2", NO),
    ("partition", "no", False),
    ("partition", "maybe", NO),
    ("merges", "TIES", ["TIES"]),
    ("merges", "TA,TIES", ["TA", "TIES"]),
    ("merges", '["ties"]', ["TIES"]),
    ("merges", "TA:scale=0.4", ["TA:scale=0.4"]),
    ("merges", "TA:scale=much", NO),
    ("merges", "TIS", NO),
    ("tasks", "[5]", NO),
    ("tasks", "letters,signs", ["letters", "signs"]),
    ("semantic", "[5e-1, 2.0]", [0.5, 2.0]),
    ("semantic", "2", [2.0]),
    ("semantic", "[]", NO),
    ("semantic", "[1, x]", NO),
    ("options", '{"TIES": {"density": 0.1}}', {"TIES": {"density": 0.1}}),
    ("options", '{"TIES": {"density": "0.1"}}', {"TIES": {"density": 0.1}}),
    ("options", '{"TIES": {"density": "much"}}', NO),
    ("options", "[1]", NO),
    ("target_class", "5", NO),
    ("lamda", "0.5", NO),
    ("N_Train", "77", 77),
    ("SEED", "x", NO),
    ("adversary", "LETTERS", "letters"),
    ("target_class", "Yield", "yield"),
    ("adversary", "letters,Letters", NO),
    ("merges", "Fisher:data=1", NO),
    ("merges", "TA:scale=.4:scale=.5", NO),
    ("options", '{"ties": {"density": 0.1}}', {"TIES": {"density": 0.1}}),
    ("options", '{"TIS": {"density": 0.1}}', NO),
    ("recompute", "Towers", "towers"),
    ("tasks", "Letters,signs", ["letters", "signs"]),
    ("merges", "TA,ta", NO),
    ("merges", "[]", NO),
    ("merges", "all,TA", NO),
    ("adversary", "[]", NO),
    ("adversary", '["letters"]', "letters"),
    ("options", '{"TIES": {"density": 0.1, "Density": 0.2}}', NO),
]


def through(door: str, k: str, text: str, folder):
    "The setting's value behind a door, or NO with one line that says why."
    try:
        P = DOORS[door](
            k, text.strip("'") if door in ("shell -p", "papermill -p") else text, folder
        )
    except ValueError as e:
        assert str(e) and "\n" not in str(e), f"{door}: {e}"
        return NO
    return getattr(P, {n.lower(): own for n, own in spellings(MainParams).items()}[k.lower()])


@pytest.mark.parametrize("k, text, want", FORMS, ids=lambda x: str(x))
@pytest.mark.parametrize("door", DOORS)
def test_every_form_is_right_or_refused(door, k, text, want, tmp_path):
    got, want = through(door, k, text, tmp_path), ELSE.get((door, k, text), want)
    assert got == want and type(got) is type(want), f"{k}={text} by {door}: {got!r}"


def test_what_is_given_beats_the_preset_and_the_preset_beats_the_default():
    own = MainParams().n_train
    assert by_papermill("lam", 0.5).n_train == settings_of("main", "tiny").n_train != own
    assert by_papermill("n_train", own).n_train == own, (
        "a value that equals the default was given all the same"
    )


def test_papermill_refuses_what_it_would_only_warn_of():
    with pytest.raises(ValueError, match="unknown parameter of main 'lamda'; did you mean 'lam'"):
        by_papermill("lamda", 3)


@pytest.mark.parametrize("k", ["preset", "out_dir", "experiment"])
def test_what_is_no_setting_says_where_it_goes(k):
    with pytest.raises(ValueError, match=f"{k} of main is none of its settings.*--preset"):
        settings_of("main", given={k: "tiny"})


def test_a_changed_cell_counts_as_given():
    ns = {}
    exec(cell_of("main").replace("n_train: int = 2500", "n_train: int = 77"), ns)
    assert here("main", ns | dict(preset="tiny")).settings.n_train == 77


@pytest.mark.parametrize("name", sorted(RUNS))
def test_every_run_takes_presets_and_text(name):
    ns = {}
    exec(cell_of(name), ns)
    injected = '# Parameters\nseed = "3"\npreset = "tiny"\n'
    exec(injected, ns)
    plan = here(name, ns | dict(In=[injected]))
    assert plan.settings == settings_of(name, "tiny", dict(seed=3))
    assert plan.config == planned(name, "tiny").config


def test_an_experiment_by_its_name_in_the_notebook():
    ns = {}
    exec(cell_of("main"), ns)
    assert (
        here("main", ns | dict(experiment="lobam", preset="tiny")).config
        == planned("lobam", "tiny").config
    )
    with pytest.raises(ValueError, match="ctl is a run of ctl.ipynb, not of main.ipynb"):
        here("main", ns | dict(experiment="ctl"))


def test_python_values_of_every_kind():
    same = [dict(n_train=77), dict(n_train=np.int64(77)), dict(n_train=77.0), dict(n_train="77")]
    assert len({config_hash("main", MainParams(**s)) for s in same}) == 1
    same = [dict(semantic=(1, 2)), dict(semantic=np.array([1, 2])), dict(semantic=[1.0, "2"])]
    assert len({config_hash("main", MainParams(**s)) for s in same}) == 1
    assert settings_of("ctl", given=dict(defences=("LFPM", "SAM"))).defences == ["LFPM", "SAM"]
    assert settings_of("purify", given=dict(shadow=Path("pictures"))).shadow == "pictures"


@given(
    st.one_of(
        st.integers(),
        st.floats(),
        st.text(max_size=6),
        st.none(),
        st.booleans(),
        st.lists(st.integers(), max_size=2),
    )
)
def test_a_seed_is_a_whole_number_or_refused(value):
    try:
        got = MainParams(seed=value).seed
    except ValueError:
        return
    assert type(got) is int and got >= 0
    assert not isinstance(value, bool)
    assert float(value) == got


@given(
    st.dictionaries(
        st.sampled_from(sorted(spellings(MainParams))),
        st.one_of(st.integers(-3, 3), st.floats(), st.text(max_size=8), st.none(), st.booleans()),
        max_size=3,
    )
)
def test_settings_survive_their_own_values(values):
    """Whatever is accepted is accepted again as it came out, with the same hash.

    Results say what they were made of."""
    try:
        P = settings_of("main", "tiny", values)
    except (ValueError, FileNotFoundError) as e:  # a plugin is a file, and text names none here
        assert "\n" not in str(e)
        return
    again = settings_of("main", "tiny", asdict(P))
    assert again == P
    assert content(again) == content(P)


def content(P):
    return json.dumps(asdict(P), sort_keys=True)


# --- sweeps -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, why",
    [
        ("runs: [{run: main, grid: {epochs: [1.5]}}]", "epochs is 1.5; expected a whole number"),
        ("runs: [{run: main, grid: {scale: [null]}}]", "scale is None; expected a finite number"),
        ("runs: [{run: main, grid: {scale: [1, 1.0]}}]", "are the same run"),
        ("runs: [{run: main, seeds: [5, '5']}]", "are the same run"),
        ("runs: [{run: main, grid: [1]}]", r"grid of main is \[1\]; expected"),
        (
            "runs: [{run: main, grid: {tasks: [[5]]}}]",
            r"tasks\[0\] is 5; expected at least one name",
        ),
        ("seeds: [1e0]\nruns: [main]", "seed is '1e0'"),
        ("seeds: [yes]\nruns: [main]", "seed is True"),
        ("seeds: ['../../x']\nruns: [main]", "seed is '../../x'"),
        ("seeds: 5\nruns: [main]", "seeds of main is 5; expected a list"),
        ("seeds: [0]\nseeds: [1]\nruns: [main]", "seeds is given twice, line 1"),
        ("runs: [{run: main, grid: {scale: [0.2], scale: [0.4]}}]", "scale is given twice"),
        ("runs: &a [*a]", "an alias lies within itself"),
        ("runs: [{run: [x]}]", r"run in .* is \['x'\]; expected text"),
        ("preset: {a: b}\nruns: [main]", "preset of main is"),
        ("runs: [{run: main, grid: {seed: [5]}}]", "write seeds: "),
    ],
)
def test_a_sweep_is_checked_when_it_is_read(tmp_path, text, why):
    file = tmp_path / "x.yaml"
    file.write_text(text if "preset" in text else f"preset: tiny\n{text}", encoding="utf-8")
    with pytest.raises(ValueError, match=why) as e:
        read_sweep(file)
    assert "\n" not in str(e.value) and len(str(e.value)) < 2000


def test_an_alias_bomb_is_refused_at_once(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{n}: &{n} [{', '.join([f'*{m}'] * 9)}]" for m, n in zip("abcdefgh", "bcdefghi")]
    file = tmp_path / "bomb.yaml"
    file.write_text("\n".join([*lines, "runs: [*i]"]), encoding="utf-8")
    with pytest.raises(ValueError, match="unfold to more than 100,000 values"):
        read_sweep(file)
    file.write_text(
        "x: &x [0, 1]\nruns: [{run: main, seeds: *x}]".replace(
            "x: &x [0, 1]\n", "seeds: &x [0, 1]\n"
        ),
        encoding="utf-8",
    )
    assert [p.seed for p in read_sweep(file)[1]] == [0, 1], "an ordinary alias is fine"


def test_a_seed_never_names_a_folder_outside(tmp_path, monkeypatch):
    monkeypatch.setenv("LFPM_RUNS", str(tmp_path / "runs"))
    assert planned("main", "tiny", seed="5").out == planned("main", "tiny", seed=5).out
    assert planned("main", "tiny", seed="5").out.parent == (tmp_path / "runs" / "main").resolve()


# --- methods of one's own -----------------------------------------------------------------------

PLUGIN = """
from lfpm_nb.merge import merges
from lfpm_nb.path import lam_rules

HALF = 0.5

def shrink(x): return HALF * x

@merges.register("half", long="Half of the first vector", needs=("pretrained",), source="a test")
def half(base, models, share: float = 1.0):
    return {k: b + share * shrink(models[0][k] - b) for k, b in base.items()}
"""


@pytest.fixture(autouse=True)
def registries():
    "Every test leaves the registries as it found them."
    before = [(r, dict(r)) for r in (merges, attacks, defences, lam_rules, knobs)]
    yield
    for r, had in before:
        r.clear()
        r.update(had)


@pytest.fixture
def plugin(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN, encoding="utf-8")
    return file


def test_a_plugins_content_is_part_of_the_configuration(plugin):
    given = dict(plugins=str(plugin), merges="half:share=0.5")
    one = planned("main", "tiny", given)
    assert one.settings.merges == ["half:share=0.5"]
    plugin.write_text(PLUGIN + "# a comment\n", encoding="utf-8")
    assert planned("main", "tiny", given).config == one.config
    plugin.write_text(PLUGIN.replace("0.5\n", "0.25\n"), encoding="utf-8")
    assert planned("main", "tiny", given).config != one.config
    other = plugin.with_name("elsewhere")
    other.mkdir()
    moved = plugin.rename(other / plugin.name)
    moved.write_text(PLUGIN, encoding="utf-8")
    assert planned("main", "tiny", given | dict(plugins=moved)).config == one.config, (
        "its place does not matter"
    )


def test_a_file_that_a_plugin_imports_counts_too(plugin, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    helper = tmp_path / "helper_of_a_plugin.py"
    helper.write_text("K = 1", encoding="utf-8")
    plugin.write_text("import helper_of_a_plugin\n" + PLUGIN, encoding="utf-8")
    one = planned("main", "tiny", dict(plugins=plugin)).config
    helper.write_text("K = 2", encoding="utf-8")
    assert planned("main", "tiny", dict(plugins=plugin)).config != one


def test_a_stage_knows_what_a_method_of_ones_own_uses(plugin):
    settings_of("main", "tiny", dict(plugins=plugin))
    one = code_hash(merges["half"]["f"])
    plugin.write_text(PLUGIN.replace("HALF * x", "HALF * x + 1"), encoding="utf-8")
    settings_of("main", "tiny", dict(plugins=plugin))
    assert code_hash(merges["half"]["f"]) != one


def test_a_run_is_offered_its_own_plugins_and_no_other(plugin):
    plain = MainParams(merges="all").merges
    assert MainParams(plugins=[plugin], merges="all").merges == [*plain, "half"]
    assert MainParams(merges="all").merges == plain
    with pytest.raises(ValueError, match="unknown merge 'half'"):
        MainParams(merges=["half"])


def test_two_files_of_one_name_take_turns(plugin, tmp_path):
    other = tmp_path / "other" / plugin.name
    other.parent.mkdir()
    other.write_text(
        PLUGIN.replace("share: float", "part: float").replace("share *", "part *"), encoding="utf-8"
    )
    for _ in range(2):
        assert MainParams(plugins=[plugin], merges=["half:share=1"]).merges == ["half:share=1.0"]
        assert MainParams(plugins=[other], merges=["half:part=1"]).merges == ["half:part=1.0"]
    with pytest.raises(ValueError, match="two plugins register half"):
        MainParams(plugins=[plugin, other])


def test_a_renamed_method_leaves_no_ghost(plugin):
    MainParams(plugins=[plugin], merges=["half"])
    plugin.write_text(PLUGIN.replace('"half", l', '"halves", l'), encoding="utf-8")
    assert MainParams(plugins=[plugin], merges=["halves"]).merges == ["halves"]
    with pytest.raises(ValueError, match="did you mean 'halves'"):
        MainParams(plugins=[plugin], merges=["half"])


@pytest.mark.parametrize(
    "text, why",
    [
        ("x = 1 / 0", "failed while it was imported: ZeroDivisionError"),
        ("def (", "SyntaxError"),
        (PLUGIN + "1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(0)", "failed while it was imported: SystemExit"),
        (PLUGIN.replace('"half", l', '"ta", l'), "registers ta, which"),
        (PLUGIN.replace('"half", l', '"all", l'), "cannot be called 'all'"),
        (
            PLUGIN + "import functools\n"
            "merges.register('part', long='x')(functools.partial(half, share=2))",
            "expected a function",
        ),
        (PLUGIN.replace('"half", l', '"TA", l'), "registers TA, which is registered already"),
        (PLUGIN + "from lfpm_nb.defend import knobs\nknobs['LFPM'] = None", None),
        (PLUGIN + "del merges['TA']", None),
    ],
)
def test_bad_plugins_change_nothing(tmp_path, text, why):
    before = [dict(r) for r in (merges, attacks, defences, lam_rules, knobs)]
    file = tmp_path / "bad.py"
    file.write_text(text, encoding="utf-8")
    if why:
        with pytest.raises(ValueError, match=why):
            settings_of("main", "tiny", dict(plugins=file))
    else:
        settings_of("main", "tiny", dict(plugins=file))
    merges.pop("half", None)
    assert [dict(r) for r in (merges, attacks, defences, lam_rules, knobs)] == before


def test_a_plugin_that_is_not_there():
    with pytest.raises(
        FileNotFoundError, match="no plugin at .*nothing.py; expected a Python file"
    ):
        settings_of("main", given=dict(plugins="nothing.py"))


@pytest.mark.parametrize(
    "name, given, why",
    [
        ("ctl", dict(defences="LFPMM"), "did you mean 'LFPM'"),
        ("ctl", dict(lab="labb"), "unknown recorded lab"),
        ("efficiency", dict(methods="SAMM"), "did you mean 'SAM'"),
        ("pretrain", dict(data="reel"), "did you mean 'real'"),
    ],
)
def test_other_runs_know_their_names(name, given, why):
    with pytest.raises(ValueError, match=why):
        settings_of(name, "tiny", given)


if __name__ == "__main__":
    import tempfile

    print("| setting | text | " + " | ".join(DOORS) + " |\n" + "|---" * (2 + len(DOORS)) + "|")
    counts = dict(right=0, refused=0, wrong=0)
    for k, text, want in FORMS:
        got = [through(d, k, text, tempfile.mkdtemp()) for d in DOORS]
        due = [ELSE.get((d, k, text), want) for d in DOORS]
        said = ["wrong" if g != w else "refused" if g == NO else "right" for g, w in zip(got, due)]
        for s in said:
            counts[s] += 1
        print(f"| {k} | `{text}` | " + " | ".join(said) + " |")
    print(
        f"\n{len(FORMS)} forms, {len(DOORS)} doors:",
        ", ".join(f"{n} {s}" for s, n in counts.items()),
    )
