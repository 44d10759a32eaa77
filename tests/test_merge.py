"""Merges that look at weights only: formulas, invariants, recorded values, refusals.

What must hold for any weights is drawn; the recorded values are those of public libraries."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import lfpm_nb.merge as M
from lfpm_nb.lora import add_lora, dense
from lfpm_nb.merge import (
    dare,
    della,
    keep_rates,
    kth_magnitude,
    merge,
    merges,
    simple_average,
    task_arithmetic,
    ties,
    wag,
)
from reference import merge_parity as parity

SHAPES = {"w": (2, 3), "b": (3,), "s": (), "conv": (4, 3, 2, 2), "thin": (5, 1)}
WEIGHTS_ONLY = ("SA", "TA", "TIES", "DARE", "DELLA")


def weights(seed: int, n: int) -> list[dict]:
    g = torch.Generator().manual_seed(seed)
    return [
        {**{k: torch.randn(s, generator=g) for k, s in SHAPES.items()}, "steps": torch.tensor(i)}
        for i in range(n)
    ]


def floats(state):
    return {k: v for k, v in state.items() if v.is_floating_point()}


def same(a, b, tol=1e-5):
    return a.keys() == b.keys() and all(
        torch.allclose(a[k].double(), b[k].double(), atol=tol) for k in a
    )


seeds, counts, scales = st.integers(0, 10**6), st.integers(2, 6), st.floats(0, 2)


# --- formulas -----------------------------------------------------------------------------------


@given(seeds, counts, scales)
def test_task_arithmetic_is_its_formula(seed, n, scale):
    base, *models = weights(seed, n + 1)
    want = {
        k: base[k].double() + scale * sum(m[k].double() - base[k].double() for m in models)
        for k in SHAPES
    }
    got = merge("TA", base, models, scale=scale)
    assert same(floats(got), want) and got["steps"] == base["steps"]


@given(seeds, counts)
def test_simple_average_is_the_mean_and_ta_at_one_over_n(seed, n):
    base, *models = weights(seed, n + 1)
    got = merge("Simple Average", base, models)
    assert same(floats(got), {k: sum(m[k].double() for m in models) / n for k in SHAPES})
    assert same(got, merge("TA", base, models, scale=1 / n)) and got["steps"] == base["steps"]
    assert same(wag(base, models[:1], twins=models[1:]), got)


@given(seeds, st.integers(1, 3), st.integers(1, 3), scales)
def test_task_arithmetic_adds_up_in_any_two_parts(seed, n, m, scale):
    base, *models = weights(seed, n + m + 1)
    half, rest, whole = (
        task_arithmetic(base, part, scale) for part in (models[:n], models[n:], models)
    )
    assert all(
        torch.allclose(whole[k] - base[k], half[k] + rest[k] - 2 * base[k], atol=1e-4)
        for k in SHAPES
    )


def slow_ties(base, models, density, scale, mean):
    "TIES as its authors' code does it, on one vector per model in float64."
    keys = [k for k in base if base[k].is_floating_point()]
    flat = lambda s: np.concatenate([s[k].numpy().astype(np.float64).ravel() for k in keys])
    b, taus = flat(base), []
    for m in models:
        tau = flat(m) - b
        k = len(tau) - int(len(tau) * density)
        taus.append(tau * (np.abs(tau) >= (np.sort(np.abs(tau))[k - 1] if k else 0)))
    taus = np.stack(taus)
    gamma = np.sign(taus.sum(0))
    gamma[gamma == 0] = np.sign(gamma.sum())
    agree = (np.sign(taus) == gamma) & (gamma != 0)
    m = (taus * agree).sum(0) / (np.maximum(agree.sum(0), 1) if mean else 1)
    out, at = {}, 0
    for k in keys:
        out[k] = torch.from_numpy(
            b[at : at + base[k].numel()] + scale * m[at : at + base[k].numel()]
        ).reshape(base[k].shape)
        at += base[k].numel()
    return out


@settings(max_examples=80)
@given(seeds, counts, st.sampled_from((0.05, 0.2, 0.5, 1.0)), st.booleans(), st.booleans())
def test_ties_is_its_formula_even_where_votes_tie(seed, n, density, mean, whole):
    base, *models = weights(seed, n + 1)
    if whole:  # small whole numbers: equal magnitudes and cancelling votes everywhere
        base = {k: torch.zeros_like(v) for k, v in base.items()}
        models = [
            {k: v.round() if v.is_floating_point() else v for k, v in m.items()} for m in models
        ]
    got = ties(base, models, density=density, scale=0.3, mean=mean, coefficient=0.3)
    assert (
        same(floats(got), slow_ties(base, models, density, 0.3, mean), 1e-5)
        and got["steps"] == base["steps"]
    )


@pytest.mark.parametrize("sign", (1.0, -1.0))
def test_exact_ties_take_the_sign_of_the_whole_model(sign):
    base, a, b = (
        {k: torch.tensor(v) for k, v in s.items()}
        for s in (
            {"x": [0.0, 0.0], "y": [0.0, 0.0, 0.0]},
            {"x": [2.0, -1.0], "y": [sign, sign, sign]},
            {"x": [-2.0, 1.0], "y": [0.0, 0.0, 0.0]},
        )
    )
    assert ties(base, [a, b], density=1.0, scale=1.0)["x"].tolist() == (
        [2, 1] if sign > 0 else [-2, -1]
    )
    nobody = {"x": torch.zeros(2), "y": torch.zeros(3)}
    assert ties(base, [{**a, "y": nobody["y"]}, b], density=1.0, scale=1.0)["x"].tolist() == [0, 0]


@given(seeds, st.integers(1, 300), st.booleans())
def test_kth_magnitude_is_the_sorted_one(seed, n, whole):
    g = torch.Generator().manual_seed(seed)
    base, model = (
        {
            "a": torch.randn(n, generator=g),
            "b": torch.randn(3, 2, generator=g),
            "i": torch.arange(3),
        }
        for _ in range(2)
    )
    if whole:
        base, model = ({k: v.round() for k, v in s.items()} for s in (base, model))
    order = torch.cat([(model[k] - base[k]).abs().flatten() for k in "ab"]).sort().values
    assert [kth_magnitude(base, model, k) for k in range(1, len(order) + 1)] == order.tolist()


def test_kth_magnitude_survives_a_sample_that_misleads():
    x = torch.zeros(2**18)
    x[1::2] = (
        torch.rand(2**17, generator=torch.Generator().manual_seed(0)) + 1
    )  # the sample takes every second entry: the zeros
    for k in (1, 2**17, 2**17 + 1, 200_000, 2**18):
        assert (
            kth_magnitude({"x": torch.zeros(2**18)}, {"x": x}, k) == x.sort().values[k - 1].item()
        )


# --- whatever the weights -----------------------------------------------------------------------

EXACT = (
    ("TA", {}),
    ("SA", {}),
    ("TIES", {}),
    ("TIES", dict(mean=True, density=0.5)),
    ("DARE", dict(drop=0)),
    ("DELLA", dict(drop=0)),
)


@given(seeds, st.integers(2, 5), st.sampled_from(EXACT), st.randoms())
def test_the_order_of_contributors_does_not_matter(seed, n, case, rng):
    (name, options), (base, *models) = case, weights(seed, n + 1)
    mixed = list(models)
    rng.shuffle(mixed)
    assert same(merge(name, base, models, **options), merge(name, base, mixed, **options))


@given(seeds)
def test_one_model_with_coefficient_one_comes_back(seed):
    base, model = weights(seed, 2)
    for got in (
        task_arithmetic(base, [model], 1.0),
        simple_average(base, [model]),
        ties(base, [model], 1.0, scale=1.0),
        ties(base, [model], 1.0, mean=True),
        dare(base, [model], drop=0, scale=1.0),
        della(base, [model], drop=0, coefficient=1.0),
        wag(base, [model], twins=[model]),
    ):
        assert same(floats(got), floats(model), 1e-6) and got["steps"] == base["steps"]
    assert same(floats(task_arithmetic(base, [model], 1.0)), floats(model), 0)


@given(seeds, st.sampled_from(WEIGHTS_ONLY))
def test_copies_of_the_base_change_nothing(seed, name):
    base, model = weights(seed, 2)
    assert same(merge(name, base, [base, base]), base, 1e-6)
    if name not in ("SA", "DELLA"):
        assert same(merge(name, base, [model, base], scale=0.0), base, 0)


@pytest.mark.parametrize("name", [*WEIGHTS_ONLY, "WAG"])
def test_inputs_are_not_changed_and_not_shared(name):
    base, *models = weights(0, 4)
    twins = dict(twins=models[2:]) if name == "WAG" else {}
    before = [{k: v.clone() for k, v in m.items()} for m in (base, *models)]
    out = merge(name, base, models[:2], **twins)
    assert (
        list(out) == list(base)
        and all(out[k].shape == base[k].shape and out[k].dtype == base[k].dtype for k in base)
        and out["steps"] == base["steps"]
    )
    for v in out.values():
        v.zero_()
    assert all(same(a, b, 0) for a, b in zip((base, *models), before))


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_other_float_kinds_and_layouts_are_taken_as_the_bases(name):
    base, *models = weights(0, 3)
    half = [{k: v.half() if v.is_floating_point() else v for k, v in m.items()} for m in models]
    back = [{k: v.float() if v.is_floating_point() else v for k, v in m.items()} for m in half]
    assert same(merge(name, base, half), merge(name, base, back), 0) and {
        v.dtype for v in floats(merge(name, base, half)).values()
    } == {torch.float32}
    strided = [
        {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in m.items()} for m in models
    ]
    assert same(
        merge(
            name,
            {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in base.items()},
            strided,
        ),
        merge(name, base, models),
        0,
    )


# --- chance -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, options",
    (
        ("DARE", dict(scale=1.0, drop=0.5)),
        ("DARE", dict(scale=1.0, drop=0.9)),
        ("DELLA", dict(coefficient=1.0)),
        ("DELLA", dict(coefficient=1.0, drop=0.6, window=0.5)),
    ),
)
def test_pruning_is_unbiased(name, options, n=1500):
    base, model = weights(3, 2)
    f, keep = (
        merges[name]["f"],
        {k: 1 - options["drop"] for k in SHAPES}
        if name == "DARE"
        else {
            k: keep_rates(model[k] - base[k], options.get("drop", 0.3), options.get("window", 0.14))
            if model[k].dim()
            else 1.0
            for k in SHAPES
        },
    )
    draws = [f(base, [model], **options, seed=s) for s in range(n)]
    for k in SHAPES:
        tau, q = model[k] - base[k], torch.as_tensor(keep[k])
        error = torch.stack([d[k] for d in draws]).mean(0) - model[k]
        assert (error.abs() <= 5 * tau.abs() * ((1 - q) / q / n).sqrt() + 1e-5).all()


@given(seeds, st.floats(0.2, 0.8), st.floats(0, 0.3))
def test_della_keeps_by_rank(seed, drop, window):
    _, model = weights(seed, 2)
    for k, shape in SHAPES.items():
        if not shape:
            continue
        q = keep_rates(model[k], drop, window).reshape(shape[0] if len(shape) > 1 else 1, -1)
        size = model[k].abs().reshape(q.shape)
        for row, mag in zip(q, size):
            ranked = row[mag.argsort()]
            assert (ranked.diff() >= -1e-6).all() and abs(row.mean() - (1 - drop)) < 1e-5
            if len(row) > 1:
                assert torch.allclose(
                    ranked[[0, -1]],
                    torch.tensor([1 - drop - window / 2, 1 - drop + window / 2]),
                    atol=1e-5,
                )
    assert (
        keep_rates(torch.randn(7, 1), drop, window) == keep_rates(torch.ones(1), drop, window)
    ).all()  # rows of one entry


@pytest.mark.parametrize("name", ("DARE", "DELLA"))
def test_a_seed_is_a_draw(name):
    base, *models = weights(0, 3)
    a, again, other = (merge(name, base, models, seed=s) for s in (0, 0, 1))
    assert same(a, again, 0) and not same(a, other)
    turned = lambda s: dict(reversed(s.items()))
    assert same(turned(merge(name, turned(base), [turned(m) for m in models], seed=0)), a, 0)


# --- recorded values ----------------------------------------------------------------------------

CASES = {
    "TA": ("fusion_bench", "TA", lambda m: m.task_arithmetic(parity.BASE, parity.MODELS)),
    "TIES": ("fusion_bench", "TIES-sum", lambda m: m.ties(parity.BASE, parity.MODELS)),
    "TIES mean": (
        "fusion_bench",
        "TIES-mean",
        lambda m: m.ties(parity.BASE, parity.MODELS, mean=True, coefficient=0.3),
    ),
    "TIES peft": ("peft", "TIES-mean", lambda m: m.ties(parity.BASE, parity.MODELS, mean=True)),
    "DARE": ("fusion_bench", "DARE", lambda m: m.dare(parity.BASE, parity.MODELS)),
    "DARE peft": ("peft", "DARE", lambda m: m.dare(parity.BASE, parity.MODELS)),
    "DELLA rates": (
        "mergekit",
        "rates",
        lambda m: {
            k: m.keep_rates(parity.MODELS[0][k] - b, 0.3, 0.14) for k, b in parity.BASE.items()
        },
    ),
    "DELLA": ("mergekit", "DELLA", lambda m: m.della(parity.BASE, parity.MODELS)),
}
MUTANTS = [
    ("TA", "out = b * (1 - scale * len(models))", "out = b * (1 - scale)"),
    ("TIES", "n - int(n * density)", "n - int(n * density) - 3"),
    ("TIES", "torch.hardshrink(x - c, cut)", "x - c"),
    ("TIES", "m = (A.mul_(gamma) + S) / 2", "m = S"),
    ("TIES", "torch.add(c, m, alpha=factor, out=o)", "torch.add(c, m, out=o)"),
    ("TIES mean", ".clamp(min=1)", ".clamp(min=2)"),
    ("TIES peft", "(Q + gamma * P) / 2", "Q"),
    ("DARE", "alpha=scale / (1 - drop)", "alpha=scale"),
    ("DARE peft", "(m[k].to(b) - b) * keep", "m[k].to(b) * keep"),
    ("DELLA rates", "rows.argsort(dim=1, stable=True)", "rows.argsort(dim=1, descending=True)"),
    ("DELLA", "tau / q, 0)", "tau, 0)"),
    ("DELLA", "elected(taus, mean=True)[0]", "elected(taus)[0]"),
]


def run(case: str, module) -> float:
    library, name, call = CASES[case]
    with parity.recorded_draws(module):
        return parity.error(call(module), library, name)


@pytest.mark.parametrize("case", CASES)
def test_parity(case):
    assert run(case, M) <= parity.TOLERANCE, parity.recorded(CASES[case][0])[0]


@pytest.mark.parametrize("case, line, changed", MUTANTS)
def test_a_changed_line_breaks_parity(case, line, changed):
    assert run(case, parity.mutant(M, line, changed)) > 100 * parity.TOLERANCE


def test_references_name_their_versions():
    assert (
        "fusion-bench 0.2.33" in parity.recorded("fusion_bench")[0]
        and "peft 0.21.2" in parity.recorded("peft")[0]
        and "mergekit 0.1.5" in parity.recorded("mergekit")[0]
    )


# --- refusals -----------------------------------------------------------------------------------


def test_refusals():
    base, model = weights(0, 2)
    with pytest.raises(ValueError, match="at least two models, got 0"):
        merge("TA", base, [])
    with pytest.raises(ValueError, match="at least two models, got 1"):
        merge("SA", base, [model])
    with pytest.raises(ValueError, match="the base and model 1 differ"):
        merge("TA", base, [model, {**model, "w": torch.ones(3, 3)}])
    with pytest.raises(
        ValueError,
        match=r"the base and model 1 differ in 5 places \(b only in the first; conv only",
    ):
        merge("SA", base, [model, {"w": model["w"]}])
    with pytest.raises(ValueError, match="b: torch.float32 vs torch.int64"):
        merge("TA", base, [model, {**model, "b": torch.ones(3).long()}])
    with pytest.raises(ValueError, match="the base and model 0: 1 tensors hold NaN"):
        merge("TA", base, [{**model, "b": torch.full((3,), float("nan"))}, model])
    with pytest.raises(ValueError, match="unknown merge 'task arithmetik'"):
        merge("task arithmetik", base, [model, model])
    with pytest.raises(ValueError, match="unknown option of TIES 'densty'; did you mean 'density'"):
        merge("TIES", base, [model, model], densty=0.1)
    with pytest.raises(ValueError, match="unknown option of SA 'scale'"):
        merge("SA", base, [model, model], scale=0.1)
    with pytest.raises(ValueError, match="pass twins="):
        merge("WAG", base, [model, model])
    with pytest.raises(ValueError, match="the base and model 0 differ"):
        merge("WAG", base, [model, model], twins=[{"w": model["w"]}])
    assert merges["TA"]["f"] is task_arithmetic and merges["SA"]["f"] is simple_average


@pytest.mark.parametrize(
    "name, options, message",
    (
        ("TA", dict(scale=-0.1), "scale is -0.1; expected a number of at least 0"),
        ("TA", dict(scale=float("nan")), "scale is nan"),
        ("TA", dict(scale=float("inf")), "scale is inf"),
        ("TIES", dict(density=0), "density is 0; expected 0 < density <= 1"),
        ("TIES", dict(density=1.1), "density is 1.1"),
        ("TIES", dict(scale=-1), "scale is -1"),
        ("TIES", dict(mean=True, coefficient=-1), "coefficient is -1"),
        ("DARE", dict(drop=1), "drop is 1; expected 0 <= drop < 1"),
        ("DARE", dict(drop=-0.1), "drop is -0.1"),
        ("DARE", dict(scale=-1), "scale is -1"),
        ("DELLA", dict(drop=0.05), "drop is 0.05; expected 0, or 0.07 < drop < 0.93"),
        ("DELLA", dict(drop=1), "drop is 1"),
        ("DELLA", dict(window=1.0), "window is 1.0"),
        ("DELLA", dict(coefficient=-1), "coefficient is -1"),
    ),
)
def test_options_out_of_range(name, options, message):
    base, *models = weights(0, 3)
    with pytest.raises(ValueError, match=message):
        merge(name, base, models, **options)


def test_adapters_must_be_folded(pico):
    tower = pico.with_state(pico.state())
    add_lora(tower, 2)
    raw, folded = {k: v.detach() for k, v in tower.state_dict().items()}, dense(tower)
    with pytest.raises(
        ValueError, match=r"model 1 holds \d+ adapter tensors .*fold it first: lora.dense"
    ):
        merge("TA", pico.state(), [folded, raw])
    for key in ("x.lora_A.weight", "x.lora_B", "w_lora_A.0"):
        with pytest.raises(ValueError, match="model 0 holds 1 adapter tensors"):
            merge("TA", folded, [{**folded, key: torch.ones(1)}, folded])


def test_every_entry_says_what_it_is():
    for name, entry in merges.items():
        assert (
            entry["long"]
            and entry["source"]
            and merges.find(entry["long"]) == name
            and inspect.getdoc(entry["f"])
        )
    assert (
        merges["SA"]["needs"] == ()
        and merges["TIES"]["needs"] == ("pretrained",)
        and merges["WAG"]["needs"] == ("clean twins",)
    )
