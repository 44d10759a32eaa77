"""Second and third derivatives of a tower, against differences in float64.

torch 2.15's `F.layer_norm` has a wrong second derivative where both passes go forward (jvp of jvp)
and a wrong third one by reverse passes (pytorch#196700, findings/layer_norm_derivatives.sh); fused
attention has no second derivative at all. `ctl.exact` keeps both away."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lfpm_nb.ctl
from conftest import near, pixels
from lfpm_nb.clip import build_clip, lab_config, new_card
from lfpm_nb.ctl import between, check_theorem, ctl_curve, doubled, second, tower
from lfpm_nb.curvature import along, check_gradients, curvature, hvp, loss_of, readings, third

ROOT = Path(__file__).resolve().parent.parent
LABELS, HEAD = (
    torch.tensor([3]),
    10 * F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(9)), dim=-1),
)


@pytest.fixture(scope="module")
def nano():
    "One block: every kind of layer that a tower has, once."
    torch.manual_seed(0)
    clip = build_clip(
        new_card(
            "nano",
            lab_config(width=64, layers=1, embed=8, text_width=64, text_layers=1),
            ["a red square"],
        )
    )
    clip.model.requires_grad_(False)
    return clip


@pytest.fixture
def ends(nano):
    return doubled(near(nano, 1), near(nano, 2))


@pytest.fixture
def prompt():
    return torch.randn(2, 64, generator=torch.Generator().manual_seed(0))


# --- numbers ------------------------------------------------------------------------------------


def differences(
    f, a: dict, b: dict, t: float, h: float = 2e-3
) -> tuple[torch.Tensor, torch.Tensor]:
    """(second, third) derivative of f(theta_t) by central differences of fourth order.

    float64, no gradients, torch's own layers."""
    with torch.no_grad():
        y = {k: f(between(a, b, t + k * h)) for k in range(-3, 4)}
    two = (-y[-2] + 16 * y[-1] - 30 * y[0] + 16 * y[1] - y[2]) / (12 * h**2)
    three = (y[-3] - 8 * y[-2] + 13 * y[-1] - 13 * y[1] + 8 * y[2] - y[3]) / (8 * h**3)
    return two, three


def close(got, want, rel: float):
    "Within `rel` of the largest entry: no entry may be silently another number."
    return (got - want).abs().max() <= rel * want.abs().max()


def test_second_and_third_derivatives_are_those_of_the_tower(nano, ends, prompt):
    "Reverse passes against differences of the forward pass, for features and for the loss."
    a, b = ends
    delta = {k: b[k] - a[k] for k in a}
    f = tower(nano, pixels(1), prompt)
    two, _ = differences(f, a, b, 0.4)
    assert close(second(f, a, b, 0.4), two, 1e-5)
    L = loss_of(f, LABELS, HEAD)
    two, three = differences(L, a, b, 0.4)
    assert along(L, a, b, 0.4) == pytest.approx(two.item(), rel=1e-5)
    product = hvp(L, between(a, b, 0.4), delta)
    assert sum((product[k] * delta[k]).sum() for k in delta).item() == pytest.approx(
        two.item(), rel=1e-5
    )
    turn = third(L, a, b, 0.4)
    assert sum((turn[k] * delta[k]).sum() for k in delta).item() == pytest.approx(
        three.item(), rel=1e-4
    )


# --- kernels ------------------------------------------------------------------------------------

FUSED = (
    "layer_norm",
    "scaled_dot_product",
    "flash_attention",
    "efficient_attention",
    "multi_head_attention",
    "transformer_encoder",
)


class Watch(TorchDispatchMode):
    "Names of torch's operators that run inside; `fused`: not to be differentiated twice."

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))

    @property
    def fused(self) -> set:
        return {
            n for n in self.seen if any(word in n for word in FUSED) and not n.endswith("_math")
        }


def calls(nano, ends, prompt) -> dict:
    "All of ctl and curvature that takes a tower's derivative, or compares with one."
    a, b = ends
    f, x = tower(nano, pixels(1), prompt), pixels(1)
    L = loss_of(f, LABELS, HEAD)
    return {
        "second": lambda: second(f, a, b, 0.5),
        "check_theorem": lambda: check_theorem(f, a, b, [0.5], per=1),
        "check_gradients": lambda: check_gradients(L, a, b, [0.5], per=1),
        "readings": lambda: readings(f, LABELS, HEAD, a, b, 0.5),
        "curvature": lambda: curvature(nano, a, b, x, LABELS, HEAD, prompt, points=2),
        "curvature by differences": lambda: curvature(
            nano, a, b, x, LABELS, HEAD, points=2, difference=1e-3
        ),
        "ctl_curve": lambda: ctl_curve(nano, near(nano, 1), near(nano, 2), x, [0.5]),
    }


def test_no_fused_kernel_runs_where_derivatives_are_taken(nano, ends, prompt):
    for name, call in calls(nano, ends, prompt).items():
        with Watch() as watch:
            call()
        assert "bmm" in watch.seen or "mm" in watch.seen, f"{name} runs no tower"
        assert watch.fused == set(), f"{name} runs {sorted(watch.fused)}: wrap it in ctl.exact()"


@pytest.mark.parametrize("without", ["layer norm", "attention"])
def test_the_watch_sees_what_exact_keeps_away(nano, ends, prompt, monkeypatch, without):
    "Without one half of `exact` the guards above go off."
    plain = lambda *_: contextlib.nullcontext()
    monkeypatch.setattr(
        lfpm_nb.ctl, "_Elementary" if without == "layer norm" else "sdpa_kernel", plain
    )
    f = tower(nano, pixels(1), prompt)
    with torch.no_grad(), Watch() as watch:
        f(ends[0])
    assert any(
        "layer_norm" in n if without == "layer norm" else "attention" in n for n in watch.fused
    )
    if without == "attention":
        with pytest.raises(RuntimeError, match="not implemented"):
            second(f, *ends, 0.4)
        return
    L = loss_of(f, LABELS, HEAD)
    delta, turn, (_, three) = (
        {k: v - ends[0][k] for k, v in ends[1].items()},
        third(L, *ends, 0.4),
        differences(L, *ends, 0.4),
    )
    wrong = sum((turn[k] * delta[k]).sum() for k in delta).item()
    if abs(wrong / three.item() - 1) < 1e-4:
        pytest.skip(
            f"torch {torch.__version__} differentiates layer norm three times: exact() need not"
            " spell it out"
        )


FORWARD = {"jvp", "jacfwd", "hessian", "linearize", "forward_ad", "make_dual", "dual_level"}


def forward_mode(source: str) -> set:
    "Names of forward mode that a source mentions; jvp of jvp is silently wrong in layer norm."
    tree = ast.parse(source)
    names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name)
    }
    names |= {
        part
        for n in ast.walk(tree)
        if isinstance(n, (ast.ImportFrom, ast.Import))
        for a in n.names
        for part in a.name.split(".")
    }
    return names & FORWARD


@pytest.mark.parametrize("path", sorted((ROOT / "lfpm_nb").glob("*.py")), ids=lambda p: p.stem)
def test_no_module_differentiates_forwards(path):
    assert forward_mode(path.read_text(encoding="utf-8")) == set(), (
        "use reverse passes as ctl.second does, or show by differences that layer norm's are right"
    )


def test_every_spelling_of_forward_mode_is_found():
    for line in (
        "from torch.func import jvp",
        "torch.func.jacfwd(f)",
        "import torch.autograd.forward_ad as fw",
        "torch.func.hessian(f)",
    ):
        assert forward_mode(line)
    assert not forward_mode("from torch.func import functional_call, grad")
