"""Verdicts turn when the numbers turn, printed tables are read as printed.

And the page is whole or not there."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from lfpm_nb import report
from lfpm_nb.cli import app, main
from lfpm_nb.core import write_json
from lfpm_nb.runs import finish
from lfpm_nb.report import (
    RIVALS,
    SOURCES,
    VERDICTS,
    Chart,
    Claim,
    Mark,
    Report,
    Results,
    beside,
    chart_merges,
    claims,
    figures,
    gather,
    html_table,
    judge,
    judge_paper,
    load_paper,
    lower,
    ours_beside,
    over_seeds,
    paper_frames,
    paper_table,
    results_of,
    slips,
    spread,
    swapped,
    write_report,
)
from test_browser import CHROMIUM, browser, page, shot  # noqa: F401  fixtures

ROOT = Path(__file__).resolve().parent.parent


# --- a world in which every claim holds ---------------------------------------------------------


def rows(values: dict, **also) -> pd.DataFrame:
    "{(method, metric): value} as tidy average rows of one seed."
    return pd.DataFrame(
        [
            dict(
                method=m, kind="model", lam=np.nan, task="average", metric=k, value=v, n=100, seed=0
            )
            | also
            for (m, k), v in values.items()
        ]
    )


def path(method: str, ca: list, asr: list) -> pd.DataFrame:
    lam = np.linspace(0, 1, len(ca))
    return pd.concat(
        [
            rows({(method, k): v}, kind="path", lam=l)
            for k, vs in (("CA", ca), ("ASR_T", asr))
            for l, v in zip(lam, vs)
        ]
        + [rows({(method, "lam"): 1.0}, kind="summary", lam=1.0)]
    )


def ideal(seeds=(0, 1, 2)) -> dict[str, pd.DataFrame]:
    """The papers' own tables, with what they do not print made up in their favour.

    For several seeds that differ a little."""
    f = paper_frames()
    safe = rows(
        {(m, "path_ASR"): v for m, v in dict(LFPM=10, PAM=20, SAM=25, SAU=60, IBVS=80).items()},
        kind="summary",
    )
    costs = f["rivals"][f["rivals"].metric == "seconds"].assign(
        metric="cpu_seconds", kind="summary"
    )
    paths = [path("LFPM", [70, 70, 70], [98, 40, 0.5])] + [
        path(m, [70, 60, 40], [98, 50, 1]) for m in RIVALS
    ]
    more = {
        "main": [rows({("TA (clean)", "ASR_T"): 1})],
        "rivals": [safe, costs, *paths],
        "lobam": [safe],
        "sequence2": [safe],
        "sequence3": [safe],
        "merging": [
            rows(
                {(m + c, "ASR_T"): v for m in report.LEARNT for c, v in (("", 80), (" (clean)", 1))}
                | {("DAM", "ASR_T"): 2, ("DAM (clean)", "ASR_T"): 1, ("TA", "ASR_T"): 98}
            )
        ],
        "efficiency": [rows({("fine-tuning", "seconds"): 300})],
        "dam_two": [
            rows(
                {
                    ("DAM", "cpu_seconds"): 35,
                    ("individual (clean)", "ASR_T"): 1,
                    ("individual", "ASR_N"): 20,
                }
            )
        ],
        "dam_two_defended": [
            rows({(d, "cpu_seconds"): v for d, v in dict(ANP=40, AWM=50, SAU=60).items()})
        ],
        "curvature": [
            pd.concat(
                [
                    rows({("fine-tuning", "E_over_delta"): v}, kind="curvature prompted", epoch=e)
                    for e, v in ((0, 1), (5, 2))
                ]
            )
        ],
    }
    f["ctl"] = pd.concat(
        [
            rows({(m, "coefficient"): v}, kind=k, block="feature", lam=0.5)
            for k in ("ctl clean", "ctl prompted")
            for m, v in (("four steps", 1.0), ("LFPM", 0.5))
        ]
    )
    f["main"].loc[(f["main"].method == "LFPM") & (f["main"].metric == "CA"), "value"] = (
        55  # B + C; Table 1's LFPM is A + B + C
    )
    f = {k: pd.concat([df, *more.get(k, [])], ignore_index=True) for k, df in f.items()}
    return {
        k: pd.concat(
            [df.assign(seed=s, value=df.value * (1 + 0.001 * s)) for s in seeds], ignore_index=True
        )
        for k, df in f.items()
    }


@pytest.fixture(scope="module")
def world():
    return ideal()


def test_registry():
    assert len(claims) >= 20 and {c.paper for c in claims.values()} == {"LFPM", "DAM"}
    assert all(n in SOURCES for c in claims.values() for n in c.needs)
    assert all(
        c.text and c.words and c.where and c.sense in (-1, 1) and re.search(r"Table|Fig", c.where)
        for c in claims.values()
    )
    with pytest.raises(ValueError, match="two claims are called path"):
        report.claim("path", "", "", (), "", None)


@pytest.mark.parametrize("id", claims)
def test_claim_holds_where_it_should_and_turns(world, id):
    c = claims[id]
    v = judge(c, world)
    assert v.verdict == "confirmed" and len(v.value) == 3 and v.parts, (v.value, v.why)
    if c.swap:
        assert judge(c, swapped(world, *c.swap)).verdict == "contradicted", (
            "exchanging two methods' rows refutes it"
        )
        one = {k: df[df.seed > 0] for k, df in world.items()}
        turned = swapped({k: df[df.seed == 0] for k, df in world.items()}, *c.swap)
        both = {k: pd.concat([one[k], turned[k]]) for k in world}
        assert judge(c, both).verdict == "contradicted", "one seed that fails is enough"
    missing = judge(c, {k: v for k, v in world.items() if k != c.needs[-1]})
    assert missing.verdict == "not testable here" and f"lfpm run {c.needs[-1]}" in missing.why
    assert (
        judge(c, {k: df[df.method == "nobody"] for k, df in world.items()}).verdict
        == "not testable here"
    )


def test_claims_without_a_rival_turn_too(world):
    """Claims about one method over time: played backwards they fail.

    No other claim goes without a swap."""
    assert {k for k, c in claims.items() if not c.swap} == {"delta-grows", "curvature-falls"}
    back = world["curvature"].assign(epoch=5 - world["curvature"].epoch)
    assert {
        judge(claims[k], world | dict(curvature=back)).verdict
        for k in ("delta-grows", "curvature-falls")
    } == {"contradicted"}


def test_pairing_by_seed():
    "LFPM lower on average but not in every seed; and a seed that lacks the rival has no say."
    frame = lambda lfpm, sam: pd.concat(
        [
            rows({(m, "ASR_T"): v}, seed=s)
            for m, vs in (("LFPM", lfpm), ("SAM", sam))
            for s, v in enumerate(vs)
        ]
    )
    c = Claim(
        "x",
        "",
        "LFPM Table 1",
        ("rivals",),
        "",
        lambda f: lower(f["rivals"], "LFPM", ["SAM"], "ASR_T"),
    )
    assert judge(c, dict(rivals=frame([1, 1, 9], [20, 20, 8]))).verdict == "contradicted"
    short = judge(c, dict(rivals=frame([1, 1, 9], [20, 20])))
    assert short.verdict == "confirmed" and list(short.value.index) == [0, 1]
    assert judge(c, dict(rivals=frame([1], [1]))).verdict == "contradicted", "equal is not lower"


def test_papers_own_tables():
    """No claim is refuted by the very table it is taken from.

    What the papers print as figures only cannot be judged."""
    printed = paper_frames()
    own = {k: judge_paper(c, printed) for k, c in claims.items()}
    assert [k for k, v in own.items() if v.verdict == "contradicted"] == []
    assert sum(v.verdict == "confirmed" for v in own.values()) >= 40
    assert own["equal-asr"].value.item() == pytest.approx(11.95) and own["adaptive-rise"].parts[
        "LFPM rises by"
    ].item() == pytest.approx(1.89)


# --- printed tables -----------------------------------------------------------------------------


def test_printed_numbers():
    p = load_paper()
    assert list(p.columns) == [
        "paper",
        "table",
        "attack",
        "finetuning",
        "sequence",
        "backbone",
        "method",
        "task",
        "metric",
        "value",
        "unit",
        "slip",
    ]
    assert (
        p.value.notna().all()
        and not p.duplicated([c for c in p if c not in ("value", "slip")]).any()
    )
    rate = p[p.unit == "%"].value
    assert (
        rate.between(0, 100).all() and (ROOT / "data" / "paper" / "tables.csv").stat().st_size < 1e6
    )
    assert set(p[(p.paper == "LFPM") & (p.table == 1)].method) == {
        "individual",
        "TA",
        "IBVS",
        "SAU",
        "SAM",
        "PAM",
        "LFPM",
    }
    assert "arXiv 2606.12498" in (ROOT / "data" / "paper" / "README.md").read_text(encoding="utf-8")


def test_slips_found():
    p = load_paper()
    found = {
        (r.paper, r.table, r.method, r.metric): round(r.slip, 2)
        for r in p[p.slip.notna()].itertuples()
    }
    assert (
        found["LFPM", 1, "LFPM", "ASR_N"] == 11.72
        and found["LFPM", 1, "individual", "ASR_N"] == 50.84
        and found["LFPM", 16, "A + C", "ASR_N"] == 21.13
    )
    assert ("LFPM", 1, "PAM", "ASR_N") not in found and ("LFPM", 1, "LFPM", "CA") not in found
    moved = p.drop(columns="slip").copy()
    i = moved[
        (moved.paper == "DAM")
        & (moved.table == 2)
        & (moved.method == "DAM")
        & (moved.task == "poisoned tasks")
        & (moved.metric == "ASR")
    ].index[0]
    moved.loc[i, "value"] += 0.1
    assert len(slips(moved)) == p.slip.notna().sum() + 1
    assert len(slips(moved, within=100)) == 0


def test_paper_table():
    t = paper_table(1)
    assert (
        t.loc["LFPM", ("average", "ASR_N")] == "9.85 †11.72"
        and t.loc["TA", ("Cars196", "ASR_T")] == "98.42"
        and t.loc["TA", ("average", "CA")] == "63.62"
    )
    assert len(paper_table(4, "DAM")) == 4, "two settings of two methods"
    with pytest.raises(ValueError, match="LFPM Table 99 is not in data/paper; known: 1, 2, 3"):
        paper_table(99)
    with pytest.raises(ValueError, match="unknown paper 'PAM'"):
        paper_table(1, "PAM")


# --- results on disk ----------------------------------------------------------------------------


def made_up(
    root,
    name="main",
    seed=0,
    config="aaaa1111",
    started="2026-01-01 10:00:00",
    preset="lab",
    state="done",
    df=None,
):
    f = Path(root) / name / f"{preset}-s{seed}-{config}"
    f.mkdir(parents=True)
    if df is None:
        df = rows(
            {
                (m, k): v + seed
                for m, vs in {
                    "individual": (95, 1, 20),
                    "TA": (72, 90, 50),
                    "TA (clean)": (75, 1, 20),
                    "LFPM": (74, 3, 30),
                }.items()
                for k, v in zip(("CA", "ASR_T", "ASR_N"), vs)
            }
        )
    df.assign(seed=seed).to_parquet(f / "metrics.parquet")
    write_json(f / "params.json", dict(versions=dict(torch="2.9")))
    said = dict(preset=preset, config=config, seed=seed, seconds=90.0, started=started)
    if state == "done":
        finish(f, **said)
    else:
        write_json(f / "status.json", dict(state=state, error="ValueError: no\nmore", **said))
    return f


def test_a_note_in_a_status_stands_beside_its_numbers(tmp_path):
    f, other = made_up(tmp_path), made_up(tmp_path, "lobam")
    write_json(
        f / "status.json",
        json.loads((f / "status.json").read_text(encoding="utf-8"))
        | dict(note="made by hand <at night>"),
    )
    report = Report.of("lab", [tmp_path])
    page = report.markdown({name: {} for name in report.found})
    assert (
        page.count("seeds 0; made by hand <at night>.") == 1
        and page.count("configuration aaaa1111, seeds 0.") == 1
    )
    assert "made by hand &lt;at night&gt;" in report.section(
        report.found["main"], {}
    ) and "by hand" not in report.section(report.found["lobam"], {})


def test_newest_configuration_counts_and_others_are_named(tmp_path):
    made_up(tmp_path, seed=0, config="old00000", started="2026-01-01 10:00:00")
    made_up(tmp_path, seed=1, config="old00000", started="2026-01-01 11:00:00")
    new = made_up(tmp_path, seed=0, config="new00000", started="2026-02-01 10:00:00")
    for f in new.iterdir():
        os.utime(f, (1, 1))  # file times say nothing: a clone makes every file at once
    r = results_of("main", roots=[tmp_path])
    assert (r.config, r.seeds, r.seconds) == ("new00000", [0], 90.0) and {
        c: len(f) for c, f in r.others.items()
    } == {"old00000": 2}
    assert r.command == ["lfpm run main --preset lab --seed 0"]
    assert any("old00000 (2 runs)" in w for w in Report.of("lab", [tmp_path]).warnings())


def test_half_written_folders_are_skipped_and_named(tmp_path):
    made_up(tmp_path, seed=0)
    (tmp_path / "main" / "lab-s1-aaaa1111").mkdir()
    made_up(tmp_path, seed=2, state="failed")
    for seed, name, text in (
        (3, "metrics.parquet", b"PAR1 cut"),
        (4, "status.json", b'{"state": "do'),
        (5, "params.json", b"{"),
    ):
        (made_up(tmp_path, seed=seed) / name).write_bytes(text)
    (made_up(tmp_path, seed=6) / "metrics.parquet").unlink()
    write_json(made_up(tmp_path, seed=9) / "params.json", ["a list"])
    made_up(tmp_path, seed=7, df=pd.DataFrame(dict(a=[1])))
    made_up(tmp_path, seed=8, preset="tiny")
    (tmp_path / "mian").mkdir()
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "cache").mkdir()
    found, left = gather("lab", [tmp_path])
    assert found["main"].seeds == [0]
    why = {k.split("-")[1] if "/" in k else k: v for k, v in left.items()}
    assert set(why) == {"s1", "s2", "s3", "s4", "s5", "s6", "s7", "s9", "mian"}
    assert (
        why["s2"] == "failed: ValueError: no"
        and why["mian"].startswith("unknown experiment")
        and all("half-written" in why[f"s{i}"] for i in (1, 4, 5, 7, 9))
    )
    assert "is damaged" in why["s3"] and "no file" in why["s6"]


def test_the_command_goes_on_without_what_is_broken(lfpm, dirs):
    """Each broken folder is named with the reason.

    Without a good one left there is nothing to report but what was left out."""
    good, *bad = [made_up(dirs / "runs", seed=seed) for seed in range(5)]
    for f, name, text in zip(
        bad,
        ("status.json", "metrics.parquet", "params.json", "status.json"),
        ("[]", "PAR1", "3", '{"state": "done"}'),
    ):
        (f / name).write_text(text, encoding="utf-8")
    (dirs / "runs" / "unheard of").mkdir()
    (dirs / "runs" / "lobam").write_text("no folder", encoding="utf-8")
    code, out, err = lfpm("report")
    assert code == 0 and err == "" and (dirs / "runs" / "report" / "report.html").exists(), err
    named = [l for l in out.splitlines() if l.startswith("- main/")]
    assert [l.split(": ")[0] for l in named] == [
        f"- main/{f.name}" for f in bad
    ] and "unheard of: unknown experiment" in out
    assert [any(w in l for w in ("half-written", "damaged")) for l in named] == [True] * 4, named


def test_unknown_and_missing_experiments(tmp_path):
    with pytest.raises(ValueError, match="unknown experiment 'rival'; did you mean 'rivals'"):
        results_of("rival", roots=[tmp_path])
    with pytest.raises(
        FileNotFoundError,
        match="no finished run of lobam with preset lab; make one: lfpm run lobam --preset lab",
    ):
        ours_beside("lobam", roots=[tmp_path])
    (tmp_path / "lobam" / "lab-s0-x").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="lobam/lab-s0-x half-written"):
        results_of("lobam", roots=[tmp_path])


def test_own_runs_come_before_shipped_ones(tmp_path):
    made_up(tmp_path / "own", "main", config="own00000")
    made_up(tmp_path / "shipped", "main", config="shipped0", started="2027-01-01")
    made_up(tmp_path / "shipped", "lobam", config="shipped0")
    found, _ = gather("lab", [tmp_path / "own", tmp_path / "shipped"])
    assert {k: r.config for k, r in found.items()} == {"main": "own00000", "lobam": "shipped0"}


# --- tables and figures -------------------------------------------------------------------------


def test_ours_beside_theirs(tmp_path):
    for seed in (0, 1):
        made_up(tmp_path, seed=seed)
    t = ours_beside("main", roots=[tmp_path])
    assert (
        t.loc["TA", ("CA %", "ours")] == "72.5 ± 0.7"
        and t.loc["TA", ("CA %", "paper")] == "63.62"
        and t.loc["TA", ("seeds", "")] == "2"
    )
    assert t.loc["LFPM", ("ASR(N) %", "paper")] == "11.72", (
        "compared with the tasks' own mean, not with the slip"
    )
    assert t.loc["IBVS", ("CA %", "ours")] == "–" and t.loc["TA (clean)", ("CA %", "paper")] == "–"
    page = html_table(t)
    assert page.count("<tr class=clean>") == 1 and "<th colspan=2>CA %</th>" in page
    assert "&lt;b&gt;" in html_table(
        pd.DataFrame({"x": ["<b>"]}, index=["<i>"])
    ) and "<i>" not in html_table(pd.DataFrame({"x": ["<b>"]}, index=["<i>"]))


def test_spread():
    assert (
        spread(pd.Series([1.0, 3.0])) == "2.0 ± 1.4"
        and spread(pd.Series([0.5])) == "0.50"
        and spread(pd.Series([np.nan])) == "–"
        and spread(pd.Series([2000.0, 2001])) == "2000 ± 1"
    )


def results(name, df):
    return Results(name, "lab", df, "aaaa1111", [], 60.0, {})


def test_over_seeds():
    df = pd.concat([path("LFPM", [70, 60], [90, 10 * s]).assign(seed=s) for s in (0, 1)]).assign(
        lo=np.nan, hi=np.nan
    )
    df.loc[(df.kind == "summary") & (df.seed == 1), ["lam", "value"]] = 0.5
    mean = over_seeds(df)
    assert mean[
        (mean.kind == "path") & (mean.metric == "ASR_T") & (mean.lam == 1)
    ].value.tolist() == [5]
    assert mean[mean.kind == "summary"][["lam", "value"]].values.tolist() == [[0.75, 0.75]]


def test_figures_of_every_kind(world):
    printed = paper_frames()
    draw = lambda name, df: figures(results(name, df), printed.get(name))
    rivals = pd.concat(
        [
            world["rivals"].assign(lo=np.nan, hi=np.nan),
            rows({("TA (clean)", "ASR_T"): 1, ("TA (clean)", "CA"): 75}),
        ]
    )
    made = (
        draw("rivals", rivals)
        | draw("curvature", world["curvature"])
        | draw("ctl", world["ctl"])
        | draw(
            "merging",
            pd.concat(
                [world["merging"], rows({("TA (clean)", "ASR_T"): 1, ("SA (clean)", "ASR_T"): 1})]
            ),
        )
    )
    assert set(made) == {
        "rivals-scatter",
        "rivals-path",
        "curvature-curvature",
        "curvature-delta",
        "ctl-clean",
        "ctl-prompted",
        "merging",
    }
    assert all(fig.axes and live.data for fig, live, _ in made.values())
    scatter = made["rivals-scatter"][1]
    lfpm, theirs = (next(t for t in scatter.data if t.name == n) for n in ("LFPM", "LFPM, paper"))
    assert (
        len(lfpm.x) == 3
        and theirs.marker.symbol == lfpm.marker.symbol + "-open"
        and (theirs.x[0], theirs.y[0]) == (58.67, 0.49)
    )
    looks = [(t.marker.color, t.marker.symbol) for t in scatter.data]
    assert len(set(looks)) == len(looks)


def test_tables_of_every_kind(world):
    c = beside(results("curvature", world["curvature"]), paper_frames()["curvature"])
    assert c.loc["LFPM, epoch 5", ("E/‖Δ‖", "paper")] == "0.22"
    t = beside(
        results("ctl", pd.concat([world["ctl"], world["ctl"].assign(metric="cosine")])), None
    )
    assert t.loc["LFPM", ("clean pictures", "largest |coefficient − 1|")].startswith(
        "0.4"
    ) or t.loc["LFPM", ("clean pictures", "largest |coefficient − 1|")].startswith("0.5")


def test_bars_differ_by_more_than_colour():
    df = rows(
        {
            (m, "ASR_T"): v
            for m, v in {
                "TA": 96,
                "TA (clean)": 1,
                "LFPM": 2,
                "SA": 40,
                "SA (clean)": 1,
                "SA + LFPM": 7,
            }.items()
        }
    )
    chart = chart_merges(df)
    assert (
        chart.categories == ["TA", "SA"]
        and [m.x for m in chart.marks] == [[96, 40], [2, 7], [1, 1]]
        and len({m.bar for m in chart.marks}) == 3
    )
    assert len({t.marker.pattern.shape for t in chart.plotly().data}) == 3
    bare = chart_merges(df[~df.method.str.contains("LFPM")])
    assert [m.name for m in bare.marks] == ["poisoned merge", "clean merge, same trigger"], (
        "no bars of a defence that was not run"
    )
    main = pd.concat([df, rows({("LFPM (clean)", "ASR_T"): 1}), path("LFPM", [70, 60], [90, 1])])
    assert report.merges_of(main) == ["TA", "SA"], "a defence with a clean twin is no merge"


def test_charts_refuse_nothing_and_keep_order():
    c = Chart(
        "t", "x", "y", [Mark("a", [1, -50], ["p", "q"], "red")], symlog=True, categories=["p", "q"]
    )
    assert (
        list(c.plotly().layout.yaxis.categoryarray) == ["q", "p"]
        and c.mpl().axes[0].get_ylim()[0] > c.mpl().axes[0].get_ylim()[1]
    ), "first category on top in both"


# --- the page -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    d = tmp_path_factory.mktemp("report")
    for seed in (0, 1):
        made_up(d / "runs", "main", seed)
    (d / "runs" / "main" / "lab-s2-aaaa1111").mkdir()
    return d, write_report(d / "out", roots=[d / "runs"], gallery=d / "gallery")


def test_page_is_whole(written):
    d, file = written
    text = file.read_text(encoding="utf-8")
    assert text.count("plotly.js v") == 1 and not re.search(
        r"<(script|link|img|iframe)[^>]*(src|href)=['\"]?(https?:)?//", text
    )
    assert text.count('<section class="claim') == len(claims) and all(
        f'id="claim-{k}"' in text for k in claims
    )
    assert (
        "lfpm run main --preset lab --seed 1" in text
        and "main/lab-s2-aaaa1111: half-written: no status" in text
        and "torch 2.9" in text
        and "lfpm run rivals" in text
    )
    assert (
        all(f"{s} <b>" in text for s, _ in VERDICTS.values())
        and "9.85 †11.72" in text
        and not re.search(r"\{(style|script|body|notes)\}|\bnan\b(?=<)", text)
    )
    assert sorted(p.name for p in d.iterdir()) == ["gallery", "out", "runs"] and [
        p.name for p in (d / "out").iterdir()
    ] == ["report.html"]


def test_gallery(written):
    d, _ = written
    text = (d / "gallery" / "README.md").read_text(encoding="utf-8")
    assert (
        set(re.findall(r"\]\((\S+\.png)\)", text))
        == {p.name for p in (d / "gallery").glob("*.png")}
        >= {"claims.png"}
    )
    assert (
        "| TA | 72.5 ± 0.7 | 63.62 |" in text
        and sum(p.stat().st_size for p in (d / "gallery").iterdir()) < 5e6
    )
    (d / "gallery" / "stale.png").write_bytes(b"")
    write_report(d / "out", roots=[d / "runs"], gallery=d / "gallery")
    assert not (d / "gallery" / "stale.png").exists()


def test_nothing_half_written_stays(written, tmp_path, monkeypatch):
    d, _ = written
    says = "no finished run of any experiment with preset lab; make one: lfpm run main --preset lab"
    with pytest.raises(ValueError, match=says):
        write_report(tmp_path / "out", roots=[tmp_path])
    monkeypatch.setattr(report, "small_png", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    before = sorted(p.name for p in (d / "gallery").iterdir())
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path / "out", roots=[d / "runs"], gallery=d / "gallery")
    assert sorted(p.name for p in (d / "gallery").iterdir()) == before and sorted(
        p.name for p in d.iterdir()
    ) == ["gallery", "out", "runs"]


def test_command(dirs, monkeypatch, capsys):
    made_up(dirs / "runs", "main", 0)
    monkeypatch.setattr(
        report,
        "proj_path",
        lambda *parts: dirs / "nothing" if parts == ("data", "results") else ROOT.joinpath(*parts),
    )
    out = CliRunner().invoke(app, ["report", "--out", str(dirs / "page")])
    assert (
        out.exit_code == 0
        and f"{len(claims)} claims of two papers: 2 confirmed" in out.output
        and (dirs / "page" / "report.html").exists()
    ), out.output
    assert "--gallery" in CliRunner().invoke(app, ["report", "--help"]).output
    monkeypatch.setattr("lfpm_nb.cli.proj_path", lambda *parts: dirs.joinpath(*parts))
    assert (
        CliRunner().invoke(app, ["report", "--out", str(dirs / "page"), "--gallery"]).exit_code == 0
    )
    shutil.move(dirs / "runs" / "main", dirs / "lab")
    made_up(dirs / "runs", "main", 0, preset="small-real")
    assert (
        CliRunner()
        .invoke(app, ["report", "--out", str(dirs / "page"), "--preset", "small-real", "--gallery"])
        .exit_code
        == 0
    )
    for folder, preset in (("gallery", "lab"), ("gallery-small-real", "small-real")):
        assert f"--preset {preset} --gallery`" in (dirs / "data" / folder / "README.md").read_text(
            encoding="utf-8"
        ), "each preset has its own"
    monkeypatch.setattr("sys.argv", ["lfpm", "report", "--preset", "nosuch"])
    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code == 2 and "preset nosuch" in capsys.readouterr().err


# --- what was measured --------------------------------------------------------------------------


def test_known_findings(tmp_path):
    "The shipped rows, filed by what they ran, give the verdicts that the README states."
    for f in (ROOT / "data" / "results").glob("*/lab-*"):
        p = json.loads((f / "params.json").read_text(encoding="utf-8"))["params"]
        if (
            p.get("attack") != "badmerging"
            or p.get("prompt_kind", "tokens") != "tokens"
            or "," in p["adversary"]
            or not {"LFPM"} <= set(p["defences"])
            or p["A"]
            or not (p["B"] and p["C"])
            or p["lora"]
        ):
            continue
        name = (
            "rivals"
            if p["strength"] == "rule" and len(p["defences"]) > 10
            else "merging"
            if len(p["merges"]) > 10
            else "main"
            if p["strength"] == "default" and len(p["merges"]) == 1
            else None
        )
        if name and not (tmp_path / name / f.name).exists():
            shutil.copytree(f, tmp_path / name / f.name)
    v = Report.of("lab", [tmp_path]).verdicts
    assert v["path"].verdict == "confirmed" and len(v["path"].value) >= 3
    assert v["lowest-asr"].verdict == "confirmed" and v["survives"].verdict == "confirmed"
    assert (
        v["equal-asr"].verdict == "contradicted"
        and v["learnt-merges"].verdict == "contradicted"
        and v["dam-badmerging"].verdict == "contradicted"
    )


# --- in a browser -------------------------------------------------------------------------------


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: apt-get install chromium, then this test runs"
)
def test_page_in_a_browser(written, page):
    page.goto(f"file://{written[1]}")
    page.wait_for_selector(".js-plotly-plot .main-svg")
    cards = lambda: page.locator(".claim:visible").count()
    assert cards() == len(claims)
    for word in VERDICTS:
        button = page.locator(f".bar button[data-v='{word}']")
        button.click()
        assert (
            cards() == int(button.locator("b").inner_text())
            and button.get_attribute("aria-pressed") == "true"
        )
        assert set(page.locator(".claim:visible .v").all_inner_texts()) <= {
            f"{VERDICTS[word][0]} {word}"
        }
    page.locator(".bar button[data-v='all']").click()
    for width in (1280, 800):
        page.set_viewport_size(dict(width=width, height=900))
        page.wait_for_timeout(400)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
            f"the page is wider than {width} px"
        )
        assert len(page.screenshot()) > 20_000
    shot(page, "report")
    assert page.errors == []


def test_experiments_name_their_claims():
    from lfpm_nb.runs import experiments

    for n, e in experiments().items():
        assert e.claims == [c.id for c in claims.values() if n in c.needs], n
