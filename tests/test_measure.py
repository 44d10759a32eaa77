"""CA and every ASR against counting by hand, with a predictor whose rule can be written down."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from conftest import pixels, small_task
from lfpm_nb.attack import Trigger
from lfpm_nb.clip import features, logits
from lfpm_nb.measure import (
    Goal,
    Suite,
    average,
    close_calls,
    measure,
    measure_task,
    predict,
    rate,
    with_averages,
)
from lfpm_nb.tasks import Task

# --- rates --------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_rate_and_wilson_interval(hits):
    r = rate(torch.tensor(hits))
    n, p, z = len(hits), sum(hits) / len(hits), 1.959963984540054
    mid, half = (
        (p + z * z / 2 / n) / (1 + z * z / n),
        z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n),
    )
    assert r["n"] == n and r["value"] == pytest.approx(100 * p)
    assert (r["lo"], r["hi"]) == (
        pytest.approx(100 * (mid - half), abs=1e-6),
        pytest.approx(100 * (mid + half), abs=1e-6),
    )
    assert -1e-9 <= r["lo"] <= r["value"] + 1e-9 and r["value"] - 1e-9 <= r["hi"] <= 100 + 1e-9


def test_rate_of_nothing():
    r = rate(torch.zeros(0, dtype=torch.bool))
    assert r["n"] == 0 and all(math.isnan(r[k]) for k in ("value", "lo", "hi"))


# --- precision ----------------------------------------------------------------------------------


def test_predictions_are_float32s_in_bfloat16_too(pico, in_both):
    "Under a head of nearly equal rows most pictures are close calls."
    x = pixels(96)
    W = 10 * F.normalize(
        features(pico, pico.visual, x[:12], dtype=torch.float32), dim=-1
    )  # noise pictures look alike to pico
    rounded, full = in_both(lambda: logits(features(pico, pico.visual, x), W))
    assert (
        close_calls(rounded, W).float().mean() > 0.5 and (rounded.argmax(1) != full.argmax(1)).any()
    ), "else nothing is tested"
    first, second = in_both(lambda: predict(pico, pico.visual, x, W))
    assert torch.equal(first, second) and torch.equal(second, full.argmax(1))


# --- the predictor: class = the largest channel of (first pixel + 2 x last pixel) ---------------


class Pixels(torch.nn.Module):
    "A visual tower that reads two pixels; the last one lies under the trigger."

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return (x[:, :, 0, 0] + 2 * x[:, :, -1, -1]) * self.w


def rule(first, last):
    return max(range(3), key=lambda c: first[c] + 2 * last[c])


def toy_task(name: str, seed: int, patch, n: int = 60) -> Task:
    """Noise images whose label agrees with the rule about half the time.

    Images with a tie are left out."""
    x = pixels(200, seed, 8)
    first, last = x[:, :, 0, 0].long(), x[:, :, -1, -1].long()
    sums = torch.stack(
        [first + 2 * l for l in (last, patch.expand_as(first), torch.full_like(first, 128))]
    )
    ok = (sums.sort(-1).values.diff(dim=-1) > 0).all(-1).all(0)
    x = x[ok][:n]
    y = torch.where(
        torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.5,
        torch.randint(3, (n,)),
        (x[:, :, 0, 0].long() + 2 * x[:, :, -1, -1].long()).argmax(1),
    )
    return Task(name, list("abc"), ["a {}"], x, y, x, y)


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    patch = torch.randint(256, (3, 2, 2))
    tasks = [toy_task(n, s, patch[:, -1, -1]) for s, n in enumerate(("aim", "other", "third"))]
    return Suite(
        tasks, {t.name: torch.eye(3) for t in tasks}, {"aim": Goal(1, Trigger(patch / 255))}
    )


def by_hand(task, suite) -> dict:
    "Every metric of one task, image by image."
    aim, goal = next(iter(suite.goals.items()))
    patch, out = (goal.trigger.patch[:, -1, -1] * 255).round().int().tolist(), {}
    add = lambda m, hit: out.setdefault(m, []).append(bool(hit))
    for x, y in zip(task.test_x.tolist(), task.test_y.tolist()):
        first, last = [c[0][0] for c in x], [c[-1][-1] for c in x]
        plain, hit, grey = rule(first, last), rule(first, patch), rule(first, [128] * 3)
        add("CA", plain == y)
        if task.name == aim:
            if y == goal.target_class:
                continue
            add("ASR_T", hit == goal.target_class)
            add("floor_none", plain == goal.target_class)
            add("floor_grey", grey == goal.target_class)
        else:
            add("ASR_N", hit != plain)
            if plain == y:
                add("ASR_Nc", hit != plain)
    return out


def test_every_metric_against_counting(pico, toy):
    v = Pixels()
    for t in toy.tasks:
        want = by_hand(t, toy)
        got = {r["metric"]: r for r in measure_task(pico, v, t, toy)}
        assert got.keys() == want.keys() and all(r["task"] == t.name for r in got.values())
        for m, hits in want.items():
            assert got[m]["n"] == len(hits) and got[m]["value"] == pytest.approx(
                100 * sum(hits) / len(hits)
            ), m
        assert 0 < got["CA"]["value"] < 100


def test_images_of_the_target_class_are_left_out(pico, toy):
    rows = {r["metric"]: r for r in measure_task(pico, Pixels(), toy.tasks[0], toy)}
    n = int((toy.tasks[0].test_y != 1).sum())
    assert [rows[m]["n"] for m in ("CA", "ASR_T", "floor_none", "floor_grey")] == [
        60,
        n,
        n,
        n,
    ] and n < 60


def test_the_target_decides_what_is_counted(pico, toy):
    other = Suite(toy.tasks, toy.heads, {"other": Goal(2, toy.goals["aim"].trigger)})
    for t in toy.tasks:
        want = by_hand(t, other)
        assert {
            r["metric"]: (r["n"], round(r["value"], 6))
            for r in measure_task(pico, Pixels(), t, other)
        } == {m: (len(h), round(100 * sum(h) / len(h), 6)) for m, h in want.items()}


def test_a_trigger_that_changes_nothing(pico, toy):
    class Nothing(Trigger):
        def __call__(self, x):
            return x.clone()

    rows = measure(
        pico,
        Pixels(),
        Suite(toy.tasks, toy.heads, {"aim": Goal(1, Nothing(toy.goals["aim"].trigger.patch))}),
    )
    assert (
        average(rows, "ASR_T") == average(rows, "floor_none")
        and average(rows, "ASR_N") == average(rows, "ASR_Nc") == 0
    )


def test_a_trigger_that_always_wins(pico, toy):
    green = Trigger(torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1).expand(3, 2, 2).clone())
    rows = measure(pico, Pixels(), Suite(toy.tasks, toy.heads, {"aim": Goal(1, green)}))
    assert average(rows, "ASR_T") == 100 and average(rows, "ASR_N") < 100


def test_two_attackers_each_have_a_target_and_share_the_rest(pico, toy):
    green = Trigger(torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1).expand(3, 2, 2).clone())
    aim = toy.goals["aim"]
    both = Suite(toy.tasks, toy.heads, {"aim": aim, "other": Goal(1, green)})
    rows = {(r["task"], r["metric"]): r for r in measure(pico, Pixels(), both)}
    alone = [
        {
            (r["task"], r["metric"]): r
            for r in measure(pico, Pixels(), Suite(toy.tasks, toy.heads, {k: g}))
        }
        for k, g in both.goals.items()
    ]
    assert (
        rows["aim", "ASR_T"] == alone[0]["aim", "ASR_T"]
        and rows["other", "ASR_T"] == alone[1]["other", "ASR_T"]
        and ("aim", "ASR_N") not in rows
    )
    assert rows["average", "ASR_T"]["value"] == pytest.approx(
        (rows["aim", "ASR_T"]["value"] + rows["other", "ASR_T"]["value"]) / 2
    )
    third = [a["third", "ASR_N"] for a in alone]
    assert rows["third", "ASR_N"]["n"] == 120 and rows["third", "ASR_N"]["value"] == pytest.approx(
        sum(r["value"] for r in third) / 2
    )


def test_a_task_with_nothing_to_count_has_no_say():
    row = lambda task, value, n: dict(task=task, metric="ASR_Nc", value=value, n=n, lo=0, hi=0)
    rows = with_averages([row("a", 40.0, 10), row("b", float("nan"), 0)])
    assert rows[-1] == dict(task="average", metric="ASR_Nc", value=40.0, n=10, lo=None, hi=None)
    assert with_averages([row("b", float("nan"), 0)])[1:] == []


def test_averages_weigh_tasks_alike(pico, toy):
    rows = measure(pico, Pixels(), toy)
    for m in ("CA", "ASR_N", "ASR_T"):
        of = [r for r in rows if r["metric"] == m and r["task"] != "average"]
        assert len(of) == {"CA": 3, "ASR_N": 2, "ASR_T": 1}[m]
        avg = next(r for r in rows if r["metric"] == m and r["task"] == "average")
        assert (
            avg["value"] == pytest.approx(sum(r["value"] for r in of) / len(of))
            and avg["n"] == sum(r["n"] for r in of)
            and avg["lo"] is None
        )
    assert (
        len(with_averages(rows)) == len(rows) + len({r["metric"] for r in rows})
        and len(measure(pico, Pixels(), toy, floors=False)) == len(rows) - 4
    )


def test_first_cuts_all_tasks_but_the_target(toy):
    few = toy.first(7)
    assert [len(t.test_y) for t in few.tasks] == [60, 7, 7] and [
        len(t.test_x) for t in few.tasks
    ] == [60, 7, 7]
    assert torch.equal(few.tasks[1].test_x, toy.tasks[1].test_x[:7]) and [
        len(t.test_y) for t in toy.tasks
    ] == [60, 60, 60]


def test_suite_of_has_the_zero_shot_heads(pico):
    from lfpm_nb.clip import zero_shot_head

    tasks = [small_task("signs"), small_task("textures")]
    s = Suite.of(pico, tasks, {"signs": Goal(2, Trigger(torch.rand(3, 4, 4)))})
    assert all(
        torch.equal(s.heads[t.name], zero_shot_head(pico, t.classes, t.templates)) for t in tasks
    )
    assert predict(pico, pico.visual, tasks[0].test_x, s.heads["signs"]).shape == (48,)
    assert {r["metric"] for r in measure(pico, pico.visual, s)} == {
        "CA",
        "ASR_T",
        "ASR_N",
        "ASR_Nc",
        "floor_none",
        "floor_grey",
    }
