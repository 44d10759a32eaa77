"""The toy that the merging parity tests and `merge_record.py` share.

Weights, images, heads and random draws from numpy's frozen RandomState.
Needs only numpy and torch, so that it also runs where the reference libraries are installed and
this kit is not."""

import zlib

import numpy as np
import torch
import torch.nn.functional as F

MODELS, STEPS, PER = 3, 3, 5


def stream(*key) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(repr(key).encode()))


def uniform(shape, *key) -> torch.Tensor:
    "Numbers in [0, 1): every mask of a reference and of this kit is decided by these."
    return torch.from_numpy(stream("uniform", *key).random_sample(tuple(shape)).astype(np.float32))


class Tower(torch.nn.Module):
    """A conv kernel, two linear layers, vectors and a scalar.

    Images (N, 3, 8, 8) to features (N, 8)."""

    image_size = 8

    def __init__(self):
        super().__init__()
        self.conv, self.fc1, self.ln, self.fc2 = (
            torch.nn.Conv2d(3, 6, 4, 4),
            torch.nn.Linear(6, 10),
            torch.nn.LayerNorm(10),
            torch.nn.Linear(10, 8, bias=False),
        )
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.fc2(self.ln(F.gelu(self.gain * self.fc1(tokens)).mean(1)))


def state(t: int | None = None, size: float = 0.3) -> dict:
    "The base's state dict, or with `t` that of model t: base plus noise."
    base = {
        k: torch.from_numpy(stream("base", k).standard_normal(v.shape).astype(np.float32)).reshape(
            v.shape
        )
        * 0.5
        for k, v in Tower().state_dict().items()
    }
    if t is None:
        return base
    return {
        k: b
        + size
        * torch.from_numpy(np.asarray(stream("model", t, k).standard_normal(b.shape), np.float32))
        for k, b in base.items()
    }


def tower(t: int | None = None) -> Tower:
    m = Tower()
    m.load_state_dict(state(t))
    return m


def pixels(n: int, *key) -> torch.Tensor:
    "uint8 images (n, 3, 8, 8)."
    return torch.from_numpy(stream("pixels", *key).randint(0, 256, (n, 3, 8, 8)).astype(np.uint8))


def normalise(x: torch.Tensor) -> torch.Tensor:
    return (x.float() / 255 - 0.5) / 0.25


def head(t: int) -> torch.Tensor:
    "W (4 + t, 8): 5 x unit rows."
    return 5 * F.normalize(
        torch.from_numpy(stream("head", t).standard_normal((4 + t, 8)).astype(np.float32)), dim=-1
    )


def logits(h: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    return F.normalize(h, dim=-1) @ W.T
