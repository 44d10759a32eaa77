#!/usr/bin/env bash
# LoRA on nn.MultiheadAttention changes out_proj by twice the adapter, in_proj by once.
#
# Guess, before the run: target_modules=["attn"] adds scale * B A to in_proj_weight and scale * B A
#   to out_proj.weight, each once, as everywhere else.
# Seen 2026-11-30, peft 0.21.2, torch 2.13.0: in_proj moves by 1.00 adapters, out_proj by 2.00, in the
#   forward pass and in merge_and_unload() alike, so the two agree with each other.
# Hurts: whoever folds an adapter file by hand (W + alpha / r * B A) into an open_clip tower: features
#   differ from those of the trained model, and nothing says so.
# Here: notebook 20b_adapters folds it as peft computes it; tests/test_adapters.py.
. "$(dirname "$0")/lib.sh"
packages peft==0.21.2 "torch==$TORCH" numpy
"$PY" - <<'PYTHON'
import copy

import torch
from peft import LoraConfig, get_peft_model


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


torch.manual_seed(0)
plain = Block().double()
config = LoraConfig(target_modules=["attn"], r=2, lora_alpha=4)     # scale: 4 / 2
model = get_peft_model(copy.deepcopy(plain), config)
with torch.no_grad():
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.copy_(torch.randn_like(p) / 10)
lora = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
x = torch.randn(3, 5, 32, dtype=torch.float64)
answer = model(x).detach()
merged = model.merge_and_unload()


def adapter(inner):
    "scale * B A of in_proj (inner False) or out_proj (inner True), from the adapter's own tensors."
    mine = {n: p for n, p in lora.items() if ("base_layer" in n) == inner}
    (A,), (B,) = ([p for n, p in mine.items() if f"lora_{k}" in n] for k in "AB")
    return 2 * B.double() @ A.double()


def times(name, inner):
    "By how many adapters a weight moved: least squares, and how far off that is."
    moved = merged.state_dict()[name] - plain.state_dict()[name]
    one = adapter(inner)
    n = (moved * one).sum() / one.square().sum()
    return n.item(), (moved - n * one).abs().max().item()


seen = {
    "in_proj": times("attn.in_proj_weight", False),
    "out_proj": times("attn.out_proj.weight", True),
}
same = (merged(x) - answer).abs().max().item()
for name, (n, off) in seen.items():
    print(f"{name} moved by {n:.2f} adapters (off by at most {off:.0e})")
print(f"forward pass before and after merging: at most {same:.0e} apart")
exact = all(off < 1e-6 for _, off in seen.values()) and same < 1e-6
if not (exact and abs(seen["in_proj"][0] - 1) < 1e-3 and abs(seen["out_proj"][0] - 2) < 1e-3):
    raise SystemExit("CHANGED: the adapters count otherwise")
print("as recorded")
PYTHON
