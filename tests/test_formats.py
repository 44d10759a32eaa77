"""Checkpoints of other libraries: what is read, and what comes out bit for bit.

And what is refused, with which words."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from conftest import near, pixels
from lfpm_nb.clip import build_clip, features, lab_config, new_card
from lfpm_nb.core import load_state, save_state
from lfpm_nb.formats import (
    FORMS,
    Tower,
    backbone,
    convert,
    detect,
    fitted,
    heads,
    key_errors,
    layout,
    plain_models,
    read_tower,
    sizes,
    take,
    with_base,
    write_tower,
)


@pytest.fixture(scope="module")
def whole():
    "A whole small CLIP as a Tower, with numbers that fp16 cannot hold."
    torch.manual_seed(1)
    clip = build_clip(
        new_card(
            "whole",
            lab_config(width=64, layers=2, embed=32, text_width=64, text_layers=1),
            ["a red square"],
        )
    )
    return take(clip.model.state_dict())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items()
    )


@pytest.mark.parametrize("a, b", list(product(FORMS, FORMS)))
def test_round_trip_is_exact_through_files(whole, tmp_path, a, b):
    files = [tmp_path / f"{i}.safetensors" for i in range(4)]
    write_tower(files[0], whole, "open_clip")  # the base
    convert(files[0], files[1], a)
    convert(files[1], files[2], b, files[0])
    convert(files[2], files[3], a, files[0])
    first, last = load_state(files[1])[0], load_state(files[3])[0]
    assert (
        detect(first) == detect(last) == a
        and detect(load_state(files[2])[0]) == b
        and same(first, last)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_survive(whole, tmp_path, dtype):
    cast = replace(whole, visual={k: v.to(dtype) for k, v in whole.visual.items()}, rest={})
    for form in ("hf", "task_vectors", "visual"):
        write_tower(tmp_path / "x.safetensors", cast, form)
        assert all(v.dtype == dtype for v in load_state(tmp_path / "x.safetensors")[0].values())


def test_formats_look_as_their_libraries_write_them(whole):
    names = {f: set(layout(whole.visual, whole.rest, f)[0]) for f in FORMS}
    assert (
        "visual.transformer.resblocks.1.attn.in_proj_weight" in names["open_clip"]
        and "token_embedding.weight" in names["open_clip"]
    )
    assert names["openai"] == names["open_clip"] | {
        "input_resolution",
        "context_length",
        "vocab_size",
    }
    assert {"model.visual.proj", "model.ln_final.weight", "model.logit_scale"} <= names[
        "task_vectors"
    ] and not any(k.startswith("model.transformer") for k in names["task_vectors"])
    assert {
        "vision_model.pre_layrnorm.weight",
        "vision_model.encoder.layers.0.self_attn.q_proj.bias",
    } <= names["hf"] and not any("proj.weight" in k and "attn" not in k for k in names["hf"])
    assert names["hf5"] == {k.removeprefix("vision_model.") for k in names["hf"]}
    assert {
        "visual_projection.weight",
        "text_projection.weight",
        "text_model.final_layer_norm.bias",
        "logit_scale",
    } <= names["hf_clip"] - names["hf"]
    ints = layout(whole.visual, whole.rest, "openai")[0]
    assert (int(ints["input_resolution"]), int(ints["context_length"])) == (32, 24) and len(
        names["visual"]
    ) == len(whole.visual)


def test_what_a_format_cannot_hold_is_said(whole):
    assert layout(whole.visual, whole.rest, "hf")[1] == ["proj", *sorted(whole.rest)] and layout(
        whole.visual, whole.rest, "visual"
    )[1] == sorted(whole.rest)
    assert {k.split(".")[0] for k in layout(whole.visual, whole.rest, "task_vectors")[1]} == {
        "transformer"
    } and layout(whole.visual, whole.rest, "hf_clip")[1] == []


def test_old_position_ids_come_back(whole):
    ids = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    state = layout(whole.visual, {}, "hf")[0] | ids
    tower = take(state)
    assert not key_errors(tower.visual, whole.visual.keys() - {"proj"}) and same(
        layout(tower.visual, tower.rest, "hf")[0], state
    )


def test_hugging_face_folder_and_its_config(whole, tmp_path, pico):
    write_tower(tmp_path / "model.safetensors", whole, "hf")
    (tmp_path / "config.json").write_text(
        json.dumps(dict(num_attention_heads=1, hidden_act="gelu")), encoding="utf-8"
    )
    tower = read_tower(tmp_path)
    assert (
        tower.meta["heads"] == 1
        and tower.meta["quick_gelu"] is False
        and same(
            fitted(tower, pico),
            {**{k: v for k, v in whole.visual.items() if k != "proj"}, "proj": pico.visual.proj}
            | {},
        )
    )
    (tmp_path / "config.json").write_text(
        json.dumps(dict(vision_config=dict(num_attention_heads=2, hidden_act="gelu"))),
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match="says 2 attention heads, pico has 1"):
        fitted(read_tower(tmp_path), pico)
    (tmp_path / "config.json").write_text(
        json.dumps(dict(num_attention_heads=1, hidden_act="quick_gelu")), encoding="utf-8"
    )
    with pytest.raises(
        ValueError, match="trained with QuickGELU, pico computes GELU.*name the model that matches$"
    ):
        fitted(read_tower(tmp_path), pico)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="no JSON"):
        read_tower(tmp_path)


def test_pt_state_dicts_and_data_parallel(whole, tmp_path):
    torch.save(
        {f"module.{k}": v for k, v in layout(whole.visual, whole.rest, "task_vectors")[0].items()},
        tmp_path / "x.pt",
    )
    tower = read_tower(tmp_path / "x.pt")
    assert (
        tower.form == "task_vectors"
        and same(tower.visual, whole.visual)
        and len(tower.sha256) == 64
    )


# --- refused ------------------------------------------------------------------------------------


def test_rounded_position_numbers_are_made_again(whole, tmp_path):
    "bfloat16 holds no 257; a file in half precision has floats where whole numbers belong."
    key = "vision_model.embeddings.position_ids"
    for ids in (
        torch.arange(17)[None].bfloat16(),
        (torch.arange(17)[None] * 1.5).half(),
        torch.arange(17)[None] + 1,
    ):
        back = take(layout(whole.visual, {}, "hf")[0] | {key: ids}).rest[key]
        assert back.dtype == torch.int64 and torch.equal(back, torch.arange(17)[None])


@pytest.mark.parametrize(
    "text", ["[]", "3", '"x"', "null", '{"vision_config": [1]}', "[" * 100_000]
)
def test_a_config_that_is_no_object(whole, tmp_path, text):
    write_tower(
        tmp_path / "model.safetensors", replace(whole, meta=dict(heads=1, quick_gelu=False)), "hf"
    )
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="config.json (holds a|says|is no JSON)") as e:
        read_tower(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(class_embedding=None), "1 missing .class_embedding"),
        (dict(class_embedding=torch.ones(65)), "class_embedding has shape .65,., expected .64,."),
        ({"transformer.resblocks.1.ln_2.bias": None}, "1 missing"),
        (dict(odd=torch.ones(2)), "1 unexpected .odd"),
        (dict(positional_embedding=torch.ones(16, 64)), "positional_embedding has shape"),
    ],
)
def test_a_tower_that_lost_something(whole, tmp_path, change, why):
    save_state(
        tmp_path / "x.safetensors",
        {k: v for k, v in (whole.visual | change).items() if v is not None},
    )
    with pytest.raises(ValueError, match=f"x.safetensors is no whole vision tower: .*{why}"):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "hf")


@pytest.mark.parametrize("size", [0, 5, 500, -100])
def test_truncated_safetensors(whole, tmp_path, size):
    f = tmp_path / "x.safetensors"
    write_tower(f, whole, "hf")
    f.write_bytes(f.read_bytes()[:size])
    with pytest.raises(ValueError, match="x.safetensors is damaged"):
        convert(f, tmp_path / "y.safetensors", "open_clip")
    assert not (tmp_path / "y.safetensors").exists()


def test_no_tower_no_file_no_projection(whole, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_tower(tmp_path / "none.safetensors")
    save_state(tmp_path / "x.safetensors", {"a.weight": torch.ones(2), "b": torch.ones(1)})
    with pytest.raises(
        ValueError, match="x.safetensors: no CLIP vision tower: 2 keys, first a.weight, b"
    ):
        read_tower(tmp_path / "x.safetensors")
    write_tower(tmp_path / "hf.safetensors", whole, "hf")
    with pytest.raises(ValueError, match="has a projection .* --base"):
        convert(tmp_path / "hf.safetensors", tmp_path / "y.safetensors", "open_clip")
    with pytest.raises(ValueError, match="did you mean 'open_clip'"):
        convert(tmp_path / "hf.safetensors", tmp_path / "y.safetensors", "open_clp")
    with pytest.raises(ValueError, match="does not end in .safetensors"):
        convert(tmp_path / "hf.safetensors", tmp_path / "y.pt", "hf5")
    with pytest.raises(ValueError, match="is the file that is read"):
        convert(tmp_path / "hf.safetensors", tmp_path / "hf.safetensors", "hf5")


def test_first_three_keys_and_the_count(pico):
    state = pico.state()
    t = lambda visual: Tower(visual, {}, "visual", path="mine.safetensors")
    says = (
        r"mine.safetensors \(visual\) does not fit pico: 4 missing "
        r"\(ln_post.bias, ln_post.weight, ln_pre.bias, …\); 1 unexpected \(odd\) of"
    )
    with pytest.raises(ValueError, match=says):
        fitted(
            t(
                {k: v for k, v in state.items() if not k.startswith("ln_p")}
                | {"odd": torch.ones(1)}
            ),
            pico,
        )
    with pytest.raises(
        ValueError, match="1 missing .*in_proj_weight.*2 unexpected"
    ):  # Hugging Face's q, k, v without v
        hf = layout(state, {}, "hf")[0]
        fitted(
            replace(
                take(
                    {
                        k: v
                        for k, v in hf.items()
                        if k != "vision_model.encoder.layers.0.self_attn.v_proj.weight"
                    }
                ),
                path="x",
            ),
            pico,
        )
    with pytest.raises(ValueError, match="NaN"):
        fitted(t({k: v * float("nan") for k, v in state.items()}), pico)


def test_wrong_size_names_the_difference(pico, lab):
    says = (
        "has width 64, layers 2, mlp 160, output 32; "
        "lfpm-lab has width 192, layers 4, mlp 480, output 128"
    )
    with pytest.raises(ValueError, match=says):
        fitted(Tower(pico.state(), {}, "visual", path="x"), lab)
    bigger = pico.state() | {"positional_embedding": torch.zeros(50, 64)}
    with pytest.raises(ValueError, match="pixels 56; pico has pixels 32"):
        fitted(Tower(bigger, {}, "visual", path="x"), pico)
    with pytest.raises(ValueError, match="of different sizes: width 64 and 192"):
        with_base(
            Tower(pico.state(), {}, "visual", path="a"), Tower(lab.state(), {}, "visual", path="b")
        )


@pytest.mark.parametrize(
    "key",
    [
        "visual.transformer.resblocks.0.attn.parametrizations.in_proj_weight.0.A",
        "base_model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_adapters_must_be_folded(key):
    with pytest.raises(ValueError, match="1 adapter tensors .* fold them"):
        detect({"visual.conv1.weight", key})


# --- the model's name ---------------------------------------------------------------------------


def test_backbone_carries_the_bases_weights(lab, fp32):
    state, x = near(lab, 3), pixels(4)
    clip = backbone("LFPM-LAB", Tower(state, {}, "visual", path="x", sha256="s"))
    assert (
        torch.equal(features(clip, clip.visual, x), features(lab, lab.with_state(state), x))
        and clip.card["text"]
    )
    assert same(
        backbone("lfpm-lab", take(layout(state, {}, "hf")[0])).state(),
        state | {"proj": lab.state()["proj"]},
    )


def test_openai_files_need_quickgelu(lab):
    with pytest.raises(ValueError, match="trained with QuickGELU, lfpm-lab computes GELU"):
        fitted(Tower(lab.state(), {}, "visual", {"quick_gelu": "True"}, "x"), lab)


def test_openai_format_says_quickgelu(whole, tmp_path):
    write_tower(tmp_path / "x.safetensors", whole, "openai")
    assert read_tower(tmp_path / "x.safetensors").meta["quick_gelu"] is True


def test_names_of_models():
    names = plain_models()
    assert {"ViT-B-32", "ViT-B-16", "ViT-L-14-quickgelu"} <= set(names) and not {
        "RN50",
        "ViT-B-16-SigLIP",
        "coca_ViT-B-32",
        "roberta-ViT-B-32",
    } & set(names)


@pytest.mark.slow
def test_random_vit_b32_through_every_format(tmp_path):
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu")
    tower = take(model.state_dict())
    assert sizes(tower.visual) == dict(
        width=768, layers=12, patch=32, pixels=224, mlp=3072, output=512
    )
    write_tower(tmp_path / "full.safetensors", tower)
    x = pixels(2, size=224)
    for form in FORMS:
        convert(tmp_path / "full.safetensors", tmp_path / f"{form}.safetensors", form)
        back = with_base(
            read_tower(tmp_path / f"{form}.safetensors"), read_tower(tmp_path / "full.safetensors")
        )
        assert same(back.visual, tower.visual)
    clip = backbone("ViT-B-32-quickgelu", read_tower(tmp_path / "full.safetensors"))
    with torch.no_grad():
        assert torch.allclose(
            features(clip, clip.visual, x), model.encode_image(clip.normalise(x)), atol=0.05
        )
    assert clip.card["quick_gelu"] and clip.card["text"] and heads(clip) == 12
    with pytest.raises(ValueError, match="ViT-B-32 computes GELU"):
        backbone("ViT-B-32", read_tower(tmp_path / "openai.safetensors"))
    assert not backbone(
        "ViT-B-32-quickgelu", read_tower(tmp_path / "task_vectors.safetensors")
    ).card["text"]


# --- numbers that are no weights ----------------------------------------------------------------

NO_WEIGHTS = (torch.int8, torch.uint8, torch.bool, torch.int16, torch.complex64)


@pytest.mark.parametrize("dtype", NO_WEIGHTS)
def test_another_dtype_is_no_weight(whole, tmp_path, dtype):
    "int8 codes were read as if they were floats. The text tower's weights count as well."
    for k, name in (
        ("ln_post.weight", "vision_model.post_layernorm.weight"),
        ("ln_final.weight", "text_model.final_layer_norm.weight"),
    ):
        visual, rest = (
            {n: v.to(dtype) if n == k else v for n, v in part.items()}
            for part in (whole.visual, whole.rest)
        )
        state, _ = layout(visual, rest, "hf_clip")
        file = tmp_path / "odd.safetensors"
        save_state(file, state)
        says = (
            rf"odd.safetensors: {name} is {str(dtype)[6:]}; "
            "expected a weight in float16, bfloat16, float32, float64 or float8"
        )
        with pytest.raises(ValueError, match=says) as e:
            read_tower(file)
        assert "\n" not in str(e.value)
        with pytest.raises(ValueError, match=says):
            convert(file, tmp_path / "out.safetensors", "hf")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_a_weight(whole, pico, tmp_path, dtype):
    cast = replace(whole, visual={k: v.to(dtype) for k, v in whole.visual.items()}, rest={})
    write_tower(tmp_path / "x.safetensors", cast, "visual")
    assert same(read_tower(tmp_path / "x.safetensors").visual, cast.visual)
    assert same(
        fitted(read_tower(tmp_path / "x.safetensors"), pico),
        {k: v.to(dtype).float() for k, v in whole.visual.items()},
    )


@pytest.mark.parametrize(
    "key, value, why",
    [
        ("conv1.weight", torch.ones(()), "conv1.weight is one number"),
        ("proj", torch.ones(32), "proj has shape .32,.; expected 2 dimensions"),
        ("ln_pre.bias", torch.ones(0), "ln_pre.bias is empty"),
        ("class_embedding", torch.ones(()), "class_embedding is one number"),
    ],
)
def test_what_cannot_be_a_tower(whole, tmp_path, lfpm, key, value, why):
    save_state(tmp_path / "odd.safetensors", whole.visual | {key: value})
    with pytest.raises(ValueError, match=f"odd.safetensors: {why}"):
        read_tower(tmp_path / "odd.safetensors")
    code, out, err = lfpm(
        "convert", str(tmp_path / "odd.safetensors"), str(tmp_path / "y.safetensors"), "--to", "hf"
    )
    assert (
        (code, out, err.count("\n")) == (2, "", 1)
        and key in err
        and not (tmp_path / "y.safetensors").exists()
    )


# --- the config.json of Hugging Face ------------------------------------------------------------


def config(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("form", ["hf", "hf5", "hf_clip"])
def test_hugging_face_output_has_its_config(lab, tmp_path, form):
    """Sizes from the weights, heads and activation of the only known model of these sizes.

    What the kit reads back is the model's."""
    rest = {k: v for k, v in lab.model.state_dict().items() if not k.startswith("visual.")}
    write_tower(tmp_path / "in.safetensors", Tower(lab.state(), rest, "open_clip"))
    convert(tmp_path / "in.safetensors", tmp_path / form / "any.safetensors", form)
    c = config(tmp_path / form)
    v = c.get("vision_config", c)
    assert {
        k: v[k]
        for k in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "patch_size",
            "image_size",
            "intermediate_size",
            "projection_dim",
            "hidden_act",
        )
    } == dict(
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=heads(lab),
        patch_size=8,
        image_size=32,
        intermediate_size=480,
        projection_dim=128,
        hidden_act="gelu",
    )
    assert c["architectures"] == ["CLIPModel" if form == "hf_clip" else "CLIPVisionModel"]
    if form == "hf_clip":
        t, cfg = c["text_config"], lab.card["config"]["text_cfg"]
        assert (
            t["hidden_size"],
            t["num_attention_heads"],
            t["num_hidden_layers"],
            t["vocab_size"],
        ) == (cfg["width"], cfg["heads"], cfg["layers"], cfg["vocab_size"])
        assert t["max_position_embeddings"] == cfg["context_length"] and t["eos_token_id"] == int(
            lab.tokenizer(["a cat"]).max()
        )
    meta = read_tower(tmp_path / form / "any.safetensors").meta
    assert (meta["heads"], meta["quick_gelu"]) == (heads(lab), False)
    (tmp_path / form / "any.safetensors").rename(tmp_path / form / "model.safetensors")
    assert read_tower(tmp_path / form).meta["heads"] == heads(lab)


def test_what_the_file_says_stands_in_the_config(lab, tmp_path):
    write_tower(
        tmp_path / "in.safetensors",
        Tower(lab.state(), {}, "visual", dict(quick_gelu="true", heads="6")),
    )
    convert(tmp_path / "in.safetensors", tmp_path / "hf" / "x.safetensors", "hf")
    assert (
        config(tmp_path / "hf")["num_attention_heads"],
        config(tmp_path / "hf")["hidden_act"],
    ) == (6, "quick_gelu")


def test_what_nobody_says_is_not_written(whole, tmp_path, lfpm):
    odd = whole.visual | {
        "proj": whole.visual["proj"][:, :31].contiguous()
    }  # no model gives 31 numbers
    write_tower(tmp_path / "in.safetensors", Tower(odd, {}, "visual"))
    files = [str(tmp_path / n) for n in ("in.safetensors", "hf/x.safetensors")]
    code, _, err = lfpm("convert", *files, "--to", "hf")
    assert (
        code == 0
        and "no config.json" in err
        and "say heads and quick_gelu" in err
        and err.count("\n") == 1
    )
    assert [p.name for p in (tmp_path / "hf").iterdir()] == ["x.safetensors"]
    with pytest.raises(
        ValueError, match="has width 64, layers 2, .*lfpm-lab has width 192, layers 4"
    ):
        convert(tmp_path / "in.safetensors", tmp_path / "y.safetensors", "hf", model="lfpm-lab")


def test_the_models_name_says_what_the_file_does_not(tmp_path):
    import open_clip

    state = {
        f"visual.{k}": v.half()
        for k, v in open_clip.create_model("ViT-B-32").visual.state_dict().items()
    }
    save_state(tmp_path / "in.safetensors", state)
    for name, act in (("ViT-B-32", "gelu"), ("ViT-B-32-quickgelu", "quick_gelu")):
        convert(tmp_path / "in.safetensors", tmp_path / name / "x.safetensors", "hf", model=name)
        assert (
            config(tmp_path / name)["num_attention_heads"],
            config(tmp_path / name)["hidden_act"],
        ) == (12, act)
    with pytest.raises(
        ValueError, match="says quick_gelu False, ViT-B-32-quickgelu says quick_gelu True"
    ):
        convert(
            tmp_path / "ViT-B-32" / "x.safetensors",
            tmp_path / "z.safetensors",
            "hf5",
            model="ViT-B-32-quickgelu",
        )


def test_a_config_that_is_there_stays(lab, tmp_path):
    """Another model's is refused before anything is written.

    One that says the same keeps its bytes; ours speaks for no third file."""
    write_tower(tmp_path / "in.safetensors", Tower(lab.state(), {}, "visual"))
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(
        json.dumps(dict(num_attention_heads=4, hidden_size=192)), encoding="utf-8"
    )
    with pytest.raises(
        ValueError,
        match=r"describes another model: .*num_attention_heads 4 \(here 3\).*folder of its own",
    ):
        convert(tmp_path / "in.safetensors", hf / "x.safetensors", "hf")
    assert [p.name for p in hf.iterdir()] == ["config.json"]
    convert(tmp_path / "in.safetensors", tmp_path / "ours" / "x.safetensors", "hf")
    theirs = json.dumps({k: v for k, v in config(tmp_path / "ours").items() if k != "lfpm_files"})
    (hf / "config.json").write_text(theirs, encoding="utf-8")
    convert(tmp_path / "in.safetensors", hf / "x.safetensors", "hf")
    assert (hf / "config.json").read_text(encoding="utf-8") == theirs
    save_state(tmp_path / "ours" / "stranger.safetensors", layout(lab.state(), {}, "hf")[0])
    assert (
        read_tower(tmp_path / "ours" / "stranger.safetensors").meta == {}
        and read_tower(hf / "x.safetensors").meta["heads"] == 3
    )
    convert(tmp_path / "in.safetensors", tmp_path / "ours" / "y.safetensors", "hf5")
    assert all(read_tower(tmp_path / "ours" / f"{n}.safetensors").meta["heads"] == 3 for n in "xy")
