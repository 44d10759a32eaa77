"""Records what public libraries make of the toy in `merge_recipe.py`.

One .npz for each library that can be imported, beside this file.

    pip install torch torchvision fusion-bench peft        # in an environment of its own
    pip install torch peft mergekit                        # in another one
    python merge_record.py [folder of a clone of github.com/declare-lab/della]

Random draws are replaced: every mask comes from `merge_recipe.uniform`, called with a key that
names its place. The tests read only the files."""

import importlib.metadata
import importlib.util
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import merge_recipe as R

HERE = Path(__file__).resolve().parent
NAMES = list(R.state())


def version(*packages):
    return ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)


def keep(out, name, state):
    out |= {f"{name}/{k}": v.detach().float().numpy().copy() for k, v in state.items()}


def write(name, versions, out):
    np.savez_compressed(HERE / f"merge_{name}.npz", versions=versions, **out)
    print(name, versions, f"{(HERE / f'merge_{name}.npz').stat().st_size} bytes")


class Draws:
    "Stands in for a random function: the i-th call gets the i-th key."

    def __init__(self, keys):
        self.keys = iter(keys)

    def __call__(self, shape):
        return R.uniform(shape, *next(self.keys))


# --- fusion_bench -------------------------------------------------------------------------------


def pool():
    from fusion_bench.modelpool import BaseModelPool

    return BaseModelPool(
        {"_pretrained_": R.tower(), **{f"m{t}": R.tower(t) for t in range(R.MODELS)}}
    )


def plain(out):
    from fusion_bench.method import TaskArithmeticAlgorithm, TiesMergingAlgorithm
    from fusion_bench.method.dare import DareTaskArithmetic

    keep(out, "TA", TaskArithmeticAlgorithm(scaling_factor=0.3).run(pool()).state_dict())
    for how in ("sum", "mean"):
        keep(
            out,
            f"TIES-{how}",
            TiesMergingAlgorithm(scaling_factor=0.3, threshold=20, remove_keys=[], merge_func=how)
            .run(pool())
            .state_dict(),
        )
    draws = Draws(("DARE", t, k) for t in range(R.MODELS) for k, _ in R.Tower().named_parameters())
    with mock.patch("torch.rand_like", lambda p: draws(p.shape)):
        keep(
            out,
            "DARE",
            DareTaskArithmetic(scaling_factor=0.3, sparsity_ratio=0.5, only_on_linear_weights=False)
            .run(pool())
            .state_dict(),
        )


class Classifier(torch.nn.Module):
    "A tower behind its head, as the generic fisher_merging and regmean_merging call it."

    def __init__(self, t):
        super().__init__()
        self.tower, self.W = R.tower(t).double(), R.head(t).double()
        self.tower.gain = torch.nn.Parameter(
            self.tower.gain.data.reshape(1)
        )  # fisher_merging cannot take the norm of a scalar

    def forward(self, x):
        return types.SimpleNamespace(logits=R.logits(self.tower(x), self.W))


class Trainer:
    _train_batch_size = 8

    def __init__(self, t):
        self.x = R.normalise(R.pixels(24, "examples", t)).double()

    def get_train_dataloader(self):
        return [{"x": x} for x in self.x.split(8)]

    def _prepare_inputs(self, inputs):
        return inputs


def weighted(out):
    "In float64, so that the reference's own rounding stays out of the comparison."
    from fusion_bench.method.fisher_merging.fisher_merging import fisher_merging
    from fusion_bench.method.regmean.regmean import regmean_merging

    models, trainers, n = (
        [Classifier(t) for t in range(R.MODELS)],
        [Trainer(t) for t in range(R.MODELS)],
        [24] * R.MODELS,
    )
    strip = lambda s: {
        k.removeprefix("tower."): v.squeeze() if k == "tower.gain" else v for k, v in s.items()
    }
    keep(out, "Fisher", strip(fisher_merging(models, trainers, [], n)))
    keep(
        out,
        "RegMean",
        strip(regmean_merging(models, trainers, [], n, reduce_non_diagonal_ratio=0.95)),
    )


class Feed:
    """Batches and logits in place of the CLIP ones.

    A task's i-th batch is pixels(PER, 'batch', task, i)."""

    def start(self):
        self.count, self.saved = {}, []

    def get_shuffled_test_loader_iter(self, task):
        while True:
            i = self.count[task] = self.count.get(task, -1) + 1
            yield R.normalise(R.pixels(R.PER, "batch", int(task[1:]), i)), None
            return

    def compute_logits(self, module, batch, task):
        return R.logits(
            module(batch[0] if isinstance(batch, (tuple, list)) else batch), R.head(int(task[1:]))
        )

    def setup_zero_shot_classification_head(self, *args, **kwargs):
        pass


def adaptive(out):
    import lightning as L
    from omegaconf import OmegaConf
    from fusion_bench.method.adamerging.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
    from fusion_bench.method.adamerging.task_wise_adamerging import TaskWiseAdaMergingAlgorithm

    config = dict(
        weights=None,
        init_values=0.3,
        clamp_weights=True,
        tie_weights=False,
        strict=True,
        optimizer="adam",
        lr=0.02,
        max_steps=R.STEPS,
    )
    for name, cls in (
        ("AdaTask", TaskWiseAdaMergingAlgorithm),
        ("AdaLayer", LayerWiseAdaMergingAlgorithm),
    ):
        algorithm = type(name, (Feed, cls), {"log_hyperparams": lambda *a, **k: None})(
            OmegaConf.create(config)
        )
        algorithm.start()
        algorithm._fabric = algorithm._fabric_instance = L.Fabric(accelerator="cpu", devices=1)
        keep(out, name, algorithm.run(pool()).state_dict())


def concrete(out):
    import lightning as L
    from omegaconf import OmegaConf
    from fusion_bench.method.concrete_subspace import (
        clip_concrete_adamerging as ada,
        clip_concrete_task_arithmetic as ta,
    )

    config = dict(
        merge_dtype=None,
        optimizer="adam",
        lr=0.3,
        base_lr=0.5,
        adamerging_lr=0.02,
        scaling_factor=0.3,
        save_interval=1000,
        initial_logits=0,
        temperature=0.5,
        eval_mask_type="continuous",
        mask_checkpoint=None,
        clamp_weights=False,
        tie_weights=False,
        strict=True,
        skip_training=False,
    )
    for name, cls, steps in (
        ("ConcreteTA", ta.ConcreteTaskArithmeticAlgorithmForCLIP, R.STEPS),
        ("ConcreteTask", ada.ConcreteTaskWiseAdaMergingForCLIP, 1),
        ("ConcreteLayer", ada.ConcreteLayerWiseAdaMergingForCLIP, 1),
    ):
        algorithm = type(name, (Feed, cls), {"log_hyperparams": lambda *a, **k: None})(
            OmegaConf.create(config | dict(max_steps=steps, max_adamerging_steps=steps))
        )
        algorithm.start()
        algorithm._fabric_instance = L.Fabric(accelerator="cpu", devices=1)
        draws = Draws(
            ("mask", s, k) for s in [*range(steps), "end"] for k, _ in R.Tower().named_parameters()
        )
        with mock.patch("torch.rand", lambda shape, **kw: draws(shape)):
            keep(out, name, algorithm.run(pool()).state_dict())


# --- peft ---------------------------------------------------------------------------------------


def peft(out):
    "Its functions take one task tensor per model: all weights as one vector."
    from peft.utils import merge_utils

    base = R.state()
    taus = [
        torch.cat([(R.state(t)[k] - base[k]).flatten() for k in NAMES]) for t in range(R.MODELS)
    ]
    kept = int(0.2 * len(taus[0])) + 1  # what the authors' TIES and fusion_bench keep at 20 %
    unflatten = lambda v: {
        k: base[k] + d.reshape(base[k].shape)
        for k, d in zip(NAMES, v.split([base[k].numel() for k in NAMES]))
    }
    keep(
        out,
        "TIES-mean",
        unflatten(merge_utils.ties(taus, torch.ones(R.MODELS), (kept + 0.5) / len(taus[0]))),
    )
    draws = iter(
        torch.cat([R.uniform(base[k].shape, "DARE", t, k).flatten() for k in NAMES])
        for t in range(R.MODELS)
    )
    with mock.patch("torch.bernoulli", lambda p: (next(draws) >= 1 - p).float()):
        keep(
            out, "DARE", unflatten(merge_utils.dare_linear(taus, torch.full((R.MODELS,), 0.3), 0.5))
        )


# --- mergekit, and the DELLA authors' own ranking -----------------------------------------------


def mergekit(out, della):
    """mergekit's DELLA: its keep probabilities, and its election and fusion.

    Its pruning scales a tensor back to its L1 norm where the paper divides by the keep
    probabilities, so the merge is recorded with the pruning of the authors' fork
    (della/mergekit/mergekit/sparsify.py) in its place."""
    from mergekit import sparsify
    from mergekit.merge_methods import generalized_task_arithmetic as gta
    from mergekit.merge_methods.base import TensorGroup

    spec = importlib.util.spec_from_file_location(
        "della_sparsify", Path(della) / "mergekit/mergekit/sparsify.py"
    )
    authors = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(authors)
    base, seen = R.state(), []
    rows = lambda x: x.reshape(len(x), -1) if x.dim() > 1 else x
    method = gta.GeneralizedTaskArithmeticMerge(
        gta.ConsensusMethod.sum,
        gta.SparsificationMethod.della_magprune,
        True,
        True,
        "della",
        None,
        None,
    )
    for k in NAMES:
        if not base[k].dim():
            continue  # scalars: neither takes them
        draws = Draws(("DELLA", t, k) for t in range(R.MODELS))

        def bernoulli(p):
            seen.append(p)
            return (
                draws(p.shape if base[k].dim() > 1 else p.shape[1:]).reshape(p.shape) < p
            ).float()

        with mock.patch("torch.bernoulli", bernoulli):
            sparsify.della_magprune(rows(R.state(0)[k] - base[k]), 0.7, 0.07)
            out[f"rates/{k}"] = seen[-1].reshape(base[k].shape).numpy().copy()
        draws = Draws(("DELLA", t, k) for t in range(R.MODELS))
        prune = lambda delta, density, method, rescale_norm, epsilon: authors.rank_magnitude(
            delta, density, True, epsilon
        ).reshape(delta.shape)
        group = TensorGroup.from_tensors(
            [rows(base[k]), *(rows(R.state(t)[k]) for t in range(R.MODELS))], base_index=0
        )
        same = lambda v: {e.id: v for e in group.non_base}
        with mock.patch("torch.bernoulli", bernoulli), mock.patch.object(gta, "sparsify", prune):
            merged = method.merge_group(
                group,
                weight=same(1.0),
                density=same(0.7),
                epsilon=same(0.07),
                int8_mask=False,
                normalize=True,
                rescale=True,
                **{"lambda": 1.1},
            )
        out[f"DELLA/{k}"] = merged.reshape(base[k].shape).numpy().copy()


def have(name):
    return importlib.util.find_spec(name) is not None


if __name__ == "__main__":
    torch.manual_seed(0)
    if have("fusion_bench"):
        out = {}
        for part in (plain, weighted, adaptive, concrete):
            part(out)
        write("fusion_bench", version("fusion-bench", "torch"), out)
    if have("peft") and not have("mergekit"):
        out = {}
        peft(out)
        write("peft", version("peft", "torch"), out)
    if have("mergekit"):
        out = {}
        mergekit(out, sys.argv[1])
        write("mergekit", version("mergekit", "torch") + ", declare-lab/della 8067515", out)
