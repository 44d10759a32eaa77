"""Everything between two models: exact ends, the integral, and rows along the path."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from conftest import near, pixels, small_task
from lfpm_nb.attack import Trigger
from lfpm_nb.clip import encode
from lfpm_nb.measure import Goal, Suite, measure
from lfpm_nb import path as P
from lfpm_nb.path import (
    Answers,
    Curve,
    Lookout,
    Path,
    choose_lam,
    curve,
    grid,
    halves,
    integrate,
    lam_rules,
    lerp,
    lerp_,
)
from lfpm_nb.path import measure_path
from lfpm_nb.subspace import Shadow, shift

floats = st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=3, max_size=3)
values = st.lists(st.floats(0, 100), min_size=2, max_size=21)

# --- mixing -------------------------------------------------------------------------------------


@given(floats, floats, st.floats(0, 1))
def test_lerp_is_its_formula_with_exact_ends(u, v, lam):
    a, b = ({"w": torch.tensor(x), "n": torch.tensor(n)} for n, x in enumerate((u, v)))
    got = lerp(a, b, lam)
    want = (1 - lam) * a["w"].double() + lam * b["w"].double()
    assert (
        torch.allclose(got["w"].double(), want, rtol=1e-5, atol=float(max(map(abs, u + v))) * 1e-6)
        and got["n"] == 0
    )
    assert torch.equal(lerp(a, b, 0.0)["w"], a["w"]) and torch.equal(lerp(a, b, 1.0)["w"], b["w"])
    assert torch.equal(a["w"], torch.tensor(u)) and torch.equal(b["w"], torch.tensor(v))


def test_ends_are_bit_equal_for_a_real_tower(pico):
    a, b = near(pico, 1), near(pico, 2, 1.0)
    assert all(
        torch.equal(lerp(a, b, 0.0)[k], a[k]) and torch.equal(lerp(a, b, 1.0)[k], b[k]) for k in a
    )
    assert any(not torch.equal(lerp(a, b, 0.5)[k], a[k]) for k in a)


def test_lerp_in_place_allocates_nothing():
    a, b = {"w": torch.ones(4)}, {"w": torch.zeros(4)}
    out = {"w": torch.empty(4)}
    where = out["w"].data_ptr()
    assert (
        lerp_(out, a, b, 0.25) is out
        and out["w"].data_ptr() == where
        and out["w"].tolist() == [0.75] * 4
    )


@pytest.mark.parametrize("lam", [-1e-9, 1.0001, 5, float("nan"), float("inf")])
def test_lam_outside_is_refused(lam):
    a = {"w": torch.ones(1)}
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\]"):
        lerp(a, a, lam)


def test_ends_of_other_architectures_are_refused(pico):
    a = near(pico, 1)
    for bad, message in (
        ({k: v for k, v in a.items() if k != "proj"}, "proj only in the first"),
        ({**a, "proj": torch.ones(2, 2)}, "the two ends of the path differ"),
        ({**a, "proj": a["proj"] * float("nan")}, "NaN"),
    ):
        for make in (lambda: lerp(a, bad, 0.5), lambda: Path(pico, a, bad)):
            with pytest.raises(ValueError, match=message):
                make()


# --- one tower for the whole path ---------------------------------------------------------------


def test_path_tower_is_the_model_at_every_point(pico):
    a, b, x = near(pico, 1), near(pico, 2), pico.normalise(pixels(4))
    path = Path(pico, a, b)
    alone = lambda s: encode(pico.with_state(s), x)
    for lam in (0.5, 1.0, 0.0, 0.3, 0.0, 1.0):  # in any order, ends included after others
        tower = path.at(lam)
        assert tower is path.visual and torch.equal(
            encode(tower, x), alone({0.0: a, 1.0: b}.get(lam) or lerp(a, b, lam))
        ), lam
        assert all(torch.equal(v, lerp(a, b, lam)[k]) for k, v in tower.state_dict().items())
    assert not any(p.requires_grad for p in tower.parameters()) and not tower.training


def test_path_leaves_its_ends_and_the_backbone(pico):
    a, b = near(pico, 1), near(pico, 2)
    before = [{k: v.clone() for k, v in m.items()} for m in (a, b, pico.state())]
    path = Path(pico, a, b)
    for lam in (0.0, 0.7, 1.0, 0.2):
        path.at(lam)
    for m, old in zip((a, b, pico.state()), before):
        assert all(torch.equal(m[k], v) for k, v in old.items())


# --- the integral -------------------------------------------------------------------------------


def piecewise(v, lam):
    "Integral of the polygon through v over [0, lam], summed segment by segment, over lam."
    h, total = 1 / (len(v) - 1), 0.0
    for i in range(len(v) - 1):
        w = min(max(lam - i * h, 0), h)
        total += w * (v[i] + v[i] + (v[i + 1] - v[i]) * w / h) / 2
    return total / lam


@given(values, st.floats(0.01, 1))
def test_integral_against_segments(v, lam):
    assert (
        integrate(v, lam) == pytest.approx(piecewise(v, lam), abs=1e-6)
        and min(v) - 1e-9 <= integrate(v, lam) <= max(v) + 1e-9
    )


@given(values)
def test_whole_integral_is_the_trapezoid_rule(v):
    assert (
        integrate(v) == pytest.approx(np.trapezoid(v, dx=1 / (len(v) - 1)), abs=1e-9)
        and integrate(v, 0) == v[0]
    )


def test_grid():
    assert (
        grid(2) == [0, 1]
        and grid(21)[10] == 0.5
        and grid(21)[0] == 0
        and grid(21)[-1] == 1
        and len(grid(21)) == 21
    )


# --- rows along the path ------------------------------------------------------------------------


def test_rows_along_a_path(pico):
    tasks = [small_task("signs"), small_task("textures")]
    suite = Suite.of(pico, tasks, {"signs": Goal(1, Trigger(torch.rand(3, 6, 6)))})
    a, b = near(pico, 1, 0.1), near(pico, 2, 0.1)
    rows = measure_path(pico, a, b, suite.first(20), n=3)
    assert {r["lam"] for r in rows} == {0, 0.5, 1}
    for lam, state in ((0, a), (0.5, lerp(a, b, 0.5)), (1, b)):
        want = measure(pico, pico.with_state(state), suite.first(20), floors=False)
        assert [{k: v for k, v in r.items() if k != "lam"} for r in rows if r["lam"] == lam] == want
    n = {(r["task"], r["metric"]): r["n"] for r in rows}
    assert (
        n["textures", "CA"] == 20
        and n["signs", "CA"] == 48
        and n["signs", "ASR_T"] == int((tasks[0].test_y != 1).sum())
    )
    lams, ca = curve(list(reversed(rows)), "CA")
    assert lams == [0, 0.5, 1] and ca == [
        next(
            r["value"]
            for r in rows
            if r["lam"] == l and r["task"] == "average" and r["metric"] == "CA"
        )
        for l in lams
    ]


@pytest.fixture
def bent(pico):
    "A path on which answers change, and pictures of two tasks."
    tasks = [small_task("signs"), small_task("textures")]
    trigger = Trigger(torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(1)))
    return (
        near(pico, 1, 0.2),
        near(pico, 2, 0.2),
        Suite.of(pico, tasks, {"signs": Goal(1, trigger)}),
    )


def counted(monkeypatch) -> list:
    "How many pictures each call of `answer` gets."
    seen, real = [], P.answer
    monkeypatch.setattr(
        P, "answer", lambda clip, v, x, W: seen.append(len(x)) or real(clip, v, x, W)
    )
    return seen


def test_a_paths_ends_and_middle_are_asked_whole(pico, bent, monkeypatch):
    a, b, suite = bent
    seen = counted(monkeypatch)
    whole = measure_path(pico, a, b, suite, n=9, bend=torch.inf)
    full, pictures = sum(seen), 2 * sum(len(t.test_x) for t in suite.tasks)
    assert full == 9 * pictures, "every picture, plain and triggered, at every point"
    seen.clear()
    rows = measure_path(pico, a, b, suite, n=9)
    assert 3 * pictures <= sum(seen) and len(rows) == len(whole)
    assert all(r == w for r, w in zip(rows, whole) if r["lam"] in (0, 0.5, 1))


def test_a_path_that_goes_nowhere_is_asked_at_three_points_and_checked_at_two(
    pico, bent, monkeypatch
):
    a, _, suite = bent
    monkeypatch.setattr(P, "CLOSE", -1.0)  # then no margin is too small
    seen = counted(monkeypatch)
    rows = measure_path(pico, a, a, suite, n=9, bend=0.0)
    pictures = 2 * sum(len(t.test_x) for t in suite.tasks)
    assert sum(seen) == (3 + 2) * pictures, "both ends, the middle, and a check in either half"
    assert all(len(set(curve(rows, m)[1])) == 1 for m in ("CA", "ASR_T"))


# three classes whose cosines are parabolas in λ: values at both ends, and the fall in the middle
cosines = st.tuples(st.floats(-0.1, 0.1), st.floats(-0.1, 0.1), st.floats(-0.12, 0.12))


class Nothing(Trigger):
    def __call__(self, x):
        return x


@given(st.lists(st.tuples(cosines, cosines, cosines), min_size=1, max_size=9))
def test_nothing_is_missed_where_margins_bend_no_more_than_reckoned(pictures):
    "Differences of two such cosines bend by at most 0.24, and BEND is more."
    lams, asked = grid(21), []
    z = torch.tensor(
        [
            [[(1 - l) * a + l * b - 4 * f * l * (1 - l) for a, b, f in p] for p in pictures]
            for l in lams
        ]
    )
    task = small_task("signs")
    task = replace(
        task,
        test_x=torch.arange(len(pictures), dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2),
        test_y=torch.zeros(len(pictures), dtype=torch.long),
    )

    def answer(clip, k, x, W):
        best = z[k][x[:, 0, 0, 0].long()].topk(2)
        asked.append(len(x))
        return best.indices[:, 0], best.values[:, 0] - best.values[:, 1]

    with pytest.MonkeyPatch.context() as m:
        m.setattr(P, "answer", answer)
        m.setattr(P, "Path", lambda *_: SimpleNamespace(at=lambda lam: lams.index(lam)))
        rows = measure_path(
            None,
            {},
            {},
            Suite(
                [task], {"signs": torch.eye(3)}, {"signs": Goal(1, Nothing(torch.zeros(3, 1, 1)))}
            ),
            n=21,
        )
    want = [(row == 0).double().mean().item() * 100 for row in z.argmax(-1)]
    assert curve(rows, "CA")[1] == pytest.approx(want) and sum(asked) <= 2 * 21 * len(pictures)


def test_one_wrong_answer_and_every_picture_is_asked(monkeypatch):
    "Sure on both sides and another class in between: no margin shows it, the check does."
    lams, truth = grid(9), [0, 1, 0, 0, 0, 0, 0, 0, 0]
    asked = []

    def answer(clip, k, x, W):
        asked.append(k)
        return torch.tensor([truth[k]]), torch.tensor([1.0])

    monkeypatch.setattr(P, "answer", answer)
    monkeypatch.setattr(P, "Path", lambda *_: SimpleNamespace(at=lambda lam: lams.index(lam)))
    one = replace(
        small_task("signs"), test_x=torch.zeros(1, 3, 2, 2), test_y=torch.zeros(1, dtype=torch.long)
    )
    suite = Suite([one], {"signs": torch.eye(3)}, {"signs": Goal(1, Nothing(torch.zeros(3, 1, 1)))})
    rows = measure_path(None, {}, {}, suite, n=9)
    assert curve(rows, "CA")[1] == [100.0 * (c == 0) for c in truth]
    truth[1] = 0
    asked.clear()
    measure_path(None, {}, {}, suite, n=9)
    assert len(asked) < 2 * 9, "nothing wrong, so not every point"


@given(st.integers(2, 40))
def test_halves_reach_every_point_after_its_neighbours(n):
    known = {0, n - 1}
    for i, m, j in halves(n):
        assert {i, j} <= known and m not in known and i < m < j
        known.add(m)
    assert known == set(range(n))


# classes at five points (None: its margin is small), and which points must be asked
@pytest.mark.parametrize(
    "row, asked",
    [
        ([0, 0, 0, 0, 0], [0, 4]),
        ([0, 0, 0, 1, 1], [0, 2, 3, 4]),
        ([0, 1, 1, 1, 1], [0, 1, 2, 4]),
        ([0, 0, 1, 0, 0], [0, 4]),
    ],
)
def test_only_what_may_have_changed_is_asked(pico, monkeypatch, row, asked):
    at = []
    monkeypatch.setattr(
        P,
        "answer",
        lambda clip, k, x, W: at.append(k) or (torch.tensor([row[k]]), torch.tensor([1.0])),
    )
    q = Answers(torch.zeros(1, 3, 2, 2), torch.eye(2), None, 5)
    for k in (0, 4):
        q.ask(pico, k, k)
    for i, m, j in halves(5):
        q.settle(i, j, 0.5)
        q.ask(pico, m, m)
    assert sorted(at) == asked
    if row != [0, 0, 1, 0, 0]:
        assert q.said[:, 0].tolist() == row  # there and back between two sure ends is not seen
    close = Answers(torch.zeros(1, 3, 2, 2), torch.eye(2), None, 5)
    at.clear()
    for k in (0, 4):
        close.ask(pico, k, k)
    for i, m, j in halves(5):
        close.settle(i, j, 1.5)
        close.ask(pico, m, m)
    assert sorted(at) == [0, 1, 2, 3, 4] and close.said[:, 0].tolist() == row, (
        "no margin is that large: all are asked"
    )


# --- choosing λ ---------------------------------------------------------------------------------

values = st.floats(0, 2, width=16)


@given(st.lists(values, min_size=2, max_size=9), st.floats(0.1, 3))
def test_knee_is_the_first_step_that_does_not_pay(losses, least):
    curve = [dict(lam=l, prompted=v) for l, v in zip(grid(len(losses)), losses)]
    lam = lam_rules("knee", curve, [], least=least)
    falls = [(a - b) * (len(losses) - 1) for a, b in zip(losses, losses[1:])]  # nats per unit of λ
    k = round(lam * (len(losses) - 1))
    assert all(f >= least - 1e-9 for f in falls[:k]) and (
        k == len(losses) - 1 or falls[k] < least + 1e-9
    )


@given(
    st.lists(st.tuples(st.floats(0.01, 9), st.floats(0, 2)), min_size=1, max_size=21),
    st.floats(0, 2),
)
def test_calm_is_the_knee_or_an_earlier_place_without_unrest(points, pretrained):
    curve = [dict(lam=i / 20, prompted=a, shift=[b, b]) for i, (a, b) in enumerate(points)]
    lam, end = (lam_rules(r, curve, [pretrained] * 2) for r in ("calm", "knee"))
    limit = 0.75 * 2 * pretrained
    early = [p["lam"] for p in curve if p["lam"] <= end and sum(p["shift"]) <= limit]
    assert lam == min([*early, end])


@given(
    st.lists(st.tuples(values, values, values), min_size=2, max_size=9), st.tuples(values, values)
)
def test_level_is_the_first_healthy_model_else_the_knee(points, pretrained):
    curve = [
        dict(lam=l, shift=[a, b], prompted=loss)
        for l, (a, b, loss) in zip(grid(len(points)), points)
    ]
    healthy = [
        l
        for l, (a, b, _) in zip(grid(len(points)), points)
        if a <= pretrained[0] and b <= pretrained[1]
    ]
    assert lam_rules("level", curve, list(pretrained)) == (
        healthy[0] if healthy else lam_rules("knee", curve, [])
    )


@given(
    st.lists(st.tuples(values, values), min_size=2, max_size=21),
    values,
    st.sampled_from(["knee", "level"]),
)
def test_a_rule_reads_no_further_than_it_must_and_chooses_the_same(points, pretrained, rule):
    at = lambda lam: dict(
        shift=[points[round(lam * (len(points) - 1))][0]],
        prompted=points[round(lam * (len(points) - 1))][1],
    )
    lazy = Curve(len(points), at)
    lam = lam_rules(rule, lazy, [pretrained])
    read = [p["lam"] for p in lazy.points]
    assert lam == lam_rules(rule, list(lazy), [pretrained]), "the whole curve as a list"
    where = grid(len(points)).index(lam)
    fell_back = rule == "level" and points[where][0] > pretrained
    assert (
        read
        == grid(len(points))[
            : len(points) if fell_back else min(where + 1 + (rule == "knee"), len(points))
        ]
    )


def test_what_is_seen_along_a_path(pico):
    "Against the models themselves, one at a time; the training images take no part."
    a, b, shadow = near(pico, 1), near(pico, 2, 0.3), Shadow.of(pico, 8, 24, seed=0)
    prompts = torch.randn(
        2, 3, pico.visual.conv1.out_channels, generator=torch.Generator().manual_seed(0)
    )
    lookout = Lookout(pico, a, shadow, prompts)
    seen = dict(curve=list(lookout.along(b, n=3)), pretrained=lookout.pretrained)
    x, y = shadow.check

    def of(visual, p=None):
        with torch.no_grad():
            return torch.cat(
                [encode(visual, pico.normalise(x[i : i + 1]), p) for i in range(len(x))]
            )

    for point, state in zip(seen["curve"], (a, lerp(a, b, 0.5), b), strict=True):
        visual = pico.with_state(state)
        assert (
            point["shift"]
            == pytest.approx([shift(of(visual), of(visual, p)) for p in prompts], rel=0.03)
            and len(set(point["shift"])) == 2
        )
    assert seen["pretrained"] == pytest.approx(
        [shift(of(pico.visual), of(pico.visual, p)) for p in prompts], rel=0.03
    )
    flat = list(lookout.along(pico.state(), n=3))  # the path ends in the pretrained model itself
    assert flat[-1]["shift"] == lookout.pretrained and flat[0] == seen["curve"][0]
    for rule, name in (("Knee of the prompted loss", "knee"), ("level", "level")):
        got = choose_lam(pico, a, b, shadow, prompts, rule, n=3)
        assert (got["lam"], got["rule"], got["pretrained"]) == (
            lam_rules(name, **seen),
            name,
            seen["pretrained"],
        )
        assert got["curve"] == seen["curve"][: len(got["curve"])] and got["lam"] in [
            p["lam"] for p in got["curve"]
        ]


def test_the_merged_and_the_pretrained_model_are_looked_at_once(pico, monkeypatch):
    shadow = Shadow.of(pico, 8, 24, seed=0)
    prompts = torch.randn(
        1, 3, pico.visual.conv1.out_channels, generator=torch.Generator().manual_seed(0)
    )
    looks, real = [], Lookout.look
    monkeypatch.setattr(Lookout, "look", lambda self, v: looks.append(v) or real(self, v))
    a, lookout = near(pico, 1), Lookout(pico, near(pico, 1), shadow, prompts)
    read = [len(lookout.choose(near(pico, s, 0.3), n=5)["curve"]) for s in (2, 3)]
    assert len(looks) == 2 + sum(k - 1 for k in read) and pico.visual in looks
    lookout.choose(a, n=5)
    assert len(looks) == 3 + sum(k - 1 for k in read), "a flat path: one step, which buys nothing"


def test_a_record_holds_the_chosen_point_even_if_the_rule_did_not_read_it(pico, monkeypatch):
    shadow, prompts = (
        Shadow.of(pico, 8, 24, seed=0),
        torch.zeros(1, 3, pico.visual.conv1.out_channels),
    )
    monkeypatch.setitem(
        lam_rules, "half", dict(f=lambda curve, pretrained: 0.5, long="Half", needs=(), source="")
    )
    got = choose_lam(pico, near(pico, 1), near(pico, 2), shadow, prompts, "half", n=5)
    assert [p["lam"] for p in got["curve"]] == [got["lam"]] == [0.5]


def test_an_unknown_rule_is_refused(pico):
    with pytest.raises(ValueError, match="did you mean 'level'"):
        lam_rules.find("levle")
