"""Our merges on the toy of `merge_recipe.py` against recorded values, and mutants.

The same modules with one line changed, which must not pass."""

import contextlib
import functools
import sys
import types
from pathlib import Path

import numpy as np
import torch

import lfpm_nb.adaptive
import lfpm_nb.merge
from lfpm_nb.clip import Clip
from reference import merge_recipe as R

TOLERANCE = 1e-6


@functools.lru_cache(None)
def recorded(library: str) -> tuple[str, dict]:
    "(versions, {name/tensor: array})."
    with np.load(Path(__file__).parent / f"merge_{library}.npz") as f:
        return str(f["versions"]), {k: f[k] for k in f.files if k != "versions"}


def expected(library: str, name: str) -> dict:
    return {
        k.removeprefix(f"{name}/"): torch.from_numpy(v)
        for k, v in recorded(library)[1].items()
        if k.startswith(f"{name}/")
    }


def error(ours: dict, library: str, name: str) -> float:
    """Largest absolute difference over the recorded tensors.

    At least three, with a vector and a conv kernel among them."""
    want = expected(library, name)
    assert {1, 2, 4} <= {v.dim() for v in want.values()} and want.keys() <= ours.keys()
    return max((ours[k].double() - v.double()).abs().max().item() for k, v in want.items())


BASE, MODELS = R.state(), [R.state(t) for t in range(R.MODELS)]


def clip() -> Clip:
    return Clip(types.SimpleNamespace(visual=R.tower()), None, dict(mean=[0.5] * 3, std=[0.25] * 3))


def data(adaptive=lfpm_nb.adaptive):
    return adaptive.Unlabelled(
        clip(),
        [R.pixels(24, "examples", t) for t in range(R.MODELS)],
        [R.head(t) for t in range(R.MODELS)],
    )


def feed(self, per_task, *seed):
    "Stands in for Blend.batches."
    i = 0
    while True:
        yield [R.normalise(R.pixels(R.PER, "batch", t, i)) for t in range(R.MODELS)]
        i += 1


@contextlib.contextmanager
def recorded_draws(*modules):
    "The modules draw the recorded masks and, where they have a Blend, the recorded batches."
    draw = lambda shape, name, seed, *rest: R.uniform(shape, name, *rest)
    old = [(m, m.uniform, getattr(m, "Blend", None) and m.Blend.batches) for m in modules]
    for m, _, batches in old:
        m.uniform = draw
        if batches:
            m.Blend.batches = feed
    try:
        yield
    finally:
        for m, uniform, batches in old:
            m.uniform = uniform
            if batches:
                m.Blend.batches = batches


def mutant(module, line: str, changed: str):
    """A copy of a library module in which `line`, found exactly once, reads `changed`.

    The registry stays as it was."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(line) == 1, (
        f"{line!r} occurs {source.count(line)} times in {module.__name__}"
    )
    copy, registry = types.ModuleType(f"{module.__name__}_mutant"), dict(lfpm_nb.merge.merges)
    copy.__package__, copy.__file__ = "lfpm_nb", module.__file__
    sys.modules[copy.__name__] = copy  # dataclasses look their module up
    try:
        exec(compile(source.replace(line, changed), module.__file__, "exec"), copy.__dict__)
    finally:
        del sys.modules[copy.__name__]
        lfpm_nb.merge.merges.clear()
        lfpm_nb.merge.merges.update(registry)
    return copy
