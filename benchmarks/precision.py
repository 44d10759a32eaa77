"""Which printed numbers may be made of bfloat16 features: the recorded lab's, in both precisions.

    python benchmarks/precision.py [--n 300] [--defences LFPM SAM]

The same weights are measured with matrix products in bfloat16 and in float32; nothing is trained
but a small subspace. Printed are the largest differences, how many predictions change, and how many
pictures would have two best classes if logits were bfloat16 too."""

import argparse
import os
import time
from collections import Counter

import torch
import torch.nn.functional as F

from lfpm_nb.clip import features, logits
from lfpm_nb.ctl import ctl_curve, linearity, sums
from lfpm_nb.path import Lookout, Path, grid, lam_rules
from lfpm_nb.recorded import load_recorded
from lfpm_nb.subspace import learn_subspace, p_adv

BOTH = (torch.bfloat16, torch.float32)


def predictions(clip, visual, images: torch.Tensor, W: torch.Tensor) -> dict:
    "Counts: images, classes that change to a lower or higher index, images with two best classes."
    z, z32 = (logits(features(clip, visual, images, dtype=d), W) for d in BOTH)
    first, full = z.argmax(1), z32.argmax(1)
    low = z.bfloat16().topk(2).values
    found = dict(
        lower=first < full,
        higher=first > full,
        ties=z.topk(2).values.diff() == 0,
        ties_if_bf16=low.diff() == 0,
    )
    return dict(n=len(images)) | {k: v.sum().item() for k, v in found.items()}


def coefficients(clip, a: dict, b: dict, x: torch.Tensor, dtype) -> list[float]:
    "CTL's coefficient at 11 λ, if it were made of `features`."
    path = Path(clip, a, b)
    h = [features(clip, path.at(lam), x, dtype=dtype) for lam in grid(11)]
    mixed = [(1 - lam) * h[0] + lam * h[-1] for lam in grid(11)]
    return [linearity(sums(v, mix, h[-1] - h[0]))["coefficient"] for v, mix in zip(h, mixed)]


def energy(lab, visual, x: torch.Tensor, triggered: torch.Tensor, dtype) -> list[float]:
    "Percent of the trigger's change in a subspace of rank 32, learned on shadow features."
    seen = lambda images: features(lab.clip, visual, images, dtype=dtype)
    shadow, y = lab.shadow.train
    U, _ = learn_subspace(seen(shadow), y, lab.shadow.W, 32, epochs=2)
    moved = F.normalize(seen(triggered), dim=-1) - F.normalize(seen(x), dim=-1)
    return [100 * (p_adv(U, moved).square().sum() / moved.square().sum()).item()]


def in_both(f) -> list:
    "[f() where towers compute in bfloat16, f() where in float32]."
    out = []
    for wish in "10":
        os.environ["LFPM_AMP"] = wish
        out.append(f())
    del os.environ["LFPM_AMP"]
    return out


def along(lab, theta: dict, end: dict) -> tuple[list, dict]:
    "(the whole curve that rules read, {rule: λ})."
    lookout = Lookout(lab.clip, theta, lab.shadow, lab.mined(theta)[0]["p"])
    curve = list(lookout.along(end))
    return curve, {rule: lam_rules(rule, curve, lookout.pretrained) for rule in lam_rules}


def gap(pair) -> float:
    "Largest difference of two lists of numbers."
    return max(abs(a - b) for a, b in zip(*pair))


def slower(clip, visual, images: torch.Tensor) -> float:
    "CPU seconds of float32 over those of bfloat16."
    took = []
    for dtype in BOTH:
        t0 = time.process_time()
        features(clip, visual, images, dtype=dtype)
        took.append(time.process_time() - t0)
    return took[1] / took[0]


def report_rates(lab, states: list[dict], trigger, n: int) -> None:
    "One line: what happens to the predictions of all models on all tasks, plain and triggered."
    total = Counter()
    for state in states:
        visual = lab.clip.with_state(state)
        for task in lab.tasks.values():
            x = task.test_x[:n]
            images = torch.cat([x, trigger(x)])
            total.update(predictions(lab.clip, visual, images, lab.heads[task.name]))
    print("predictions:", dict(total))


def report_path(lab, theta: dict, name: str) -> None:
    "One line: what the rules for λ read on the way to a defence's end, and what they pick."
    end = lab.defended(name, theta)[1].end
    (curve, lam), (curve32, lam32) = in_both(lambda: along(lab, theta, end))
    of = lambda k: gap(([p[k] for p in curve], [p[k] for p in curve32]))
    shifts = max(gap((p["shift"], q["shift"])) for p, q in zip(curve, curve32))
    print(
        f"{name}: clean {of('clean'):.5f}, prompted {of('prompted'):.5f}, shift {shifts:.5f};"
        f" λ {lam}, in float32 {lam32}"
    )


def report_linearity(lab, theta: dict, name: str, x: torch.Tensor) -> None:
    "One line: CTL's coefficient as it is made, and made of `features`."
    end, at = lab.defended(name, theta)[1].end, grid(11)
    rows = in_both(lambda: ctl_curve(lab.clip, theta, end, x, at))
    made = [[r["coefficient"] for r in of if r["block"] == "feature"] for of in rows]
    other = [coefficients(lab.clip, theta, end, x, dtype) for dtype in BOTH]
    print(f"CTL coefficient: {gap(made):.5f}; made of such features {gap(other):.5f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--n", type=int, default=300, help="test pictures a task, plain and triggered")
    add("--defences", nargs="+", default=["LFPM"], help="whose models and paths")
    args = parser.parse_args()
    lab = load_recorded(tiny=False)
    theta, (target, goal) = lab.both["poisoned"], next(iter(lab.suite.goals.items()))
    visual, x = lab.clip.with_state(theta), lab.tasks[target].test_x[: args.n]

    models = [lab.defended(name, theta)[0] for name in args.defences]
    report_rates(lab, [theta, *models], goal.trigger, args.n)
    print(f"float32 takes {slower(lab.clip, visual, lab.shadow.x):.2f} times bfloat16's CPU time")
    for name in args.defences:
        report_path(lab, theta, name)
    report_linearity(lab, theta, args.defences[0], x[:64])
    shares = [energy(lab, visual, x, goal.trigger(x), dtype) for dtype in BOTH]
    print(f"change in a learned subspace: {gap(shares):.2f} %")


if __name__ == "__main__":
    main()
