"""Training with less memory: the same gradients when a tower is computed again.

And when memory runs out in the middle of a step."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from conftest import near, small_task
from lfpm_nb import antibackdoor as B
from lfpm_nb import baselines as R
from lfpm_nb import tune
from lfpm_nb.antibackdoor import Strengths, accumulate, step_loss, terms
from lfpm_nb.attack import Target, Trigger, backdoor_loss
from lfpm_nb.baselines import encode_at, sam_offset
from lfpm_nb.clip import whole
from lfpm_nb.core import generator
from lfpm_nb.defend import defences, train_defence
from lfpm_nb.lora import trainable
from lfpm_nb.tune import Lean, TuneConfig, finetune, norm, task_vector

S = Strengths(rank=4, rho=0.1, prompt_length=3, epochs=1, batch=16, lr=1e-3, points=4)
OOM = torch.OutOfMemoryError
AGAIN = pytest.mark.parametrize("recompute", ["towers", "blocks"])


@pytest.fixture(scope="module")
def merged(pico):
    return near(pico, 1)


@pytest.fixture
def sgd(monkeypatch, fp32):
    """float32 and plain descent.

    AdamW turns the rounding of a gradient that ought to be zero into whole steps."""
    for m in (tune, B, R):
        monkeypatch.setattr(m, "optimiser", lambda w, lr, _: torch.optim.SGD(list(w), 30 * lr))


@pytest.fixture
def room(pico, monkeypatch):
    """`room(n)`: from now on a tower's transformer runs out of memory above n images.

    Returns the list of the numbers it was asked with."""
    kind = type(pico.visual.transformer)
    real = kind.forward

    def set(n, fails=lambda: True):
        asked = []

        def forward(self, x, *a, **k):
            if (
                self.width == 64 and torch.is_grad_enabled()
            ):  # a visual tower in a pass that will go back
                asked.append(len(x))
                if len(x) > n and fails():
                    raise OOM("out of memory. Tried to allocate a lot")
            return real(self, x, *a, **k)

        monkeypatch.setattr(kind, "forward", forward)
        return asked

    return set


@pytest.fixture
def train(pico, merged, shadow, prompts):
    def run(method, s=S):
        if method == "finetune":
            return finetune(
                pico,
                small_task("textures"),
                TuneConfig(epochs=1, batch=s.batch, lr=s.lr, warmup=1, recompute=s.recompute),
            )
        return train_defence(method, merged, pico, shadow, prompts, s, 0)[0]

    return run


def close(a, b, start, tol=1e-4):
    return norm(task_vector(a, b)) < tol * norm(task_vector(start, a))


def start_of(method, pico, merged):
    return pico.state() if method == "finetune" else merged


# --- computed again -----------------------------------------------------------------------------


@AGAIN
@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("lora", [0, 2])
def test_stage_two_has_the_same_gradient(
    pico, merged, shadow, prompts, fp32, recompute, micro, lora
):
    x, y, got = pico.normalise(shadow.x[:8]), shadow.y[:8], []
    for how in ("nothing", recompute):
        mm, anti = pico.with_state(merged).requires_grad_(True), pico.with_state(near(pico, 2))
        params = trainable(anti, lora, "x")
        for p in params[1::2] if lora else ():
            p.data.normal_(0, 0.1, generator=generator("adapters"))
        with Lean(mm, anti, recompute=how) as lean:
            lean.micro = None if how == "nothing" else micro
            loss = step_loss(mm, anti, x, y, shadow.W, prompts[0], S)
            loss.backward()
            accumulate(anti, mm, 1.0)
        got.append([loss.detach(), *[p.grad for p in params]])
    for a, b in zip(*got, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm() + 1e-7
    if micro is None:
        assert all(torch.equal(a, b) for a, b in zip(*got)), "whole towers: to the last bit"


@AGAIN
def test_gradients_at_other_weights_are_those_of_other_weights(
    pico, merged, shadow, prompts, fp32, recompute
):
    """SAM's second pass sees the weights that it was given.

    functional_call has put the module's own weights back before the backward pass comes.
    open_clip's own checkpointing takes those."""
    x, y, v = shadow.x[:6], shadow.y[:6], pico.with_state(merged).requires_grad_(True)
    w = dict(v.named_parameters())

    def gradient():
        at = lambda weights: terms(
            pico, partial(encode_at, v, weights), shadow.W, x, y, (None, prompts[0])
        )
        move = sam_offset(
            [q.detach() for q in w.values()], torch.autograd.grad(at({}), list(w.values())), 0.5
        )
        return torch.autograd.grad(
            at({n: q + e for (n, q), e in zip(w.items(), move)}), list(w.values())
        )

    want = gradient()
    with Lean(v, recompute=recompute):
        got = gradient()
    assert all(torch.equal(a, b) for a, b in zip(want, got))
    v.set_grad_checkpointing(True)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH), whole(v):
        theirs = gradient()
    assert (
        sum((a - b).square().sum() for a, b in zip(want, theirs))
        / sum(a.square().sum() for a in want)
    ).sqrt() > 0.01


@pytest.mark.parametrize(
    "recompute, method",
    [
        *(("towers", m) for m in ["finetune", *sorted(defences)]),
        *(("blocks", m) for m in ("finetune", "LFPM", "SAM", "ANP")),
    ],
)
def test_every_training_ends_in_the_same_weights(train, recompute, method):
    "In bf16 and with AdamW, as by default: what is computed again is the same to the last bit."
    one, other = train(method), train(method, replace(S, recompute=recompute))
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_towers_are_as_before_afterwards(pico, merged):
    v = pico.with_state(merged)
    with Lean(v, recompute="blocks"):
        assert all("forward" in b.__dict__ for b in v.transformer.resblocks)
    assert not any("forward" in m.__dict__ for m in v.modules())
    with pytest.raises(
        ValueError, match="unknown value of recompute 'tower'; did you mean 'towers'"
    ):
        Lean(v, recompute="tower")
    with pytest.raises(ValueError, match="did you mean 'blocks'"):
        Strengths(recompute="block")


# --- memory runs out ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["finetune", "LFPM", "fine-tuning", "SAM", "ASAM", "PAM", "SAU", "IBVS", "ANP"]
)
def test_out_of_memory_changes_nothing_but_the_time(train, room, sgd, pico, merged, method):
    want = train(method)
    asked = room(5)
    with pytest.warns(
        UserWarning, match="out of memory; going on with 4 of the batch's 16 images at a time"
    ) as said:
        got = train(method)
    assert close(want, got, start_of(method, pico, merged)), (
        "SAM's offset and the worst prompt are those of the whole batch"
    )
    assert len([w for w in said if "going on" in str(w.message)]) == (
        4 if method == "IBVS" else 2
    ), "once for each halving"
    assert asked[0] == 16 and asked[-1] <= 5


def test_the_log_names_the_micro_batch(pico, merged, shadow, prompts, room):
    assert "micro_batch" not in train_defence("SAM", merged, pico, shadow, prompts, S, 0)[1]
    room(8)
    with pytest.warns(UserWarning):
        assert train_defence("SAM", merged, pico, shadow, prompts, S, 0)[1]["micro_batch"] == 8


@pytest.mark.parametrize("when", (1, 3, 5, 8, 11))
def test_wherever_it_happens_the_step_is_taken_once(train, room, sgd, pico, merged, when):
    """Neither what was switched off nor what was half filled may stay.

    The worst prompt's pass has switched weight gradients off, the backward pass has filled half of
    the merged model's."""
    want, count = train("LFPM"), []

    def fails():
        count.append(1)
        return len(count) == when

    room(0, fails)
    with pytest.warns(UserWarning, match="going on with 8"):
        got = train("LFPM", replace(S, recompute="towers"))
    assert close(want, got, merged)


@pytest.mark.parametrize("method", ["finetune", "LFPM", "SAU"])
def test_one_image_too_many_is_an_error_that_says_what_to_do(
    train, room, pico, merged, method, monkeypatch, dirs
):
    towers, make = [], type(pico).with_state
    monkeypatch.setattr(
        type(pico), "with_state", lambda self, s: towers.append(make(self, s)) or towers[-1]
    )
    room(0)
    with (
        pytest.warns(UserWarning),
        pytest.raises(
            OOM,
            match=r"step 0: out of memory, even with one image at a time; take recompute='blocks'",
        ),
    ):
        train(method)
    for v in towers:
        assert all(
            torch.equal(a, b)
            for a, b in zip(v.state_dict().values(), start_of(method, pico, merged).values())
        ), "no weight has moved"
        assert not any("forward" in m.__dict__ for m in v.modules()) and all(
            p.grad is None for p in v.parameters()
        )
    assert not list(dirs.iterdir()), "nothing is written"


def test_a_poisoned_half_stays_half(pico, room, sgd):
    """An attacker's loss draws once more in the step that is repeated.

    Without a draw (r_min = 1) nothing differs."""
    task, other = small_task("textures"), small_task("signs")
    trigger = Trigger(torch.rand(3, 6, 6, generator=generator("t")))
    fit = lambda: tune.fit(
        pico,
        pico.state(),
        64,
        backdoor_loss(pico, task, Target.of(other, other.classes[1]), trigger, 1.0, 2.0, 0),
        TuneConfig(1, 16, 1e-3, warmup=1),
        ("a",),
        "a",
    )
    want = fit()
    room(3)
    with pytest.warns(UserWarning, match="going on with 2"):
        got = fit()
    assert close(want, got, pico.state())
