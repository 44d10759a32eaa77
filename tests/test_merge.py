"""Simple Average and Task Arithmetic: what must hold for any weights, and what is refused."""
import pytest
import torch
from hypothesis import given, strategies as st

from lfpm_nb.merge import merge, merges, simple_average, task_arithmetic

SHAPES = {"w": (2, 3), "b": (3,), "s": ()}


def weights(seed: int, n: int) -> list[dict]:
    g = torch.Generator().manual_seed(seed)
    return [{**{k: torch.randn(s, generator=g) for k, s in SHAPES.items()}, "steps": torch.tensor(i)} for i in range(n)]


def same(a, b, tol=1e-5): return a.keys() == b.keys() and all(torch.allclose(a[k].double(), b[k].double(), atol=tol) for k in a)


seeds, counts, scales = st.integers(0, 10 ** 6), st.integers(1, 6), st.floats(-1, 2)


@given(seeds, counts, scales)
def test_task_arithmetic_is_its_formula(seed, n, scale):
    base, *models = weights(seed, n + 1)
    want = {k: base[k].double() + scale * sum(m[k].double() - base[k].double() for m in models) for k in SHAPES}
    got = merge("TA", base, models, scale=scale)
    assert same({k: got[k] for k in SHAPES}, want) and got["steps"] == base["steps"]


@given(seeds, counts)
def test_simple_average_is_the_mean_and_ta_at_one_over_n(seed, n):
    base, *models = weights(seed, n + 1)
    got = merge("Simple Average", base, models)
    assert same({k: got[k] for k in SHAPES}, {k: sum(m[k].double() for m in models) / n for k in SHAPES})
    assert same(got, merge("TA", base, models, scale=1 / n)) and got["steps"] == base["steps"]


@given(seeds, st.integers(2, 5), scales, st.randoms())
def test_the_order_of_contributors_does_not_matter(seed, n, scale, rng):
    base, *models = weights(seed, n + 1)
    mixed = list(models); rng.shuffle(mixed)
    for name, options in (("TA", dict(scale=scale)), ("SA", {})): assert same(merge(name, base, models, **options), merge(name, base, mixed, **options))


@given(seeds, scales)
def test_one_model_comes_back_and_copies_of_the_base_change_nothing(seed, scale):
    base, model = weights(seed, 2)
    floats = lambda s: {k: s[k] for k in SHAPES}
    assert same(floats(merge("TA", base, [model], scale=1.)), floats(model)) and same(floats(merge("SA", base, [model])), floats(model), 0)
    assert same(merge("TA", base, [base, base], scale=scale), base) and same(merge("TA", base, [model], scale=0.), base, 0)


@given(seeds, st.integers(1, 3), st.integers(1, 3), scales)
def test_task_arithmetic_adds_up_in_any_two_parts(seed, n, m, scale):
    base, *models = weights(seed, n + m + 1)
    half = merge("TA", base, models[:n], scale=scale)
    rest = merge("TA", base, models[n:], scale=scale)
    whole = merge("TA", base, models, scale=scale)
    assert all(torch.allclose(whole[k] - base[k], half[k] + rest[k] - 2 * base[k], atol=1e-4) for k in SHAPES)


def test_inputs_are_not_changed_and_not_shared():
    base, *models = weights(0, 3)
    before = [{k: v.clone() for k, v in m.items()} for m in (base, *models)]
    for name in merges:
        out = merge(name, base, models)
        for v in out.values(): v.zero_()
        assert all(same(a, b, 0) for a, b in zip((base, *models), before))


def test_other_float_kinds_are_taken_as_the_bases():
    base, model = weights(0, 2)
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.items()}
    for name in ("TA", "SA"): assert {v.dtype for k, v in merge(name, base, [half]).items() if k in SHAPES} == {torch.float32}


def test_refusals():
    base, model = weights(0, 2)
    with pytest.raises(ValueError, match="at least one model, got none"): merge("TA", base, [])
    with pytest.raises(ValueError, match="the base and model 1 differ"): merge("TA", base, [model, {**model, "w": torch.ones(3, 3)}])
    with pytest.raises(ValueError, match="the base and model 1 differ"): merge("SA", base, [model, {"w": model["w"]}])
    with pytest.raises(ValueError, match="the base and model 0: 1 tensors hold NaN"): merge("TA", base, [{**model, "b": torch.full((3,), float("nan"))}])
    with pytest.raises(ValueError, match="unknown merge 'task arithmetik'"): merge("task arithmetik", base, [model])
    assert merges["TA"]["f"] is task_arithmetic and merges["SA"]["f"] is simple_average
