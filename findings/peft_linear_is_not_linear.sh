#!/usr/bin/env bash
# add_weighted_adapter(combination_type="linear") does not add the adapters' changes of the weights.
#
# Guess, before the run: "linear" with weights w gives w1 * B1 A1 + w2 * B2 A2 to rounding: Task
#   Arithmetic of adapters.
# Seen 2026-11-30, peft 0.21.2, torch 2.13.0 and 2.14.1, two random adapters of rank 2 on a 16 x 16
#   layer: it adds the As and the Bs, so the product holds B1 A2 and B2 A1 as well: 105 % away from
#   the sum, cosine 0.78. "cat" is exact to 1e-7, at the rank's sum; "svd" cuts back to rank 2 (48 %
#   away). A single adapter with weight -1 is negated as it should be.
# Hurts: papers' Task Arithmetic, TIES or DARE numbers for LoRA merges made with the default
#   "linear" family are of another method, and a coefficient found for dense models means something
#   else.
# Here: merge.check_models refuses adapters and says how to fold them; all merges work on dense
#   weights (tests/test_merge.py).
. "$(dirname "$0")/lib.sh"
packages peft==0.21.2 "torch==$TORCH" numpy
"$PY" - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(1)
config = LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
model = get_peft_model(
    torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False)), config, adapter_name="a"
)
model.add_adapter("b", config)
layer = model.base_model.model[0]
delta = lambda name: layer.get_delta_weight(name).detach()


def error(kind, weights, names=("a", "b")):
    name = f"{kind}{len(layer.lora_A)}"
    model.add_weighted_adapter(list(names), list(weights), name, combination_type=kind)
    want = sum(w * delta(n) for w, n in zip(weights, names))
    got = delta(name)
    print(
        f"{kind:6} weights {weights}: {(got - want).norm() / want.norm():.2%} from the sum, cosine"
        f" {torch.cosine_similarity(got.flatten(), want.flatten(), 0):.3f}"
    )
    return ((got - want).norm() / want.norm()).item()


linear = [error("linear", w) for w in ((1.0, 1.0), (0.3, 0.3), (1.0, -1.0))]
cat = [error("cat", w) for w in ((1.0, 1.0), (0.3, 0.3), (1.0, -1.0))]
error("svd", (1.0, 1.0))
alone = error("linear", (-1.0,), ("a",))
if not (min(linear) > 0.5 and max(cat) < 1e-5 and alone < 1e-5):
    raise SystemExit("CHANGED: linear adds the changes, or cat does not")
print("as recorded")
PYTHON
