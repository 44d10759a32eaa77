"""Writes baselines_sam.json.

Weights after each SAM and ASAM step of the package pytorch_optimizer on a small problem without
random numbers.
Needs torch and pytorch_optimizer, in an environment of their own: python baselines_sam.py"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from pytorch_optimizer import SAM


def problem():
    "Two weight matrices, 16 inputs and labels: tanh network, 5 inputs, 6 units, 3 classes."
    wave = lambda n, *shape: torch.sin(torch.arange(n, dtype=torch.float64) * 1.7 + 0.3).reshape(
        shape
    )
    return (
        [wave(30, 5, 6) * 0.6, wave(18, 6, 3) * 0.8],
        wave(80, 16, 5) * 2,
        torch.arange(16) * 7 % 3,
    )


def loss(w, x, y):
    return torch.nn.functional.cross_entropy(torch.tanh(x @ w[0]) @ w[1], y)


def run(adaptive: bool, rho: float, base: str, steps: int = 6) -> list:
    start, x, y = problem()
    w = [torch.nn.Parameter(v.clone()) for v in start]
    how = dict(SGD=dict(lr=0.5, momentum=0.9), AdamW=dict(lr=0.05, weight_decay=0.01))[base]
    opt, out = SAM(w, getattr(torch.optim, base), rho=rho, adaptive=adaptive, **how), []

    def closure():
        opt.zero_grad()
        value = loss(w, x, y)
        value.backward()
        return value

    for _ in range(steps):
        closure()
        opt.step(closure)
        out.append([v.detach().flatten().tolist() for v in w])
    return out


if __name__ == "__main__":
    runs = [
        dict(adaptive=a, rho=r, base=b, weights=run(a, r, b))
        for a, r in ((False, 0.05), (False, 1.0), (True, 0.5), (True, 2.0))
        for b in ("SGD", "AdamW")
    ]
    about = dict(pytorch_optimizer=version("pytorch_optimizer"), torch=torch.__version__)
    Path(__file__).with_suffix(".json").write_text(
        json.dumps(dict(about=about, runs=runs)) + "\n", encoding="utf-8"
    )
