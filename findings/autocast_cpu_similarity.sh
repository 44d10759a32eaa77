#!/usr/bin/env bash
# Under autocast a CPU keeps layer norm, normalise and cosine similarity in bfloat16, where the list
# of a GPU has them in float32: 64 different pictures have two or three different similarities to a
# text.
#
# Guess, before the run: reductions go to float32 under autocast on either device; 64 cosines are
#   nearly all different.
# Seen 2026-11-30, torch 2.13.0, 2.14.1 and 2.15.0: on the CPU layer_norm, F.normalize, norm and
#   F.cosine_similarity of a bfloat16 linear layer's output are bfloat16, while cross_entropy,
#   mse_loss and cdist are float32. Features that differ by a tenth: 2 distinct cosines of 64, with
#   .float() before it 64. The same function on a GPU's list (torch/amp documentation) runs in
#   float32.
# Hurts: ranking, top-k, thresholds and accuracies by cosine: ties are broken by position, so a
#   metric moves with the order of the pictures and with the device, by more than any seed.
# Here: clip.logits casts features to float32 before they are normalised (nbs/03_clip).
. "$(dirname "$0")/lib.sh"
packages "torch==$TORCH" numpy
"$PY" - <<'PYTHON'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
project, norm = torch.nn.Linear(512, 512), torch.nn.LayerNorm(512)
centre = torch.randn(1, 512)
x = centre + 0.1 * torch.randn(64, 512)
with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
    h, t = project(x), project(centre)
    kinds = {
        "layer_norm": norm(h),
        "normalize": F.normalize(h, dim=-1),
        "norm": h.norm(dim=-1),
        "cosine_similarity": F.cosine_similarity(h, t),
        "cross_entropy": F.cross_entropy(h, torch.zeros(64, dtype=torch.long)),
        "mse_loss": F.mse_loss(h, h),
        "cdist": torch.cdist(h, h),
    }
    counts = {
        "cosine_similarity": F.cosine_similarity(h, t),
        "product of normalised": F.normalize(h, dim=-1) @ F.normalize(t, dim=-1).T,
        "of .float()": F.cosine_similarity(h.float(), t.float()),
    }
print({k: str(v.dtype) for k, v in kinds.items()})
print(
    "distinct values of 64:",
    {k: v.unique().numel() for k, v in counts.items()},
    f"lowest cosine {counts['of .float()'].min():.4f}",
)
low = {k for k, v in kinds.items() if v.dtype == torch.bfloat16}
few = [counts[k].unique().numel() <= 8 for k in ("cosine_similarity", "product of normalised")]
if (
    low != {"layer_norm", "normalize", "norm", "cosine_similarity"}
    or not all(few)
    or counts["of .float()"].unique().numel() < 60
):
    raise SystemExit("CHANGED: another set of operators is in bfloat16, or the cosines differ")
print("as recorded")
PYTHON
