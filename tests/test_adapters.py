"""LoRA adapters over their base.

Spellings, settings, what is refused, and their part in merge, convert and path."""

import json

import pytest
import torch
from conftest import near
from lfpm_nb.adapters import is_adapter
from lfpm_nb.core import load_state, save_state
from lfpm_nb.formats import Tower, layout, read_tower, write_tower
from lfpm_nb.purify import merge_files

ATTN = "transformer.resblocks.0.attn"


def adapter(folder, tensors: dict, **config):
    folder.mkdir()
    save_state(
        folder / "adapter_model.safetensors",
        {f"base_model.model.{k}": v for k, v in tensors.items()},
    )
    (folder / "adapter_config.json").write_text(
        json.dumps(dict(peft_type="LORA", r=2, lora_alpha=3, bias="none") | config),
        encoding="utf-8",
    )
    return folder


def thin(module: str, out: int, into: int, seed: int = 0) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(2, into, generator=g),
        f"{module}.lora_B.weight": torch.randn(out, 2, generator=g),
    }


@pytest.fixture(scope="module")
def rest(pico):
    return {
        k: v.detach() for k, v in pico.model.state_dict().items() if not k.startswith("visual.")
    }


@pytest.mark.parametrize("front", ["", "visual.", "model.visual.", "net.visual."])
@pytest.mark.parametrize("rs, s", [(False, 1.5), (True, 3 / 2**0.5)])
def test_packed_attention_under_every_name(pico, rest, tmp_path, front, rs, s):
    """A bare name on a whole CLIP could be the text tower's, so there the base is a vision
    tower alone."""
    base = Tower(pico.state(), rest if front else {}, "open_clip", path="base")
    parts = thin(f"{front}{ATTN}", 192, 64) | thin(f"{front}{ATTN}.base_layer.out_proj", 64, 64, 1)
    got = read_tower(adapter(tmp_path / "a", parts, use_rslora=rs), base).visual
    A, B, C, D = parts.values()
    change = {
        f"{ATTN}.in_proj_weight": s * B @ A,
        f"{ATTN}.out_proj.weight": 2 * s * D @ C,
    }  # peft adds it twice
    for k, v in pico.state().items():
        assert torch.allclose(got[k], v + change.get(k, 0), atol=1e-5), k
    assert sum(not torch.equal(got[k], v) for k, v in pico.state().items()) == 2


def test_hugging_faces_matrices(pico, rest, tmp_path):
    parts = {}
    for i, x in enumerate(("q", "k", "v", "out")):
        parts |= thin(f"vision_model.encoder.layers.1.self_attn.{x}_proj", 64, 64, i)
    got = read_tower(
        adapter(tmp_path / "a", parts), Tower(pico.state(), rest, "open_clip", path="base")
    ).visual
    delta = [
        1.5
        * parts[f"vision_model.encoder.layers.1.self_attn.{x}_proj.lora_B.weight"]
        @ parts[f"vision_model.encoder.layers.1.self_attn.{x}_proj.lora_A.weight"]
        for x in ("q", "k", "v", "out")
    ]
    name = "transformer.resblocks.1.attn"
    assert torch.allclose(
        got[f"{name}.in_proj_weight"],
        pico.state()[f"{name}.in_proj_weight"] + torch.cat(delta[:3]),
        atol=1e-5,
    )
    assert torch.allclose(
        got[f"{name}.out_proj.weight"],
        pico.state()[f"{name}.out_proj.weight"] + delta[3],
        atol=1e-5,
    )


def test_a_name_of_two_towers_is_refused(pico, tmp_path):
    "Text and vision tower of one width: a bare name fits both."
    text = {
        k.removeprefix("visual."): v
        for k, v in layout(pico.state(), {}, "open_clip")[0].items()
        if "transformer" in k
    }
    folder = adapter(tmp_path / "a", thin(f"{ATTN}", 192, 64))
    with pytest.raises(ValueError, match="names fit the vision tower and the text tower"):
        read_tower(folder, Tower(pico.state(), text, "open_clip", path="base"))


@pytest.mark.parametrize(
    "config, why",
    [
        (dict(use_dora=True), "sets use_dora"),
        (dict(peft_type="IA3"), "describes 'IA3'"),
        (dict(init_lora_weights="pissa"), "sets init_lora_weights"),
        (dict(r=3), "expected rank 3"),
        (dict(r="2"), "r is '2'"),
        (dict(lora_alpha=None), "lora_alpha is None"),
        (dict(rank_pattern={"(a+)+": 2}), "has the pattern"),
        (dict(something_new=[1]), "sets something_new"),
        (dict(alpha_pattern=[1]), "alpha_pattern is a list"),
    ],
)
def test_what_is_not_folded(pico, tmp_path, config, why):
    folder = adapter(tmp_path / "a", thin(ATTN, 192, 64), **config)
    with pytest.raises(ValueError, match=why) as e:
        read_tower(folder, Tower(pico.state(), {}, "visual", path="base"))
    assert "\n" not in str(e.value) and str(folder) in str(e.value)


def test_no_base_no_config_no_place(pico, tmp_path):
    base = Tower(pico.state(), {}, "visual", path="base")
    folder = adapter(tmp_path / "a", thin(ATTN, 192, 64))
    with pytest.raises(ValueError, match="is a LoRA adapter.*give that model with --base"):
        read_tower(folder)
    with pytest.raises(
        ValueError, match="does not fit the base base: other.attn is no module of it"
    ):
        read_tower(adapter(tmp_path / "b", thin("other.attn", 192, 64)), base)
    with pytest.raises(ValueError, match="changes a weight of shape .99, 64."):
        read_tower(adapter(tmp_path / "c", thin(ATTN, 99, 64)), base)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="an adapter's alpha stands there"):
        read_tower(folder, base)
    assert not is_adapter(pico.state()) and not is_adapter(
        {**pico.state(), f"{ATTN}.lora_A.weight": 0}
    )


def test_an_adapter_of_another_base_is_refused_where_it_shows(pico, tmp_path):
    k = f"{ATTN}.out_proj"
    parts = thin(ATTN, 192, 64) | {f"{k}.base_layer.weight": pico.state()[f"{k}.weight"] * 2}
    with pytest.raises(ValueError, match="trained over another base"):
        read_tower(adapter(tmp_path / "a", parts), Tower(pico.state(), {}, "visual", path="base"))


def test_adapters_are_contributors_like_others(lab, tmp_path, lfpm):
    """Merged with a whole file, an adapter gives what its folded weights give.

    Convert folds it; the mark and the base's dtype stay."""
    base, other = tmp_path / "base.safetensors", tmp_path / "b.safetensors"
    write_tower(base, Tower(lab.state(), {}, "visual"), visual=None)
    write_tower(other, Tower(near(lab, 1, 0.003), {}, "visual"))
    parts = {k: v * 0.05 for k, v in thin(f"visual.{ATTN}", 576, 192).items()}
    folder = adapter(tmp_path / "ad", parts)
    code, out, err = lfpm(
        "convert",
        str(folder),
        str(tmp_path / "folded.safetensors"),
        "--to",
        "visual",
        "--base",
        str(base),
    )
    assert code == 0 and "is a LoRA adapter of 1 modules, folded over" in err
    for i, file in enumerate((folder, tmp_path / "folded.safetensors")):
        merge_files("TA", [file, other], base, tmp_path / f"m{i}.safetensors")
    one, two = (load_state(tmp_path / f"m{i}.safetensors") for i in range(2))
    assert (
        all(torch.equal(v, two[0][k]) for k, v in one[0].items())
        and "folded over base.safetensors" in one[1]["read"]
        and "read" not in two[1]
    )
    (code, _, err) = lfpm(
        "merge",
        str(folder),
        str(other),
        "--base",
        str(folder),
        "--out",
        str(tmp_path / "n.safetensors"),
    )
    assert (
        code == 2
        and "give that model with --base" in err.splitlines()[-1]
        and not (tmp_path / "n.safetensors").exists()
    )
    code, out, _ = lfpm(
        "path",
        str(folder),
        str(other),
        "--base",
        str(base),
        "--task",
        "signs",
        "--n",
        "2",
        "--n-test",
        "20",
        "--html",
        str(tmp_path / "p.html"),
    )
    assert code == 0 and "| 1.00 |" in out
