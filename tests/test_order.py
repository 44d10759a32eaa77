"""No number may follow the order of a state dict's keys.

It is nobody's promise: peft turns attention's tensors round, safetensors shuffles a buffer's."""

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings, strategies as st

from conftest import near, new_pico, pixels
from lfpm_nb import adaptive  # noqa: F401, its merges join the registry
from lfpm_nb.core import content_hash, load_state, save_state
from lfpm_nb.ctl import doubled, tower
from lfpm_nb.curvature import hvp, loss_of, readings
from lfpm_nb.formats import FORMS, convert, layout, take, with_base, write_tower
from lfpm_nb.merge import merge, merges
from lfpm_nb.runs import config_hash, settings_of
from reference import merge_parity as parity

# Short, but more than two steps: Adam's first ones hide in their sign what rounding does.
SHORT = {name: dict(steps=4, per_task=4) for name in merges if "training" in merges[name]["needs"]}
SHORT |= {"Fisher": dict(examples=16, group=8), "RegMean": dict(examples=16)}


def shuffled(d: dict, seed: int) -> dict:
    "The same entries, never in the same order."
    keys, rng = list(d), random.Random(seed)
    while keys == list(d):
        rng.shuffle(keys)
    return {k: d[k] for k in keys}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items()
    )


@pytest.fixture
def one_thread():
    "The toy's tensors are too small to share out."
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


# --- merges -------------------------------------------------------------------------------------


def more(name: str) -> dict:
    "What a merge takes beside base and models: images and heads, or clean twins."
    needs, options = merges[name]["needs"], dict(SHORT.get(name, {}))
    if {"images", "heads"} & set(needs):
        options["data"] = parity.data()
    if "clean twins" in needs:
        options["twins"] = parity.MODELS
    return options


@pytest.mark.parametrize("name", list(merges))
def test_no_merge_follows_the_order_of_keys(name, fp32, one_thread):
    base, models, options = parity.BASE, parity.MODELS, more(name)
    plain = merge(name, base, models, **options)
    for seed in range(5):
        others = [shuffled(m, seed + t) for t, m in enumerate(models)]
        if "twins" in options:
            options["twins"] = [shuffled(m, seed + 9) for m in models]
        assert same(merge(name, base, others, **options), plain), f"models shuffled, {seed}"
        assert same(merge(name, shuffled(base, seed), others, **options), plain), (
            f"base shuffled too, {seed}"
        )


# --- formats ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole():
    "A whole small CLIP as a Tower."
    return take(new_pico("whole").model.state_dict())


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=3)
@given(seed=st.integers(0, 10**6))
def test_no_format_follows_the_order_of_keys(whole, form, seed):
    state, left = layout(whole.visual, whole.rest, form)
    turned, also_left = layout(shuffled(whole.visual, seed), shuffled(whole.rest, seed), form)
    assert same(state, turned) and left == also_left
    one, two = take(state), take(shuffled(turned, seed))
    assert (
        one.form == two.form == form and same(one.visual, two.visual) and same(one.rest, two.rest)
    )
    one, two = (
        with_base(one, whole),
        with_base(two, take(shuffled(layout(whole.visual, whole.rest, "open_clip")[0], seed))),
    )
    assert same(one.visual, two.visual) and same(one.rest, two.rest)


@pytest.mark.parametrize("form", FORMS)
def test_no_converted_file_follows_the_order_of_keys(whole, form, tmp_path):
    write_tower(tmp_path / "base.safetensors", whole, "open_clip")
    state = load_state(tmp_path / "base.safetensors")[0]
    torch.save(
        shuffled(state, 1), tmp_path / "turned.pt"
    )  # safetensors files are sorted, a .pt keeps its order
    for name in ("base.safetensors", "turned.pt"):
        convert(tmp_path / name, tmp_path / f"{name}.safetensors", form)
    assert same(
        *(
            load_state(tmp_path / f"{name}.safetensors")[0]
            for name in ("base.safetensors", "turned.pt")
        )
    )


# --- hashes, and what lies side by side ---------------------------------------------------------


@dataclasses.dataclass
class Holder:
    state: dict
    name: str = "x"


@given(seed=st.integers(0, 10**6))
def test_no_hash_follows_the_order_of_keys(seed):
    state, turned = parity.BASE, shuffled(parity.BASE, seed)
    assert content_hash(state) == content_hash(turned)
    assert content_hash([{"a": state, "b": 1}], 2) == content_hash([{"b": 1, "a": turned}], 2)
    assert content_hash(Holder(state)) == content_hash(Holder(turned))
    assert content_hash(state) != content_hash(state | {"one more": torch.zeros(1)})


@pytest.mark.parametrize(
    "name, preset",
    [("main", "tiny"), ("dam_masks", "lab"), ("efficiency", "lab"), ("purify", "lab")],
)
def test_no_configuration_follows_the_order_of_settings(name, preset):
    P = settings_of(name, preset)
    for seed in range(3):
        values = shuffled(dataclasses.asdict(P), seed)
        for key, value in values.items():
            if isinstance(value, dict) and len(value) > 1:
                values[key] = shuffled(value, seed)
        assert config_hash(name, type(P)(**values)) == config_hash(name, P)


def test_a_saved_state_hashes_the_same_in_any_order(tmp_path):
    for i, state in enumerate((parity.BASE, shuffled(parity.BASE, 3))):
        save_state(tmp_path / f"{i}.safetensors", state, format="pt")
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    assert content_hash(load_state(tmp_path / "0.safetensors")[0]) == content_hash(parity.BASE)


def test_gradients_of_two_ends_are_laid_side_by_side_by_name(pico):
    "Curvature takes two state dicts, and no file promises that both have one order."
    a, b = doubled(near(pico, 1), near(pico, 2))
    head = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    f, y = tower(pico, pixels(2)), torch.tensor([0, 1])
    L, v, turned = loss_of(f, y, head), {k: b[k] - a[k] for k in a}, shuffled(b, 0)
    want, got = hvp(L, a, v), hvp(L, a, {k: turned[k] - a[k] for k in turned})
    assert all(torch.allclose(want[k], got[k], rtol=1e-9, atol=1e-12) for k in a)
    assert readings(f, y, head, a, turned, 0.5) == pytest.approx(
        readings(f, y, head, a, b, 0.5), rel=1e-6
    )
