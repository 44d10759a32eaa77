#!/usr/bin/env bash
# LoRA on nn.MultiheadAttention's out_proj changes nothing and learns nothing while it is an
# adapter, and changes the model when merged.
#
# Guess, before the run: peft refuses the layer, or the adapter works like on any Linear.
# Seen 2026-11-30, peft 0.21.2, torch 2.13.0 and 2.14.1: print_trainable_parameters counts it, a
#   random adapter leaves the output as it was (to rounding), backward finds no gradient at all, and
#   merge_and_unload() then moves the output by 0.9. The reason: attention reads out_proj.weight and
#   never calls the layer, so hooks on it do not fire either. target_modules=["attn"] works.
# Hurts: fine-tuning an open_clip tower with the target names that fit transformers' CLIP
#   ("out_proj"): beside layers that do train, nobody sees that these do not; whoever merges
#   adapters of a random start damages the model. The same silence hits forward hooks (activation
#   statistics for RegMean, pruning): out_proj reports no input.
# Here: nbs/04_lora has its own adapters as parametrizations of the weight;
#   tests/test_adaptive.py::test_what_fires_in_open_clip.
. "$(dirname "$0")/lib.sh"
packages peft==0.21.2 "torch==$TORCH" numpy
"$PY" - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(32, 4, batch_first=True)
        self.fc = torch.nn.Linear(32, 32)

    def forward(self, x):
        return self.fc(self.attn(x, x, x, need_weights=False)[0])


def seen(targets):
    "(change by a random adapter, {parameter: has a gradient}, change after merging)"
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 5, 32)
    plain = block(x).detach()
    model = get_peft_model(block, LoraConfig(target_modules=targets, r=2, init_lora_weights=False))
    model.print_trainable_parameters()
    y = model(x)
    if y.requires_grad:
        y.square().sum().backward()
    learns = {
        n.removeprefix("base_model.model."): p.grad is not None
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    return (
        (y - plain).abs().max().item(),
        learns,
        (model.merge_and_unload()(x) - plain).abs().max().item(),
    )


fired = []
attn = torch.nn.MultiheadAttention(32, 4, batch_first=True)
attn.out_proj.register_forward_hook(lambda *_: fired.append(1))
attn(*[torch.randn(1, 3, 32)] * 3)
results = {name: seen(name.split(",")) for name in ("out_proj", "out_proj,fc", "attn")}
for name, (change, learns, merged) in results.items():
    print(
        f"{name}: output moves by {change:.2g}, after merging by {merged:.2g}; gradients: {learns}"
    )
print("hooks on out_proj that fired:", len(fired))
silent, mixed, whole = results.values()
ok = silent[0] < 1e-5 and not any(silent[1].values()) and silent[2] > 0.1
ok &= (
    all(has == k.startswith("fc.") for k, has in mixed[1].items())
    and whole[0] > 0.1
    and all(whole[1].values())
    and abs(whole[0] - whole[2]) < 1e-3
)
if not ok or fired:
    raise SystemExit("CHANGED: out_proj is refused, works, or its hooks fire")
print("as recorded")
PYTHON
