"""Paper scale without its weights and pictures.

What the presets say, and the whole main run on a randomly initialised ViT-B/32."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch

import lfpm_nb.attack as A
import lfpm_nb.clip as C
from lfpm_nb import realdata as R
from lfpm_nb.clip import load_clip, untrained, weights_id
from lfpm_nb.core import Stages, file_sha, save_state
from lfpm_nb.experiment import Lab
from lfpm_nb.runs import config_hash, experiments, settings_of
from test_experiment import everything
from test_realdata import hub


def test_orders_are_the_papers():
    order = {
        n: settings_of(n, "paper")
        for n in ("main", "sequence2", "sequence3", "multi_adversary", "dam_two", "dam_four")
    }
    said = lambda n: (order[n].tasks, order[n].adversary, order[n].target, order[n].target_class)
    assert said("main") == (
        ["cifar100", "cars", "sun397", "eurosat", "gtsrb", "pets"],
        "cifar100",
        "cars",
        "Acura RL Sedan 2012",
    )
    assert said("sequence2") == (
        ["cifar10", "cars", "svhn", "sun397", "stl10", "pets"],
        "cifar10",
        "cars",
        "Acura RL Sedan 2012",
    )
    assert said("sequence3") == (
        ["svhn", "cifar10", "food101", "pets", "stl10", "resisc45"],
        "svhn",
        "cifar10",
        "automobile",
    )
    assert said("multi_adversary") == (
        ["cifar100", "cars", "svhn", "cifar10", "sun397", "pets"],
        "cifar100,svhn",
        "cars,cifar10",
        "Acura RL Sedan 2012,automobile",
    )
    assert (
        set(order["dam_two"].tasks) == {"cars", "resisc45", "eurosat", "svhn", "mnist", "dtd"}
        and order["dam_two"].adversary == "resisc45,eurosat"
    )
    for s in order.values():
        assert set(s.tasks) <= set(R.paper_sets) and s.backbone == "ViT-B-32-quickgelu"
        assert (s.anti_epochs, s.epochs, s.batch, s.shadow_n, s.prompt_steps) == (
            5,
            5,
            128,
            10_000,
            5 * 10_000 // 64,
        ), "what LFPM's App. D gives"


def test_every_experiment_of_the_main_run_has_a_paper_preset():
    for n, e in experiments().items():
        if e.notebook != "main":
            continue
        s = settings_of(n, "paper")
        for a in s.attackers:
            classes = R.paper_sets[a.target].classes
            assert classes is None or a.target_class in classes, (
                f"{n}: {a.target} has no {a.target_class}"
            )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A randomly initialised ViT-B/32 in a file, under open_clip's names."
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit") / "weights.safetensors"
    save_state(path, open_clip.create_model("ViT-B-32-quickgelu").state_dict(), quick_gelu="True")
    return path


def test_a_published_backbone_from_a_file(weights, tmp_path):
    name = f"ViT-B-32-quickgelu:{weights}"
    clip = load_clip(name)
    model = open_clip.create_model("ViT-B-32-quickgelu").eval()
    model.load_state_dict(clip.model.state_dict())
    x = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        ours, theirs = clip.visual(clip.normalise(x)), model.visual(clip.normalise(x))
    assert torch.allclose(ours, theirs, atol=1e-5), (
        "open_clip's own model computes the same features"
    )
    assert (
        clip.size == 224
        and clip.card["quick_gelu"]
        and clip.card["sha256"] == weights_id(name) != weights_id("ViT-B-32-quickgelu")
    )
    assert (
        clip.card["open_domain"]["name"] == "imagenet"
        and len(clip.card["open_domain"]["classes"]) == 1000
    )
    s = settings_of("main", "paper")
    assert config_hash("main", s) != config_hash("main", replace(s, backbone=name))
    with pytest.raises(ValueError, match="was trained with quick_gelu=True, ViT-B-32 has False"):
        load_clip(f"ViT-B-32:{weights}")
    with pytest.raises(ValueError, match="lfpm convert .*open_clip"):
        load_clip(f"ViT-B-16-quickgelu:{weights}")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_clip("ViT-B-32-quickgelu:none.safetensors")


def test_openais_weights_come_through_open_clip(weights, monkeypatch):
    asked = []
    monkeypatch.setattr(
        open_clip, "download_pretrained", lambda cfg: asked.append(cfg) or str(weights)
    )
    assert (
        load_clip("ViT-B-32-quickgelu").card["sha256"] == file_sha(weights)
        and asked[0]["quick_gelu"] is True
    )

    def fails(cfg):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "download_pretrained", fails)
    with pytest.raises(
        RuntimeError, match="could not be fetched .*no route to host.*ViT-B-32-quickgelu:FILE"
    ):
        load_clip("ViT-B-32-quickgelu")
    with pytest.raises(ValueError, match="computes GELU"):
        load_clip("ViT-L-14")
    with pytest.raises(ValueError, match="OpenAI published no weights"):
        load_clip("ViT-S-32")


def test_long_contexts_are_cut_without_a_trace():
    clip = untrained("ViT-B-32-quickgelu")
    texts = clip.tokenizer(["a cat", "a photo of a very small dog on a large green field"])
    with torch.no_grad():
        whole, cut = clip.model.encode_text(texts), C.encode_text(clip.model, texts)
    assert (whole - cut).abs().max() < 1e-5 * whole.abs().max()


def shallow(layers: int) -> str:
    "ViT-B/32 with QuickGELU and `layers` blocks in each tower, under a name of open_clip's."
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    if layers == config["vision_cfg"]["layers"]:
        return "ViT-B-32-quickgelu"
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = layers
    with tempfile.TemporaryDirectory() as d:
        path = Path(d) / f"ViT-B-32-shallow{layers}.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        open_clip.add_model_config(path)
    return path.stem


@pytest.mark.slow
@pytest.mark.parametrize(
    "layers", [2, pytest.param(12, marks=pytest.mark.cuda)]
)  # on two cores all twelve blocks take a quarter of an hour
def test_the_whole_main_run_on_a_random_vit(layers, tmp_path, monkeypatch):
    name, weights = shallow(layers), tmp_path / "weights.safetensors"
    save_state(weights, open_clip.create_model(name).state_dict(), quick_gelu="True")
    monkeypatch.setenv("LFPM_DATA", str(tmp_path))
    names = [f"thing {k}" for k in range(12)]
    few = replace(
        R.imagenet(), classes=tuple(names), templates=("a photo of a {}",), at_source=()
    )  # twelve names in one sentence, not a thousand in eighty
    monkeypatch.setattr(R, "imagenet", lambda: few)
    monkeypatch.setattr(C, "imagenet", lambda: few)
    push = A._push_away
    monkeypatch.setattr(
        A, "_push_away", lambda clip, x, W, g: push(clip, x[:4], W, g, steps=1)
    )  # four references, not a hundred
    hub(tmp_path / "imagenet" / "validation-0.parquet", [k % 12 for k in range(24)], names)
    small = dict(
        backbone=f"{name}:{weights}",
        tasks=["letters", "signs"],
        adversary="letters",
        target="signs",
        target_class="yield",
        n_train=8,
        n_test=4,
        n_target=6,
        epochs=1,
        batch=4,
        trigger_steps=1,
        shadow_n=16,
        held=8,
        prompt_steps=1,
        semantic=[2.0],
        anti_epochs=1,
        anti_batch=8,
        lam_n=2,
        path_n=4,
        rho=0.1,
    )
    P = replace(settings_of("main", "paper"), **small)
    P.check_inputs()
    lab = Lab(P, Stages(tmp_path / "stages"))
    rows = everything(lab)
    assert (
        lab.shadow.x.shape[-1] == 224
        and lab.shadow.W.shape == (12, 512)
        and lab.clip.card["quick_gelu"]
    )
    assert {r["method"] for r in rows} == {
        "individual",
        "individual (clean)",
        "TA",
        "TA (clean)",
        "LFPM",
    }
    before, after = lab.merged("TA")[0], lab.defended("LFPM", lab.merged("TA")[0])[1].end
    assert (
        before.keys() == after.keys()
        and all(v.isfinite().all() for v in after.values())
        and any(not torch.equal(before[k], after[k]) for k in before)
    )
    patch = lab.poisoned["letters"][1].patch
    assert patch.shape[-1] == 28 and lab.clip.visual.proj.shape == (768, 512)
