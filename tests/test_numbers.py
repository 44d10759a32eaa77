"""Numbers in prose do not age.

Every sentence and table row below is written anew from data/results and must stand in its file,
letter by letter; line breaks do not matter. When a result changes, or a digit in the text, the test
names the file and prints the line as it should read: paste it. A new sentence with numbers joins by
one line here. Not covered: what earlier versions gave, which no file holds any more, and what was
measured outside a run."""

import functools
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from lfpm_nb.report import Report
from lfpm_nb.results import versus

ROOT = Path(__file__).resolve().parent.parent
README, PAGE = "README.md", "data/results/README.md"


# --- results, read without the kit's own tables -------------------------------------------------


@dataclass
class Runs:
    "The shipped rows of one experiment and preset."

    folder: Path
    name: str
    preset: str = "lab"
    config: str = "*"  # the digits that end a folder's name, where there are several

    def __post_init__(self):
        runs = f"{self.preset}-s*-{self.config}/metrics.parquet"
        files = sorted((self.folder / self.name).glob(runs))
        self.df = pd.concat([pd.read_parquet(f) for f in files], ignore_index=True)

    def all(self, method: str, metric: str = "ASR_T") -> pd.Series:
        "Values by seed of a model's or a path's average."
        d = self.df
        return (
            d[
                (d.method == method)
                & (d.metric == metric)
                & (d.task == "average")
                & d.kind.isin(["model", "summary"])
            ]
            .set_index("seed")
            .value.sort_index()
        )

    def __call__(self, method: str, metric: str = "ASR_T") -> float:
        return self.all(method, metric).mean()

    def n(self, method: str = "TA") -> int:
        d = self.df
        return int(
            d[
                (d.method == method)
                & (d.metric == "ASR_T")
                & (d.task == "average")
                & (d.kind == "model")
            ].n.iloc[0]
        )

    def least(self, method: str) -> pd.Series:
        "By seed: the lowest ASR(T) on its path where it is as accurate as LFPM at the rule's λ."
        path = self.df[(self.df.kind == "path") & (self.df.task == "average")].pivot_table(
            index=["method", "seed", "lam"], columns="metric", values="value"
        )
        out = {}
        for seed in self.all("TA").index:
            lfpm, own = path.loc["LFPM", seed], path.loc[method, seed]
            chosen = lfpm.CA.iloc[abs(lfpm.index - self.all("LFPM", "lam")[seed]).argmin()]
            out[seed] = own.ASR_T[own.CA >= chosen].min()
        return pd.Series(out)

    def rivals(self) -> list[str]:
        "Defences other than LFPM, the one that leaves the least first; clean twins are none."
        found = self.df[
            (self.df.metric == "path_ASR") & ~self.df.method.str.contains("LFPM|clean\\)")
        ].method.unique()
        return sorted(found, key=self)


def reader(folder: Path = ROOT / "data" / "results"):
    "`get(name, preset)` -> Runs, each read once."

    @functools.cache
    def get(name, preset="lab", config="*"):
        return Runs(folder, name, preset, config)

    return get


def f1(v: float) -> str:
    return f"{v:.1f}"


def f0(v: float) -> str:
    return f"{v:.0f}"


def signed(v: float) -> str:
    return f"{'−' if v < 0 else '+'}{f1(abs(v))}"


def span(v, f=f0) -> str:
    return f"{f(min(v))} to {f(max(v))}"


def several(v, f=f1) -> str:
    return ", ".join(map(f, v))


def listed(v, f=f1) -> str:
    return f"{several(list(v)[:-1], f)} and {f(list(v)[-1])}"


def spread(v: pd.Series, d: int = 1) -> str:
    return f"{v.mean():.{d}f} ± {v.std():.{d}f}" if len(v) else "–"


def row(*cells) -> str:
    return f"| {' | '.join(cells)} |"


# --- what must stand where ----------------------------------------------------------------------


def readme(get) -> list[str]:
    "README's table, cell by cell, and the numbers in its sentences."
    main, rivals, real = get("main"), get("rivals"), get("main", "small-real")

    def line(name, r, extra=None):
        best = r.rivals()[0]
        beside = extra or f"{best} {f1(r(best))} ({f1(r(best, 'CA'))})"
        return row(
            name,
            *(f"{f1(r(m))} ({f1(r(m, 'CA'))})" for m in ("TA (clean)", "TA")),
            f"**{f1(r('LFPM'))}** ({f1(r('LFPM', 'CA'))})",
            beside,
        )

    best = rivals.rivals()[0]
    where = (
        f"{best} {f1(rivals(best))} ({f1(rivals(best, 'CA'))}), where LFPM has {f1(rivals('LFPM'))}"
        f" ({f1(rivals('LFPM', 'CA'))}): seeds 0, 1, 2, strengths by rule"
    )
    two, seen = get("multi_adversary"), get("pictures")
    gain = {
        c: (seen.all(f"LFPM{c}", "CA") - seen.all("TA (clean)", "CA")).mean()
        for c in ("", " (clean)")
    }
    picture = (
        f"It is then {f1(gain[''])} points more accurate than the merge of clean models, and on "
        "that"
        f" one it gains {f1(gain[' (clean)'])} (means of three seeds). Rivals win by the same "
        "picture:"
        f" PAM and fine-tuning keep {f1(seen('PAM', 'CA') - seen('LFPM', 'CA'))} and"
        f" {f1(seen('fine-tuning', 'CA') - seen('LFPM', 'CA'))} points more; LFPM's path is the "
        "safest"
        f" (Path-ASR {f0(seen('LFPM', 'path_ASR'))} against {f0(seen('PAM', 'path_ASR'))} and"
        f" {f0(seen('fine-tuning', 'path_ASR'))} %)."
    )
    cost = {
        p: r.all("TA (clean)", "CA") - r.all("LFPM (clean)", "CA")
        for p, r in (("lab", main), ("real", real))
    }
    often, once = sorted(pd.concat(cost.values()))[-2:]
    return [
        (
            f"n = {main.n():,} pictures a seed (two attackers: {two.n():,}, real pictures:"
            f" {real.n():,})"
        ),
        line(f"lab, {len(main.all('TA'))} seeds", main, where),
        line(f"lab, a picture as prompt, {len(seen.all('TA'))} seeds", seen),
        line("lab, LoBAM: everybody trains adapters, 1 seed", get("lobam")),
        line("lab, an attacker who knows LFPM, 1 seed", get("adaptive")),
        line("lab, two attackers, 1 seed", two),
        line(f"real pictures, {len(real.all('TA'))} seeds", real),
        picture,
        f"On a clean merge LFPM can cost {f0(often)} points, once {f0(once)}.",
    ]


RIVALS = {
    "PAM-prompt": "PAM, prompted images alone",
    "SAM-prompt": "SAM, prompted images alone",
    "fine-tuning-clean": "fine-tuning without prompts",
}
MERGES = {
    "ConcreteTA": "Concrete TA",
    "AdaTask": "AdaMerging task-wise",
    "AdaLayer": "AdaMerging layer-wise",
    "ConcreteTask": "Concrete AdaMerging task-wise",
    "ConcreteLayer": "Concrete AdaMerging layer-wise",
}


def table(r, methods: list[str]) -> list[str]:
    "Rows of a run's own table: mean and standard deviation over its seeds."
    metrics = ("CA", "ASR_T", "ASR_N", "path_ASR", "CA_end", "ASR_end", "lam")
    of = lambda m: [spread(r.all(m, k), 2 if k == "lam" else 1) for k in metrics]
    return [row(m, *of(m)) for m in methods]


MAIN_ROWS = ["TA (clean)", "TA", "fine-tuning", "LFPM", "LFPM (clean)"]


def main_run(get) -> list[str]:
    "The first table of the results page, and what is said of its seeds."
    r = get("main")
    out = table(r, ["individual (clean)", "individual", "letters alone, poisoned", *MAIN_ROWS])
    ta, lfpm, tuned = r.all("TA"), r.all("LFPM"), r.all("fine-tuning")
    dirty, clean = (r.all(f"LFPM{c}", "CA") - r.all(f"TA{c}", "CA") for c in ("", " (clean)"))
    changes = [signed(v) if abs(v) < 5 else f"**{signed(v)}**" for v in clean]
    now = [f1(v) if v < 35 or v > 36 else f"**{f1(v)}**" for v in tuned]
    floors = [span(r.all("TA", k), f1) for k in ("floor_none", "floor_grey")]
    return out + [
        f"Seeds {', '.join(map(str, ta.index))} (mean ± standard deviation over seeds)",
        f"ASR(T): {r.n():,} non-target signs a seed",
        f'without a trigger {floors[0]} %, under a grey patch {floors[1]} % become "yield"',
        (
            f"survives the merge ({span(ta)} %) although the same trigger does next to nothing to a"
            f" merge of clean models ({f1(r.all('TA (clean)').max())} % at most)"
        ),
        (
            f"LFPM leaves {listed(lfpm)} % (seeds {', '.join(map(str, ta.index))}); clean accuracy"
            f" changes by {signed(dirty.min())} to {signed(dirty.max())} points"
        ),
        f"and where there was no poison by {', '.join(changes[:-1])} and {changes[-1]}:",
        (
            f"leaves {span(tuned)} % at the λ the same rule gives it, and its path is far less"
            f" safe (Path-ASR {f0(r('fine-tuning', 'path_ASR'))} against "
            f"{f0(r('LFPM', 'path_ASR'))} %)"
        ),
        (
            f"At its own λ = 1 it leaves {f0(r('fine-tuning', 'ASR_end'))} % on average with"
            f" {f0(r('fine-tuning', 'CA_end'))} % clean accuracy"
        ),
        f"(now {several(lfpm)})",
        f"(now {', '.join(now)})",
        f"At λ = 1 LFPM's clean accuracy is {f0(r('LFPM', 'CA_end'))} %",
        (
            f"stays at {f0(r('LFPM', 'ASR_N'))} %, above the clean merge's"
            f" {f0(r('TA (clean)', 'ASR_N'))} %"
        ),
    ]


def pictures(get) -> list[str]:
    "Stage I with a picture, judged on seeds that nobody had seen."
    r = get("pictures")
    lfpm, before = r.all("LFPM"), r.all("TA (clean)", "CA")
    more, clean = (several(r.all(m, "CA") - before, signed) for m in ("LFPM", "LFPM (clean)"))
    return table(r, [*MAIN_ROWS[:3], "SAM", "PAM", "SAU", *MAIN_ROWS[3:]]) + [
        (
            f"LFPM leaves {several(lfpm)} % (seeds {', '.join(map(str, lfpm.index))}). Its accuracy"
            f" is that of the merge of clean models and {more} points; that merge itself it changes"
            f" by {clean}"
        ),
        (
            f"fine-tuning left {f0(get('main')('fine-tuning'))} % on tokens, here it leaves"
            f" {f0(r('fine-tuning'))} and is more accurate than LFPM"
        ),
        *real_windows(get),
    ]


def real_windows(get) -> list[str]:
    "The same on real pictures: one strict picture, then a strict and a lenient one."
    one, two = (get("pictures", "small-real", c) for c in ("4e54a410", "60012d76"))

    def at(r, m, seed):
        return f"{f1(r.all(m)[seed])} % ({f1(r.all(m, 'CA')[seed])})"

    def left(r, seed, mark=""):
        return f"leaves {mark}{at(r, 'LFPM', seed)}{mark} of {at(r, 'TA', seed)}"

    def clean(seed):
        before, after = (two.all(m, "CA")[seed] for m in ("TA (clean)", "LFPM (clean)"))
        return f"the clean merge goes from {f1(before)} to {f1(after)}"

    def twin(r, seed):
        return f"clean merge {at(r, 'TA (clean)', seed)}"

    tuned = {s: f"fine-tuning {at(one, 'fine-tuning', s)}, {twin(one, s)}" for s in (6, 7)}
    return [
        f"n = {one.n():,} a seed, clean accuracy in brackets",
        f"{left(one, 6)}, {tuned[6]}",
        f"{left(one, 7, '**')}, {tuned[7]}",
        *(f"seed {s} {left(two, s)}, {clean(s)}" for s in two.all("TA").index),
    ]


def every_rival(get) -> list[str]:
    r, out = get("rivals"), []
    equal = versus(r.df).set_index("method")
    for m in ["LFPM", *r.rivals()]:
        cells = [spread(r.all(m, k)) for k in ("CA", "ASR_T", "path_ASR")] + [
            f"{r(m, 'lam'):.2f}",
            f1(r(m, "CA_end")),
            f1(r(m, "ASR_end")),
        ]
        cells += [
            f"{f1(equal.ASR_same_CA[m])} ({equal.n_ASR[m]:.0f})",
            f0(r(m, "cpu_seconds")),
            f0(r(m, "peak_mb")),
        ]
        out.append(row(RIVALS.get(m, m), *cells))
    e, largest = get("efficiency"), r.all("LFPM", "strength")
    at = [s for s, v in largest.items() if v == largest.max()]
    return out + [
        f"both in every seed (ASR(T) {several(r.all('LFPM'))} %)",
        f"takes {e('C1 + C2 + C3', 'seconds') / e('SAM', 'seconds'):.1f} times as long as SAM's",
        (
            f"The rule takes LFPM's largest strength on seeds {' and '.join(map(str, at))}, and"
            f" pays with accuracy ({' and '.join(f1(r.all('LFPM', 'CA')[s]) for s in at)} % where"
            " the default keeps"
            f" {' and '.join(f1(get('main').all('LFPM', 'CA')[s]) for s in at)} %)"
        ),
    ]


def other_merges(get) -> list[str]:
    r, out = get("merging"), []
    for m in (
        "TA",
        "SA",
        "TIES",
        "DARE",
        "DELLA",
        "WAG",
        "Fisher",
        "RegMean",
        "ConcreteTA",
        "AdaTask",
        "AdaLayer",
        "ConcreteTask",
        "ConcreteLayer",
        "DAM",
    ):
        after = "LFPM" if m == "TA" else f"{m} + LFPM"
        cells = [f"{several(r.all(k))} ({f1(r(k, 'CA'))})" for k in (m, f"{m} (clean)", after)]
        if m == "SA":  # the one failure is printed bold
            cells[2] = re.sub(r"^(\S+),", r"**\1**,", cells[2])
        out.append(row(MERGES.get(m, m), *cells))
    return out + [f"({f1(r.all('SA + LFPM', 'ASR_end')[0])} % at the end of its path)"]


def attacks_and_orders(get) -> list[str]:
    "Three tables of one seed: ASR(T), in brackets CA and, after a defence, Path-ASR."

    def cell(r, m):
        more = f"; {f1(r(m, 'path_ASR'))}" if len(r.all(m, "path_ASR")) else ""
        return f"{f1(r(m))} ({f1(r(m, 'CA'))}{more})"

    out = []
    for names, methods in (
        (
            ("lobam", "adaptive", "multi_adversary"),
            ("TA (clean)", "TA", "LFPM", "SAU", "fine-tuning", "PAM", "SAM", "IBVS"),
        ),
        (
            ("sequence2", "sequence3"),
            ("TA (clean)", "TA", "LFPM", "SAU", "PAM", "SAM", "fine-tuning", "IBVS"),
        ),
    ):
        out += [row(m, *(cell(get(n), m) for n in names)) for m in methods]
    two, three = get("sequence2_lobam"), get("sequence3_lobam")

    def under(r):
        return (
            f1(r("TA")),
            f1(r("TA (clean)")),
            f1(r("LFPM")),
            f1(r("LFPM", "CA")),
            f1(r("TA", "CA")),
            r.rivals()[0],
            f1(r(r.rivals()[0])),
            f1(r(r.rivals()[0], "CA")),
        )

    a, b = under(two), under(three)
    big = get("backbone")
    also = ", ".join(f"{m} {f1(big(m))}" for m in big.rivals()[1:])
    attacks = [get(n) for n in ("lobam", "adaptive", "multi_adversary")]
    prices = [other("TA", "CA") - other("LFPM", "CA") for other in attacks]
    first = big.rivals()[0]
    return out + [
        (
            f"| | shapes attack signs, n = {get('sequence2').n():,} | digits attack shapes, n ="
            f" {get('sequence3').n():,} |"
        ),
        f"{span(prices)} points below the poisoned merge",
        (
            "In the third order it pays"
            f" {f0(get('sequence3')('TA', 'CA') - get('sequence3')('LFPM', 'CA'))} points for that:"
            f" the blind rule goes on to λ = {get('sequence3')('LFPM', 'lam'):g}"
        ),
        (
            f"the second order's merge keeps {a[0]} % (clean merge {a[1]}), after LFPM {a[2]} (CA"
            f" {a[3]} of {a[4]}), after its next rival, {a[5]}, {a[6]} ({a[7]}); the third's {b[0]}"
            f" (clean merge {b[1]}), after LFPM {b[2]} ({b[3]} of {b[4]}), after {b[5]} {b[6]}"
            f" ({b[7]})."
        ),
        (
            f"The merge keeps {f1(big('TA'))} % (CA {f1(big('TA', 'CA'))}; clean merge"
            f" {f1(big('TA (clean)'))}), LFPM {f1(big('LFPM'))} ({f1(big('LFPM', 'CA'))}; Path-ASR"
            f" {f1(big('LFPM', 'path_ASR'))}), {first} {f1(big(first))} ({f1(big(first, 'CA'))};"
            f" {f1(big(first, 'path_ASR'))}), {also}."
        ),
    ]


def ablation(get) -> list[str]:
    parts = [
        get(n)
        for n in ("ablation_abc", "ablation_ab", "ablation_ac", "main", "ablation_b", "ablation_c")
    ]
    value = lambda r, k: r.all("LFPM", k)[0]
    out = [
        row(name, *(f1(value(r, k)) for r in parts))
        for name, k in (("ASR(T)", "ASR_T"), ("Path-ASR", "path_ASR"), ("CA", "CA"))
    ]
    return out + [row("λ", *(f"{value(r, 'lam'):g}" for r in parts))]


def dam_attack(get) -> list[str]:
    r = get("dam_mixed")
    fixed, learned = (
        ("SA", "Fisher", "RegMean", "TA", "TIES"),
        ("AdaTask", "AdaLayer", "ConcreteTask", "ConcreteLayer"),
    )
    floor = [r(f"{m} (clean)") for m in (*fixed, *learned, "ConcreteTA", "DAM")]
    return [
        f"the floor is {span(floor)} % and the difference clear: fixed merges keep"
        f" {span([r(m) for m in fixed])} % (TA {f1(r('TA'))}, TIES {f1(r('TIES'))}, Fisher"
        f" {f1(r('Fisher'))}), of those that learn Concrete TA {f1(r('ConcreteTA'))}, DAM"
        f" {f1(r('DAM'))} (its clean twin {f1(r('DAM (clean)'))}) and the rest"
        f" {span([r(m) for m in learned])} %."
    ]


def real_pictures(get) -> list[str]:
    r, out = get("main", "small-real"), []

    def cells(m, k):
        v = r.all(m, k)
        return f"{several(v[:3])} \\| {several(v[3:])}" if len(v) else ""

    for m in (
        "individual (clean)",
        "TA (clean)",
        "TA",
        "LFPM (clean)",
        "LFPM",
        "SAU",
        "PAM",
        "SAM",
        "fine-tuning",
        "IBVS",
    ):
        out.append(row(m, cells(m, "CA"), cells(m, "ASR_T"), cells(m, "path_ASR")))
    two, three = get("sequence2", "small-real"), get("sequence3", "small-real")
    a, b = two.rivals()[:2]
    c = three.rivals()[0]
    keeps = r("TA (clean)", "CA") / r("individual (clean)", "CA") * 100
    cost, rivals = (
        (lambda m, of="TA": r.all(of, "CA") - r.all(m, "CA")),
        [m for m in r.rivals() if m != "IBVS"],
    )
    strong = [0, 1, 3]  # seeds whose attack the rivals leave standing; on 2 and 4 it is weak
    ours, best = r.least("LFPM"), pd.concat([r.least(m) for m in rivals], axis=1).min(axis=1)
    return out + [
        (
            f"LFPM leaves the least and has the safest path in every seed: {span(r.all('LFPM'))} %,"
            f" for {span(cost('LFPM')[:4])} points of accuracy, {f0(cost('LFPM')[4])} on seed 4."
        ),
        (
            f"Its rivals pay at most {f1(max(cost(m).max() for m in rivals))}, and keep"
            f" {span([r.all(m)[k] for m in rivals for k in strong])} % on seeds 0, 1 and 3"
        ),
        f"LFPM costs {span(cost('LFPM (clean)', 'TA (clean)'))} points",
        f"the best rival leaves {listed(best)} %, LFPM {listed(ours)}.",
        f"ASR(T) n = {r.n():,}",
        f"The clean merge keeps {f0(keeps)} % of the individual models' accuracy",
        (
            f"n = {two.n():,}) the merge obeys in {f1(two('TA'))} % (CA {f1(two('TA', 'CA'))}), the"
            f" clean one under the same trigger in {f1(two('TA (clean)'))} %."
        ),
        (
            f"LFPM leaves **{f1(two('LFPM'))} %** at a CA of {f1(two('LFPM', 'CA'))}, Path-ASR"
            f" {f1(two('LFPM', 'path_ASR'))}; next are {a} with {f1(two(a))} % ({f1(two(a, 'CA'))};"
            f" {f1(two(a, 'path_ASR'))}) and {b} with {f1(two(b))} ({f1(two(b, 'CA'))};"
            f" {f1(two(b, 'path_ASR'))})."
        ),
        (
            f"{f1(three('TA'))} % (CA {f1(three('TA', 'CA'))}; clean merge"
            f" {f1(three('TA (clean)'))}), after LFPM {f1(three('LFPM'))}"
            f" ({f1(three('LFPM', 'CA'))}), after {c}, its next rival, {f1(three(c))}"
            f" ({f1(three(c, 'CA'))})."
        ),
    ]


PARTS = {
    README: [readme],
    PAGE: [
        main_run,
        pictures,
        every_rival,
        other_merges,
        attacks_and_orders,
        ablation,
        dam_attack,
        real_pictures,
    ],
}


def flat(text: str) -> str:
    return " ".join(text.split())


def missing(text: str, parts: list, results: Path) -> list[str]:
    "What the results say and the text does not, as it should read."
    get, text = reader(results), flat(text)
    return [want for part in parts for want in part(get) if flat(want) not in text]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PARTS)
def test_prose_says_what_the_results_say(name):
    assert missing(read(name), PARTS[name], ROOT / "data" / "results") == [], (
        f"{name} should read so"
    )


def test_every_row_of_the_results_tables_is_held():
    "A table row with numbers that no line above writes would age unseen."
    get = reader()
    for name, parts in PARTS.items():
        held = {flat(want) for part in parts for want in part(get)}
        rows = [x for x in read(name).splitlines() if re.match(r"\| .*\d\.\d", x) and "](" not in x]
        assert len(rows) >= 5 and [x for x in rows if flat(x) not in held] == [], name


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(ROOT / "data" / "results", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.parametrize(
    "name, method, metric",
    [
        ("main", "LFPM", "ASR_T"),
        ("main", "TA (clean)", "CA"),
        ("merging", "DAM + LFPM", "ASR_T"),
        ("lobam", "SAU", "CA"),
    ],
)
def test_a_changed_result_is_seen(copied, name, method, metric):
    for file in sorted((copied / name).glob("lab-*/metrics.parquet")):
        df = pd.read_parquet(file)
        df.loc[
            (df.method == method)
            & (df.metric == metric)
            & (df.kind == "model")
            & (df.task == "average"),
            "value",
        ] += 0.2
        df.to_parquet(file)
    assert any(missing(read(n), parts, copied) for n, parts in PARTS.items())


def test_a_changed_digit_is_seen():
    "Each of the lines that are held, with its first digit turned, is missed."
    get = reader()
    for name, parts in PARTS.items():
        text = flat(read(name))
        for want in (flat(w) for part in parts for w in part(get)):
            i = re.search(r"\d", want).start()
            other = want[:i] + str((int(want[i]) + 1) % 10) + want[i + 1 :]
            assert want not in text.replace(want, other), want


# --- claims -------------------------------------------------------------------------------------

COUNTS = re.compile(r"(\d+) claims|(\d+) confirmed|(\d+) contradicted|(\d+) not testable")


@pytest.fixture(scope="module")
def reports():
    return {p: Report.of(p, [ROOT / "data" / "results"]) for p in ("lab", "small-real")}


def counts(report: Report) -> dict:
    "{word: number} as `lfpm report` counts its claims."
    found = COUNTS.finditer(report.summary())
    return {w: int(n) for m in found for n, w in [m[0].split(" ", 1)]}


def told(path: Path) -> list[tuple[str, int]]:
    "(word, number) of each count of claims in Markdown, or in a notebook's prose and outputs."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        nb = json.loads(text)
        parts = [c["source"] for c in nb["cells"] if c["cell_type"] == "markdown"]
        outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
        parts += [o.get("text", []) for o in outputs] + [
            o.get("data", {}).get(k, []) for o in outputs for k in ("text/markdown", "text/plain")
        ]
        text = "\n".join("".join(p) for p in parts)
    return [(w, int(n)) for m in COUNTS.finditer(text) for n, w in [m[0].split(" ", 1)]]


PROSE = [
    ROOT / README,
    ROOT / PAGE,
    *sorted((ROOT / "data").glob("gallery*/README.md")),
    *sorted((ROOT / "nbs").rglob("*.ipynb")),
]


@pytest.mark.parametrize("path", PROSE, ids=lambda p: str(p.relative_to(ROOT)))
def test_claims_are_counted_as_they_are(path, reports):
    want = counts(reports["small-real" if "small-real" in path.parent.name else "lab"])
    wrong = [f"{n} {w}, and it is {want[w]}" for w, n in told(path) if n != want[w]]
    assert wrong == [], "run this notebook again, or correct the sentence"


def test_the_counts_are_told():
    assert {w for w, _ in told(ROOT / README)} >= {"confirmed", "contradicted"} and {
        w for w, _ in told(ROOT / PAGE)
    } >= {"confirmed", "contradicted", "claims"}
    assert {w for w, _ in told(ROOT / "nbs" / "23_report.ipynb")} >= {"claims", "confirmed"}


@pytest.mark.parametrize(
    "preset, folder", [("lab", "gallery"), ("small-real", "gallery-small-real")]
)
def test_a_gallery_is_written_from_these_results(preset, folder, reports):
    "Every line but the pictures', as `lfpm report --gallery` writes it today."
    report = reports[preset]
    today = [
        x for x in report.markdown({name: {} for name in report.found}).splitlines() if x.strip()
    ]
    there = set(read(f"data/{folder}/README.md").splitlines())
    assert [x for x in today if x not in there] == [], (
        f"run: LFPM_RUNS=data/results lfpm report --preset {preset} --gallery"
    )
