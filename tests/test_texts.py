"""Text towers and activations of merges.

What is merged, what is the base's, and what is said about it."""

import pytest
import torch
from conftest import near, pixels
from lfpm_nb.clip import build_clip, lab_config, new_card
from lfpm_nb.core import load_state
from lfpm_nb.formats import Tower, backbone, write_tower
from lfpm_nb.merge import merges
from lfpm_nb.purify import merge_files, open_walk, twin


@pytest.fixture
def family(lab, tmp_path):
    "`family('a', seed, text)` writes a whole CLIP whose text tower has moved by `text`."
    rest = {k: v.detach() for k, v in lab.model.state_dict().items() if not k.startswith("visual.")}

    def write(name, seed=None, text=0.0, form="open_clip", have=True):
        visual = lab.state() if seed is None else near(lab, seed, 0.003)
        moved = {k: v + text * (k != "logit_scale") for k, v in rest.items()} if have else {}
        write_tower(tmp_path / f"{name}.safetensors", Tower(visual, moved, form))
        return tmp_path / f"{name}.safetensors"

    write.rest = rest
    return write


@pytest.mark.parametrize(
    "method", [m for m in merges if not {"images", "clean twins"} & set(merges[m]["needs"])]
)
def test_a_trained_text_tower_is_merged_and_said(family, tmp_path, capsys, method):
    base, files = family("base"), [family("a", 1, 0.01), family("b", 2, 0.03)]
    merge_files(method, files, base, tmp_path / "m.safetensors")
    assert "the text tower is merged too: 2 of 2 files have trained it" in capsys.readouterr().err
    got = load_state(tmp_path / "m.safetensors")[0]
    if method == "SA":
        assert torch.allclose(got["ln_final.bias"], family.rest["ln_final.bias"] + 0.02, atol=1e-6)
    assert not torch.equal(got["ln_final.bias"], load_state(files[0])[0]["ln_final.bias"])
    alone = [family("a", 1), family("b", 2)]
    merge_files(method, alone, base, tmp_path / "n.safetensors")
    same = load_state(tmp_path / "n.safetensors")[0]
    assert "text tower" not in capsys.readouterr().err and all(
        torch.equal(same[k], v) for k, v in family.rest.items()
    )
    assert all(torch.equal(same[k], v) for k, v in got.items() if k.startswith("visual.")), (
        "the vision tower's numbers do not depend on the text tower"
    )


def test_a_text_tower_without_a_base_or_a_place(family, tmp_path, capsys):
    bare, a, b = (
        family("bare", form="visual", have=False),
        family("a", 1, 0.01),
        family("b", 2, 0.03),
    )
    with pytest.raises(
        ValueError, match="different text towers .*bare.safetensors has none .*whole model"
    ):
        merge_files("TA", [a, b], bare, tmp_path / "m.safetensors")
    merge_files(
        "TA",
        [family("c", 3, have=False, form="visual"), b],
        family("base"),
        tmp_path / "m.safetensors",
    )
    assert "b.safetensors brings a text tower of its own" in capsys.readouterr().err


def test_merge_asks_for_the_activation_and_writes_it_down(tmp_path, lfpm):
    import open_clip

    state = {k: v.half() for k, v in open_clip.create_model("ViT-B-32").visual.state_dict().items()}
    for n, d in (("base", 0.0), ("a", 1e-3), ("b", 2e-3)):
        write_tower(
            tmp_path / f"{n}.safetensors",
            Tower({k: v + d for k, v in state.items()}, {}, "task_vectors"),
        )
    files = [
        "merge",
        *(str(tmp_path / f"{n}.safetensors") for n in "ab"),
        "--base",
        str(tmp_path / "base.safetensors"),
        "--out",
        str(tmp_path / "m.safetensors"),
    ]
    code, _, err = lfpm(*files)
    assert (
        code == 0
        and err.count("\n") == 1
        and "--model NAME, e.g. ViT-B-32-quickgelu" in err
        and "quick_gelu" not in load_state(tmp_path / "m.safetensors")[1]
    )
    code, _, err = lfpm(*files, "--model", "ViT-B-32-quickgelu")
    assert (code, err) == (0, "") and load_state(tmp_path / "m.safetensors")[1][
        "quick_gelu"
    ] == "True"
    code, _, err = lfpm(*files, "--model", "ViT-L-14")
    assert code == 2 and "name the model it was made from" in err


def test_path_refuses_the_wrong_activation(tmp_path, monkeypatch):
    "One picture, shown often, that one activation names rightly and the other does not."
    from lfpm_nb import purify as P

    small = lab_config(width=64, layers=2, embed=32, text_width=64, text_layers=1)
    for end in ("", "-quickgelu"):
        clip = build_clip(
            new_card(f"walk{end}", small | dict(quick_gelu=bool(end)), ["a red square"])
            | dict(quick_gelu=bool(end))
        )
    x, state = pixels(1).repeat(40, 1, 1, 1), clip.state()
    gelu, quick = (
        backbone(f"walk{end}", Tower(state, {}, "visual", path="x")) for end in ("", "-quickgelu")
    )
    assert twin(gelu).card["name"] == "walk-quickgelu" and twin(quick).card["quick_gelu"] is False
    means = torch.stack(
        [P.features(c, c.with_state(state), x, dtype=torch.float32)[0] for c in (quick, gelu)]
    )
    W = 100 * torch.nn.functional.normalize(means, dim=1)
    data = type(
        "Task",
        (),
        dict(
            test_x=x,
            test_y=torch.zeros(40, dtype=torch.long),
            classes=["a", "b"],
            templates=["{}"],
            name="t",
        ),
    )
    monkeypatch.setattr(P, "load_task", lambda *a, **kw: data)
    monkeypatch.setattr(P.Vocabulary, "head", lambda self, clip: W)
    for n in "ab":
        write_tower(
            tmp_path / f"{n}.safetensors",
            Tower(
                state,
                {k: v for k, v in clip.model.state_dict().items() if not k.startswith("visual.")},
                "open_clip",
            ),
        )
    files = [tmp_path / f"{n}.safetensors" for n in "ab"]
    with pytest.raises(
        ValueError,
        match="walk is the wrong activation for these weights: 0.0 % are named rightly with walk, "
        "100.0 % with walk-quickgelu",
    ):
        open_walk(*files, "walk", None, "t")
    assert open_walk(*files, "walk-quickgelu", None, "t") and open_walk(
        *files, "walk", None, "t", anyway=True
    )
