"""The backbone.

open_clip's own features, prompts after ln_pre, heads made of words, tokens, loading,
pretraining."""

import hashlib
import json
import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from conftest import near, new_pico, pixels
from lfpm_nb import clip as C
from lfpm_nb.clip import (
    PretrainConfig,
    Tokenizer,
    clip_loss,
    data_card,
    encode,
    features,
    load_clip,
    logits,
    lr_at,
    pretrain,
    ship_clip,
    zero_shot_head,
)
from lfpm_nb.core import amp, proj_path

BOTH = pytest.mark.parametrize("which", ["pico", "lab"])

# --- features -----------------------------------------------------------------------------------


@BOTH
def test_encode_is_open_clips_encode_image(which, request, fp32):
    clip = request.getfixturevalue(which)
    x = clip.normalise(pixels(5))
    with C.whole(clip.visual):
        want = clip.model.encode_image(x)
    assert (
        torch.allclose(encode(clip.visual, x), want, atol=1e-5)
        and want.shape == (5, clip.visual.proj.shape[1])
        and want.std() > 0
    )
    assert torch.allclose(features(clip, clip.visual, pixels(5), batch=2), want, atol=1e-5)


@BOTH
@pytest.mark.parametrize("prompted", [False, True])
def test_the_lighter_tower_has_open_clips_gradients_for_less_work(which, prompted, request, fp32):
    from torch.utils.flop_counter import FlopCounterMode

    clip = request.getfixturevalue(which)
    v, x = clip.with_state(clip.state()).requires_grad_(True), clip.normalise(pixels(4))
    p = torch.randn(3, clip.visual.conv1.out_channels, requires_grad=True) if prompted else None
    wanted = [*v.parameters()] + ([p] if prompted else [])

    def slopes():
        with (
            FlopCounterMode(display=False) as count,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            return torch.autograd.grad(
                encode(v, x, p).square().sum(), wanted
            ), count.get_total_flops()

    ours, work = slopes()
    with C.whole(v):
        theirs, more = slopes()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6
    assert work < (1 - 0.5 / len(v.transformer.resblocks)) * more, (
        "the last block's other tokens are not computed"
    )


def test_whole_towers_are_whole_inside_and_only_there(pico):
    v, t = pico.visual, pico.visual._embeds(pico.normalise(pixels(2)))
    places = lambda: (v.transformer(t).shape[1], v.transformer.resblocks[-1](t).shape[1])
    with pytest.raises(KeyError), C.whole(v):
        assert places() == (17, 17) and type(v.transformer) is open_clip.transformer.Transformer
        assert {type(b) for b in v.transformer.resblocks} == {
            open_clip.transformer.ResidualAttentionBlock
        }
        raise KeyError
    assert places() == (1, 17) and type(pico.with_state(pico.state()).transformer) is type(
        v.transformer
    )


def test_a_tower_that_is_open_clips_own_stays_so():
    v = open_clip.create_model("ViT-B-32").visual
    with C.whole(v):
        pass
    assert type(v.transformer) is open_clip.transformer.Transformer and {
        type(b) for b in v.transformer.resblocks
    } == {open_clip.transformer.ResidualAttentionBlock}


@BOTH
def test_normalise_is_the_same_for_bytes_and_floats(which, request):
    clip, x = request.getfixturevalue(which), pixels(2)
    by_hand = torch.stack(
        [(x[:, c].double() / 255 - clip.card["mean"][c]) / clip.card["std"][c] for c in range(3)], 1
    )
    assert torch.allclose(clip.normalise(x).double(), by_hand, atol=1e-6) and torch.allclose(
        clip.normalise(x / 255), clip.normalise(x), atol=1e-6
    )


def by_hand(v, x, prompt):
    """The visual tower's forward pass written out, with `prompt` behind the class token after
    ln_pre."""
    t = v.conv1(x).flatten(2).transpose(1, 2)
    t = torch.cat([v.class_embedding.expand(len(t), 1, -1), t], 1) + v.positional_embedding
    t = v.ln_pre(t)
    t = torch.cat([t[:, :1], prompt.expand(len(t), -1, -1), t[:, 1:]], 1)
    for block in v.transformer.resblocks:
        n = block.ln_1(t)
        t = t + block.attn(n, n, n, need_weights=False)[0]
        t = t + block.mlp(block.ln_2(t))
    return v.ln_post(t[:, 0]) @ v.proj


@BOTH
def test_prompt_goes_in_after_ln_pre(which, request, fp32):
    clip = request.getfixturevalue(which)
    x, width = clip.normalise(pixels(3)), clip.visual.conv1.out_channels
    for prompt in (torch.randn(4, width), 10 * torch.randn(1, width)):
        assert torch.allclose(
            encode(clip.visual, x, prompt), by_hand(clip.visual, x, prompt), atol=1e-4
        )
    p = torch.randn(4, width)
    assert torch.allclose(
        encode(clip.visual, x, p[:0]), encode(clip.visual, x), atol=1e-4
    )  # no token: no change
    assert (
        encode(clip.visual, x, p) - encode(clip.visual, x, 3 * p)
    ).abs().max() > 1e-3  # its length matters: no ln_pre behind it


def test_prompt_gets_gradients_and_the_tower_none(pico):
    p = (0.1 * torch.randn(3, 64)).requires_grad_(True)
    encode(pico.visual, pico.normalise(pixels(2)), p).square().sum().backward()
    assert (
        p.grad.isfinite().all()
        and (p.grad.norm(dim=-1) > 0).all()
        and all(w.grad is None for w in pico.visual.parameters())
    )


def test_features_do_not_depend_on_the_batch_and_take_prompts(pico, fp32):
    x, p = pixels(7), torch.randn(2, 64)
    for prompt in (None, p):
        assert torch.allclose(
            features(pico, pico.visual, x, prompt, batch=3),
            features(pico, pico.visual, x, prompt),
            atol=1e-5,
        )
    assert features(pico, pico.visual, x).dtype == torch.float32


# --- heads --------------------------------------------------------------------------------------


@BOTH
def test_head_is_clips_zero_shot_classifier(which, request):
    clip = request.getfixturevalue(which)
    classes, templates = ["red circle", "blue square", "stop"], ["a photo of a {}", "a {}"]
    rows = []
    with torch.no_grad():
        for c in classes:
            e = [clip.model.encode_text(clip.tokenizer(t.format(c)))[0] for t in templates]
            mean = sum(v / v.norm() for v in e) / len(e)
            rows.append(clip.model.logit_scale.exp() * mean / mean.norm())
    W = zero_shot_head(clip, classes, templates)
    assert torch.allclose(W, torch.stack(rows), atol=1e-4) and not W.requires_grad
    h = torch.randn(4, W.shape[1])
    want = torch.stack([torch.stack([w @ v / v.norm() for w in rows]) for v in h])
    assert torch.allclose(logits(h, W), want, atol=1e-4) and torch.allclose(
        logits(7 * h, W), want, atol=1e-4
    )


def test_heads_and_logits_are_float32_inside_amp_too(pico, monkeypatch):
    monkeypatch.setenv("LFPM_AMP", "1")
    words = ["a", "dog", "a red sign"], ["{}.", "a photo of {}."]
    W, h = (
        zero_shot_head(pico, *words),
        torch.randn(200, 32, generator=torch.Generator().manual_seed(0)),
    )
    with amp():
        inside, z = zero_shot_head(pico, *words), logits(h, W)
    rounding = 2**-8 * W.norm(dim=1).max()  # bfloat16's, at the length of a row
    assert (inside - W).abs().max() < rounding / 50, (
        "on a CPU `amp` takes another attention, which moves the last bits"
    )
    assert z.dtype == torch.float32 and torch.equal(z, logits(h, W))


def test_features_in_a_given_precision(pico, in_both):
    x = pixels(24)
    f = lambda **how: in_both(lambda: features(pico, pico.visual, x, **how))
    rounded, full = f()
    assert 0 < (rounded - full).norm() < 0.03 * full.norm(), (
        "bfloat16 carries 8 bits, some layers add up"
    )
    assert all(torch.equal(v, full) for v in f(dtype=torch.float32)) and all(
        torch.equal(v, rounded) for v in f(dtype=torch.bfloat16)
    )


def test_head_is_the_same_however_many_texts(pico):
    classes = [f"{n} red" for n in range(400)]
    W = zero_shot_head(pico, classes, ["a {}", "the {}"])  # 800 texts: more than one batch
    assert torch.allclose(
        W[[0, 300, 399]],
        zero_shot_head(pico, [classes[i] for i in (0, 300, 399)], ["a {}", "the {}"]),
        atol=1e-4,
    )


# --- tokens -------------------------------------------------------------------------------------


def test_tokenizer_pools_at_the_end_token(lab):
    ids = lab.tokenizer(["a red circle", "", "a photo of a yield"])
    ends = ids.argmax(1)
    assert (ids.gather(1, ends[:, None]) == lab.tokenizer.size - 1).all()
    for row, e in zip(ids, ends):
        assert (
            (row[: e + 1] > 0).all()
            and (row[e + 1 :] == 0).all()
            and (row[:e] < lab.tokenizer.size - 1).all()
        )
    assert (
        ids.shape == (3, lab.card["config"]["text_cfg"]["context_length"])
        and ids.dtype == torch.long
    )
    assert lab.tokenizer.size == lab.card["config"]["text_cfg"]["vocab_size"]


def test_tokenizer_spells_what_it_never_read():
    bpe = C._bpe()
    tok = Tokenizer(bpe.encode("red circle"), context=40)
    assert tok.unread("red zebra circle") == ["zebra"] and tok.unread("red circle") == []
    for text in ("zebra", "red zebra", "naïve 東 🙂"):
        ids = [i for i in tok(text)[0].tolist() if i > 0]
        old = [tok.ids[i - 1] for i in ids]  # back to CLIP's own numbers
        assert (old[0], old[-1]) == (bpe.sot_token_id, bpe.eot_token_id) and bpe.decode(
            old[1:-1]
        ).split() == text.split()
    assert len(tok("zebra")[0].nonzero()) == 2 + len("zebra")  # a byte a letter
    assert not torch.equal(tok("red"), tok("zed"))


def test_tokenizer_cuts_long_texts():
    tok = Tokenizer([], context=8)
    ids = tok("an extraordinarily long caption " * 5)[0]
    assert len(ids) == 8 and (ids > 0).all() and ids[-1] == tok.size - 1 and ids.argmax() == 7
    assert torch.equal(tok("one two"), tok(["one two"])) and len(tok([])) == 0


def test_tokenizer_with_all_tokens_is_clips_own():
    bpe = C._bpe()
    tok, texts = (
        Tokenizer(list(range(len(bpe.encoder))), context=77),
        ["a photo of a dog", "unbelievably zig-zagged!"],
    )
    back = torch.tensor([0] + tok.ids)[tok(texts)]
    assert torch.equal(back, open_clip.get_tokenizer("ViT-B-32")(texts))


# --- loading ------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    "A data folder of its own with `pico` in it: (weights, card path, the Clip that was shipped)."
    clip = new_pico("pico-shipped")
    weights = ship_clip(clip, tmp_path / "data", steps=0)
    monkeypatch.setattr(C, "proj_path", lambda *parts: tmp_path.joinpath(*parts))
    return weights, tmp_path / "data" / "pico-shipped.card.json", clip


def rewrite(weights, card, state=None, meta=None, **fields):
    """Other weights or metadata in the shipped file, its card's sha256 set right.

    Other fields in the card."""
    state = load_file(weights) if state is None else state
    save_file(state, weights, meta or {"quick_gelu": "False"})
    c = (
        json.loads(card.read_text(encoding="utf-8"))
        | {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
        | fields
    )
    card.write_text(json.dumps(c), encoding="utf-8")


def test_ship_and_load_round_trip(shipped):
    clip = load_clip("PICO-shipped")
    assert all(
        torch.equal(v, shipped[2].model.state_dict()[k].half().float())
        for k, v in clip.model.state_dict().items()
    )
    assert not any(p.requires_grad for p in clip.model.parameters()) and not clip.model.training
    assert (
        clip.card["training"] == {"steps": 0}
        and clip.size == 32
        and sorted(p.name for p in shipped[0].parent.iterdir())
        == sorted(p.name for p in shipped[:2])
    )


def test_load_refuses_unknown_missing_damaged(shipped):
    with pytest.raises(
        ValueError, match="unknown backbone 'pico-shiped'; did you mean 'pico-shipped'"
    ):
        load_clip("pico-shiped")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere"):
        load_clip("pico-shipped", shipped[0].parent / "nowhere.safetensors")
    whole = shipped[0].read_bytes()
    shipped[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        load_clip("pico-shipped")
    shipped[0].unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_clip("pico-shipped")


def test_load_refuses_another_architecture(shipped, tmp_path):
    rewrite(
        *shipped[:2],
        state={k: v for k, v in load_file(shipped[0]).items() if "resblocks.1" not in k},
    )
    with pytest.raises(ValueError, match="differ in .* only in the first"):
        load_clip("pico-shipped")
    rewrite(
        *shipped[:2],
        state={
            k: v[..., :1].contiguous() if v.ndim > 1 else v
            for k, v in shipped[2].model.state_dict().items()
        },
    )
    with pytest.raises(ValueError, match=r"differ in .*\(.*\) vs \(.*\)"):
        load_clip("pico-shipped")


def test_load_refuses_the_shipped_weights_under_another_card(shipped):
    with pytest.raises(ValueError, match="backbone pico-shipped and lfpm-lab.safetensors differ"):
        load_clip("pico-shipped", proj_path("data", "lfpm-lab.safetensors"))


def test_load_refuses_nan(shipped):
    state = load_file(shipped[0])
    state["visual.proj"][0, 0] = float("nan")
    rewrite(*shipped[:2], state=state)
    with pytest.raises(ValueError, match="visual.proj"):
        load_clip("pico-shipped")


def test_load_refuses_a_wrong_activation(shipped):
    rewrite(*shipped[:2], meta={"quick_gelu": "True"})
    with pytest.raises(ValueError, match="quick_gelu=True, the card says False"):
        load_clip("pico-shipped")


def test_load_refuses_a_wrong_sha256(shipped):
    state = load_file(shipped[0])
    state["visual.proj"][0, 0] += 1
    save_file(state, shipped[0], {"quick_gelu": "False"})
    with pytest.raises(ValueError, match="has sha256 .* its card says"):
        load_clip("pico-shipped")


def test_a_shipped_backbone_is_safetensors(shipped, tmp_path):
    with C.whole(shipped[2].visual):
        torch.save(shipped[2].model, tmp_path / "whole.pt")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_clip("pico-shipped", tmp_path / "whole.pt")


def test_activation_follows_the_card(shipped):
    kinds = {
        q: {
            type(m).__name__
            for m in C.build_clip({**shipped[2].card, "quick_gelu": q}).model.modules()
        }
        for q in (True, False)
    }
    assert "QuickGELU" in kinds[True] and "QuickGELU" not in kinds[False] and "GELU" in kinds[False]


# --- theta_pre and others -----------------------------------------------------------------------


def test_state_is_a_copy_of_the_visual_tower(pico):
    s = pico.state()
    assert s.keys() == pico.visual.state_dict().keys() and all(
        torch.equal(v, pico.visual.state_dict()[k]) for k, v in s.items()
    )
    s["proj"].zero_()
    assert pico.visual.proj.abs().sum() > 0


def test_with_state_carries_the_weights_and_leaves_the_backbone(pico):
    other, before = near(pico, 1), pico.state()
    v = pico.with_state(other)
    assert (
        all(torch.equal(t, other[k]) for k, t in v.state_dict().items())
        and not v.training
        and not any(p.requires_grad for p in v.parameters())
    )
    with torch.no_grad():
        v.proj.zero_()
    assert (
        all(torch.equal(t, before[k]) for k, t in pico.state().items())
        and other["proj"].abs().sum() > 0
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("proj"), "proj only in the first"),
        (lambda s: s.update(extra=torch.ones(1)), "extra only in the second"),
        (lambda s: s.update(proj=torch.ones(3, 3)), r"proj: \(64, 32\) vs \(3, 3\)"),
        (
            lambda s: s["conv1.weight"].view(-1)[0].fill_(float("nan")),
            "NaN or infinity .first: conv1.weight",
        ),
        (lambda s: s["proj"].view(-1)[0].fill_(float("inf")), "NaN or infinity"),
    ],
)
def test_with_state_refuses(pico, change, message):
    s = pico.state()
    change(s)
    with pytest.raises(ValueError, match=message):
        pico.with_state(s)


# --- what is shipped ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(C.data_cards()))
def test_shipped_weights(name):
    card, path = data_card(name), proj_path("data", f"{name}.safetensors")
    state = load_file(path)
    assert sum(v.numel() for k, v in state.items() if k.startswith("visual.")) <= (
        1_500_000 if name == "lfpm-lab" else 2_500_000
    )
    assert path.stat().st_size <= 20e6 and {v.dtype for v in state.values()} == {torch.float16}
    assert hashlib.sha256(path.read_bytes()).hexdigest() == card["sha256"] and card["training"]
    assert {"name", "config", "quick_gelu", "mean", "std", "vocab"} <= card.keys() and card[
        "name"
    ] == name
    clip = load_clip(name)
    assert (
        open_clip.create_model(name, force_quick_gelu=card["quick_gelu"]).visual.state_dict().keys()
        == clip.visual.state_dict().keys()
    )
    assert type(clip.visual) is open_clip.transformer.VisionTransformer  # open_clip's own code


def test_shipped_vocabulary_reads_every_built_in_prompt(lab):
    from lfpm_nb.tasks import prompt_corpus

    assert {w for t in prompt_corpus() for w in lab.tokenizer.unread(t)} == set()


# --- pretraining --------------------------------------------------------------------------------


def test_clip_loss_against_loops():
    g = torch.Generator().manual_seed(0)
    img, txt = (F.normalize(torch.randn(5, 4, generator=g), dim=-1) for _ in range(2))
    group, s = [0, 1, 0, 2, 1], 3.0
    total = 0.0
    for a, b in ((img, txt), (txt, img)):
        for i in range(5):
            z = math.log(sum(math.exp(s * float(a[i] @ b[j])) for j in range(5)))
            own = [j for j in range(5) if group[j] == group[i]]
            total += sum(z - s * float(a[i] @ b[j]) for j in own) / len(own) / 10
    assert clip_loss(img, txt, torch.tensor(s), torch.tensor(group)).item() == pytest.approx(
        total, rel=1e-5
    )


def test_schedule_warms_up_and_ends_near_zero():
    lrs = [lr_at(s, 200, 2.0, 20) for s in range(200)]
    assert (
        lrs[:20] == pytest.approx([2 * (s + 1) / 20 for s in range(20)])
        and max(lrs) == 2
        and 0 < lrs[-1] < 0.01
    )
    assert (
        all(a >= b for a, b in zip(lrs[20:], lrs[21:])) and lr_at(0, 5, 1.0, 100) == 1.0
    )  # short runs: a tenth at most


def test_pretraining_goes_on_where_it_stopped(tmp_path):
    cfg = PretrainConfig(
        steps=7, batch=16, pool=32, reuse=1, warmup=2
    )  # a new pool every two steps
    draws = []

    def draw(n, seed, stop=None):
        draws.append(seed)
        if seed[1] == stop:
            raise KeyboardInterrupt
        g = torch.Generator().manual_seed(seed[1])
        return pixels(n, seed[1]), [
            f"{('red', 'blue', 'green')[i]} circle" for i in torch.randint(3, (n,), generator=g)
        ]

    whole, broken, resumed = (new_pico() for _ in range(3))
    losses = pretrain(whole, draw, cfg, tmp_path / "a.pt", every=3)
    with pytest.raises(KeyboardInterrupt):
        pretrain(broken, lambda n, seed: draw(n, seed, stop=2), cfg, tmp_path / "b.pt", every=3)
    draws.clear()
    again = pretrain(resumed, draw, cfg, tmp_path / "b.pt", every=3)
    assert draws == [(0, 1), (0, 2), (0, 3)], (
        "it starts from the checkpoint of step 3, in the middle of pool 1"
    )
    assert again == losses and len(losses) == 7
    assert all(
        torch.equal(v, resumed.model.state_dict()[k]) for k, v in whole.model.state_dict().items()
    )
    assert pretrain(new_pico(), draw, cfg, tmp_path / "b.pt") == losses, (
        "a finished run has nothing left to do"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "b.pt"]


def test_pretraining_learns(tmp_path):
    colours = torch.tensor(
        [[255, 0, 0], [0, 0, 255], [0, 255, 0], [255, 255, 0]], dtype=torch.uint8
    )

    def draw(n, seed):
        y = torch.randint(4, (n,), generator=torch.Generator().manual_seed(seed[1]))
        return colours[y][:, :, None, None].expand(-1, -1, 32, 32).contiguous(), [
            ("red", "blue", "green", "yellow")[i] for i in y
        ]

    losses = pretrain(
        new_pico(), draw, PretrainConfig(steps=30, batch=32, pool=64, lr=2e-3), tmp_path / "c.pt"
    )
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
