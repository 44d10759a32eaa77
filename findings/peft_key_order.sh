#!/usr/bin/env bash
# An adapter that changes nothing, merged and unloaded by peft, returns nn.MultiheadAttention's
# tensors in another order.
#
# Guess, before the run: merge_and_unload() gives the model back as it was, keys in their order.
# Seen 2026-11-30, peft 0.21.2, torch 2.13.0 and 2.14.1: every tensor is equal by name, but
#   in_proj_bias comes before in_proj_weight and out_proj.bias before out_proj.weight. torch's own
#   parameters_to_vector then gives a "task vector" as long as the weights themselves, where the
#   true one is 0. The separate q, k, v of transformers' CLIP keep their order: only open_clip's
#   kind of tower is hit.
# Hurts: merging code that flattens models (parameters_to_vector, zip of values(), an optimiser's
#   state by position): the sizes agree, the vector is nonsense.
# Here: merges go by name; tests/test_order.py shuffles every state dict that is merged.
. "$(dirname "$0")/lib.sh"
packages peft==0.21.2 "torch==$TORCH" transformers==5.24.0 numpy
"$PY" - <<'PYTHON'
import copy

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils import parameters_to_vector
from transformers import CLIPVisionConfig, CLIPVisionModel


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(32, 4, batch_first=True)
        self.fc = torch.nn.Linear(32, 32)

    def forward(self, x):
        return self.fc(self.attn(x, x, x, need_weights=False)[0])


def back(model, targets):
    """(keys before, keys after, largest change by name, length of the flattened models' difference,
    length of the flattened model)"""
    before = copy.deepcopy(model)
    config = LoraConfig(target_modules=targets, r=2)  # lora_B is 0: nothing to merge
    after = get_peft_model(model, config).merge_and_unload()
    a, b = before.state_dict(), after.state_dict()
    change = max((b[k] - v).abs().max().item() for k, v in a.items())
    flat = [parameters_to_vector(m.parameters()).detach() for m in (before, after)]
    return list(a), list(b), change, (flat[1] - flat[0]).norm().item(), flat[0].norm().item()


torch.manual_seed(0)
size = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
)
a, b, change, vector, length = back(Block(), ["attn"])
print(
    "nn.MultiheadAttention:",
    [k for k in b if "attn" in k],
    f"by name changed by {change}, flattened by {vector:.2f} of {length:.2f}",
)
c, d, change2, vector2, _ = back(CLIPVisionModel(CLIPVisionConfig(**size)), ["q_proj", "v_proj"])
print(
    "transformers' CLIP: same order",
    c == d,
    f"by name changed by {change2}, flattened by {vector2}",
)
if not (set(a) == set(b) and a != b and change == 0 and vector > 0.5 * length):
    raise SystemExit("CHANGED: the order is kept, or the tensors are not")
if not (c == d and change2 == 0 and vector2 == 0):
    raise SystemExit("CHANGED: separate projections are reordered too")
print("as recorded")
PYTHON
