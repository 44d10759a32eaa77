"""Two processes (torchrun, gloo, CPU) against one with the same global batch.

Run as a script, this file is what each process does."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import conftest  # first: it sets threads and folders
import pytest
import torch

from lfpm_nb import antibackdoor as B
from lfpm_nb import baselines as R
from lfpm_nb import core, subspace, tune
from lfpm_nb.antibackdoor import Strengths, train_anti
from lfpm_nb.attack import Target, Trigger, backdoor_loss
from lfpm_nb.core import (
    Diverged,
    Progress,
    Stages,
    content_hash,
    first,
    generator,
    load_state,
    save_state,
    share,
    team,
)
from lfpm_nb.defend import train_defence
from lfpm_nb.subspace import Shadow, mine_prompt
from lfpm_nb.tune import TuneConfig, finetune, fit, norm, task_vector

S = Strengths(
    rho=0.1, prompt_length=3, epochs=1, batch=15, lr=1e-3, points=4
)  # 15: shares of 8 and 7 images
METHODS = ("LFPM", "SAM", "ASAM", "PAM", "SAU", "IBVS", "ANP", "AWM")
SGD = lambda w, lr, _: torch.optim.SGD(
    list(w), 30 * lr
)  # AdamW turns the rounding of a gradient that ought to be zero into whole steps


def work(root: Path) -> dict:
    "{name: state dict} of every training; and what a cached stage, a file and a failing step do."
    os.environ["LFPM_AMP"] = "0"
    for m in (tune, B, R, subspace):
        m.optimiser = SGD
    pico, task, other = (
        conftest.new_pico(),
        conftest.small_task("textures", 48, 1),
        conftest.small_task("signs", 16, 1),
    )
    merged, p = conftest.near(pico, 1), 0.3 * torch.randn(2, 3, 64, generator=generator("p"))
    shadow = Shadow.of(pico, 45, 8, seed=0)
    cfg, poison = (
        TuneConfig(1, 16, 1e-3, warmup=1),
        Trigger(torch.rand(3, 6, 6, generator=generator("t"))),
    )
    ends = {
        "start": merged,
        "pre": pico.state(),
        "finetune": finetune(pico, task, cfg),
        "lora": finetune(pico, task, replace(cfg, lora=2)),
    }
    bad = backdoor_loss(pico, task, Target.of(other, other.classes[1], 4), poison, 0.1, 2.0, 0)
    ends["BadMerging"] = fit(pico, pico.state(), 48, bad, cfg, ("a",), "a")
    logs = {}
    for name in METHODS:
        ends[name], logs[name] = train_defence(name, merged, pico, shadow, p, S, 0)
    ends["LFPM, lean"], _ = train_anti(
        pico, merged, shadow, p, replace(S, recompute="towers"), 0, "x"
    )
    U = torch.linalg.qr(torch.randn(32, 4, generator=generator("U")))[0]
    for name, basis in ("prompt", None), ("prompt under U", U):
        found, logs[name] = mine_prompt(
            pico, pico.with_state(merged), shadow, basis, 2.0, 3, steps=6, batch=15, lr=0.01, seed=1
        )
        ends[name] = {"p": found}
    calls, stages = [], Stages(root / "cache")
    for _ in range(2):
        stages("stage", ("x",), lambda: calls.append(1) or ({"v": torch.ones(2)}, {}))
    try:
        train_anti(pico, merged, shadow, torch.full((1, 3, 64), float("nan")), S, 0, "x")
    except Diverged:
        logs["diverged"] = True
    return ends, logs | dict(
        calls=len(calls),
        own=len(share(torch.arange(15))),
        first=first(),
        quiet=Progress([1], "x").quiet,
    )


if __name__ == "__main__":
    root = Path(sys.argv[1])
    os.environ["LFPM_QUIET"] = "0"
    ends, logs = work(root)
    logs["hash"] = content_hash(ends)
    save_state(
        root / "ends.safetensors",
        {f"{name}|{k}": v.clone() for name, end in ends.items() for k, v in end.items()},
    )
    (root / f"rank{team().process_index}.json").write_text(json.dumps(logs), encoding="utf-8")
    torch.distributed.destroy_process_group()
    conftest.pytest_unconfigure(None)
    sys.exit()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "(state dicts, [log of each process], folder) of two processes."
    root = tmp_path_factory.mktemp("two")
    env = {
        **os.environ,
        "PYTEST_XDIST_WORKER": "one thread",
        "PYTHONPATH": os.pathsep.join([str(core.proj_path()), os.environ.get("PYTHONPATH", "")]),
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        __file__,
        str(root),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ends = {}
    for k, v in load_state(root / "ends.safetensors")[0].items():
        name, _, key = k.partition("|")
        ends.setdefault(name, {})[key] = v
    return (
        ends,
        [json.loads((root / f"rank{r}.json").read_text(encoding="utf-8")) for r in range(2)],
        root,
        done.stderr,
    )


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    before = {m: m.optimiser for m in (tune, B, R, subspace)} | {"amp": os.environ.get("LFPM_AMP")}
    try:
        return work(tmp_path_factory.mktemp("one"))
    finally:
        for m in (tune, B, R, subspace):
            m.optimiser = before[m]
        os.environ.pop("LFPM_AMP") if before["amp"] is None else os.environ.update(
            LFPM_AMP=before["amp"]
        )


@pytest.mark.parametrize("name", ["finetune", "lora", "BadMerging", *METHODS, "LFPM, lean"])
def test_two_processes_end_where_one_does(one, two, name):
    start = one[0]["pre" if name in ("finetune", "lora", "BadMerging") else "start"]
    a, b = one[0][name], two[0][name]
    assert (
        norm(task_vector(a, b)) < 1e-3 * norm(task_vector(start, a))
        and norm(task_vector(start, a)) > 1e-5
    )


@pytest.mark.parametrize("name", ["prompt", "prompt under U"])
def test_a_prompt_mined_together_is_that_of_the_whole_batch(one, two, name):
    "Eq 16's last term is a variance: its centre is the whole batch's, not each share's."
    start = 0.02 * torch.randn(3, 64, generator=generator("prompt", 1))
    a, b = one[0][name]["p"], two[0][name]["p"]
    assert (a - b).norm() < 1e-3 * (a - start).norm() and (a - start).norm() > 0.01
    for log in two[1]:
        for terms, want in zip(log[name], one[1][name], strict=True):
            assert terms == pytest.approx(want, rel=1e-3, abs=1e-6)


def test_both_processes_hold_the_same_weights_to_the_last_bit(two):
    assert two[1][0]["hash"] == two[1][1]["hash"]


def test_losses_are_those_of_the_whole_batch(one, two):
    for name in METHODS:
        for log in two[1]:
            assert log[name]["loss"] == pytest.approx(one[1][name]["loss"], rel=1e-4), name


def test_each_works_on_its_share_and_only_the_first_writes_and_speaks(one, two):
    _, (a, b), root, said = two
    assert (a["own"], b["own"]) == (8, 7) and one[1]["own"] == 15
    assert (a["first"], b["first"]) == (True, False) and (a["quiet"], b["quiet"]) == (False, True)
    assert said.count("fine-tune textures: 3/3") == 2, "once for all weights and once for adapters"
    assert len(list(root.glob("cache/stage/*.safetensors"))) == 1 and not list(root.rglob("*.tmp"))


def test_a_stage_is_computed_together_once_and_then_read(two):
    assert [log["calls"] for log in two[1]] == [1, 1]


def test_a_loss_that_is_not_finite_stops_both(two):
    assert all(log["diverged"] for log in two[1])
