"Real sets by name: each source's layout in miniature, who may see what, and what is refused."

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lfpm_nb.clip import data_cards
from lfpm_nb import realdata as R
from lfpm_nb.tasks import SOURCES, load_task


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LFPM_DATA", str(tmp_path))
    return tmp_path


def encoded(value: int, kind="PNG", size=(10, 8)) -> bytes:
    b = io.BytesIO()
    Image.new("RGB", size, (value % 256,) * 3).save(b, kind)
    return b.getvalue()


def hub(
    path, labels, names=None, image="image", label="label", start=0, groups=3, more=(), kind="PNG"
):
    "A parquet file as the hub writes it; picture k is grey with value start + k."
    cols = {
        image: [dict(bytes=encoded(start + k, kind), path=f"{k}.png") for k in range(len(labels))],
        label: labels,
    }
    cols |= {c: [0] * len(labels) for c in more}
    features = {
        label: dict(names=names, _type="ClassLabel")
        if names
        else dict(dtype="int64", _type="Value")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(cols).replace_schema_metadata(
            {"huggingface": json.dumps(dict(info=dict(features=features)))}
        ),
        path,
        row_group_size=groups,
    )


def npz(root, name, n=6, px=8, classes=None, change=None):
    "Train and test arrays of a small set with n pictures a class."
    classes = classes or R.small_sets[name].classes
    for k, half in enumerate(("train", "test")):
        y = np.arange(n * len(classes)) % len(classes)
        x = ((np.arange(len(y)) * 2 + k)[:, None, None, None] % 256).astype(np.uint8) + np.zeros(
            (1, px, px, 3), np.uint8
        )
        if change:
            y = change(y)
        (root / name).mkdir(exist_ok=True)
        np.savez(root / name / f"{half}.npz", images=x, labels=y, classes=np.array(classes))


def test_every_small_and_paper_set_is_a_task_name_and_the_shadow_is_not():
    assert set(SOURCES) == {*R.small_sets, *R.paper_sets} - {"tiny_imagenet"}
    assert (
        R.find_set("GTSRB", 32)[1] is R.small_sets["gtsrb"]
        and R.find_set("gtsrb", 224)[1] is R.paper_sets["gtsrb"]
    )
    assert (
        R.find_set("cars", 32)[1] is R.paper_sets["cars"]
        and R.find_set("ucmerced", 224)[1] is R.small_sets["ucmerced"]
    )
    with pytest.raises(ValueError, match="did you mean 'cars'"):
        R.find_set("carz")


def test_each_set_has_templates_for_one_class_and_distinct_names():
    for name, px in R.every_set():
        _, s = R.find_set(name, px)
        assert s.templates and all(t.count("{}") == 1 for t in s.templates), name
        assert (
            len(s.n) == 2
            and sum(s.n) > 0
            and s.count > 1
            and (s.zero_shot is None or 0 < s.zero_shot < 100)
        )
        if s.classes:
            assert len(s.classes) == s.count and (
                name == "imagenet" or len(set(s.classes)) == s.count
            )  # ImageNet has two cranes and two maillots


# --- layouts ------------------------------------------------------------------------------------


def test_arrays(root):
    npz(root, "dtd10")
    t = load_task("dtd10", 0, 20, 20, 32)
    assert t.classes == list(R.small_sets["dtd10"].classes) and t.train_x.shape == (20, 3, 32, 32)
    assert (t.test_x.float().mean((1, 2, 3)) % 2 == 1).all() and (
        t.train_x.float().mean((1, 2, 3)) % 2 == 0
    ).all()  # test pictures are odd


def test_cifar100_as_the_hub_stores_it(root):
    names = [c.replace(" ", "_") for c in R.small_sets["cifar100"].classes]
    names[26] = "cra"  # so it is spelt there
    for part in ("train", "test"):
        hub(
            root / "cifar100" / "cifar100" / f"{part}-00000-of-00001.parquet",
            list(range(100)) * 2,
            names,
            "img",
            "fine_label",
            more=("coarse_label",),
            groups=64,
        )
    t = load_task("cifar100", 0, 100, 100, 32)
    assert t.classes[26] == "crab" and t.test_x.shape == (100, 3, 32, 32)
    assert (
        t.test_x.float().mean((1, 2, 3)) % 100 == t.test_y
    ).all()  # the picture belongs to the label


def test_several_files_row_groups_and_a_part_of_another_name(root):
    names = ["apple_pie", *(f"dish_{k}" for k in range(99)), "waffles"]
    for k in range(2):
        for part in ("train", "validation"):
            hub(
                root / "food101" / "data" / f"{part}-0000{k}-of-00002.parquet",
                list(range(101)),
                names,
                start=100 * k,
                groups=40,
                kind="JPEG",
            )
    y, read, classes = R.open_part("food101", "test", size=224)
    assert len(y) == 202 and classes[0] == "apple pie" and classes[-1] == "waffles"
    picks = torch.tensor([150, 3, 3, 201])
    assert (
        read(picks, 16).float().mean((1, 2, 3)).sub(torch.tensor([149.0, 3, 3, 200])).abs().max()
        <= 2
    )  # 150 is row 49 of the second file
    t = load_task("food101", 0, 101, 101, 224)
    assert t.templates == ["a photo of {}, a type of food."] and len(t.train_y.unique()) == 101


def test_numbers_for_names_and_a_folder_of_one_config(root):
    for part in ("train", "test", "extra"):
        hub(
            root / "svhn" / "cropped_digits" / f"{part}-00000-of-00001.parquet",
            [k % 10 for k in range(40)],
            [str(k) for k in range(10)],
        )
    y, _, classes = R.open_part("svhn", "train", size=224)
    assert len(y) == 40 and classes[7] == "7"  # `extra` is not training data


def test_a_set_cut_out_of_a_larger_one(root):
    names = [*R.small_sets["dtd10"].classes, "dotted", "fibrous"]
    for part in ("train", "test"):
        hub(root / "dtd10" / f"{part}-0.parquet", [k % 12 for k in range(96)], names)
    y, read, _ = R.open_part("dtd10", "test")
    assert y.bincount().tolist() == [8] * 10 and read(torch.arange(12), 8).float().mean(
        (1, 2, 3)
    ).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13]


def test_one_piece_is_split_once_and_for_all(root):
    names = (
        "agricultural airplane baseballdiamond beach buildings chaparral denseresidential forest "
        "freeway golfcourse harbor intersection mediumresidential mobilehomepark overpass "
        "parkinglot river runway sparseresidential storagetanks tenniscourt"
    ).split()
    hub(
        root / "ucmerced" / "data" / "train-00000-of-00001.parquet",
        [k % 21 for k in range(210)],
        names,
    )
    value = lambda *a: set(
        R.open_part("ucmerced", *a)[1](torch.arange(len(R.open_part("ucmerced", *a)[0])), 8)
        .float()
        .mean((1, 2, 3))
        .tolist()
    )
    train, test = (R.open_part("ucmerced", h)[0] for h in ("train", "test"))
    assert len(train) + len(test) == 210 and test.bincount().tolist() == [3] * 21
    seen, rest, held = value("train", "pretrain"), value("train", "tune"), value("test")
    assert (
        not (seen & rest or seen & held or rest & held) and len(seen) + len(rest) + len(held) == 210
    )
    assert load_task("ucmerced", 0, 50, 63).classes[6] == "dense residential area"


def test_chars74k(root):
    for k in range(1, 63):
        d = root / "street_chars" / f"Sample{k:03}"
        d.mkdir(parents=True)
        for j in range(4):
            (d / f"img{k:03}-{j:05}.png").write_bytes(encoded(k))
    y, read, classes = R.open_part("street_chars", "train")
    assert len(classes) == 36 and classes[10] == "letter A"
    value = read(torch.arange(len(y)), 8).float().mean((1, 2, 3)).long()
    assert torch.equal(torch.where(value <= 36, value - 1, value - 27), y)  # a is an A


def tiny(root, classes=3, n=12):
    home = root / "tiny_imagenet" / "tiny-imagenet-200"
    for c in range(classes):
        d = home / "train" / f"n0{c}" / "images"
        d.mkdir(parents=True)
        for k in range(n):
            (d / f"n0{c}_{k}.JPEG").write_bytes(encoded(20 * c + k, "JPEG"))
    (home / "words.txt").write_text(
        "".join(f"n0{c}\tthing {c}, stuff\n" for c in (2, 0, 1)), encoding="utf-8"
    )


def test_tiny_imagenet_as_stanford_packs_it(root, monkeypatch):
    monkeypatch.setitem(
        R.small_sets, "tiny_imagenet", R.RealSet(None, R.TINY_TEMPLATES, (36, 0), n_classes=3)
    )
    tiny(root)
    x, y, classes, templates = R.real_shadow(6, 0)
    assert (
        classes == ["thing 0", "thing 1", "thing 2"]
        and y.bincount().tolist() == [2, 2, 2]
        and templates == R.TINY_TEMPLATES
    )
    seen = R.open_part("tiny_imagenet", "train", "pretrain")
    shown = {
        round(v) for v in seen[1](torch.arange(len(seen[0])), 8).float().mean((1, 2, 3)).tolist()
    }
    assert len(seen[0]) == 30 and not shown & {round(v) for v in x.float().mean((1, 2, 3)).tolist()}
    with pytest.raises(ValueError, match="7 shadow images asked for, tiny_imagenet has 6"):
        R.real_shadow(7)


def test_imagenet_by_hub_names_and_by_wnids():
    s, names = R.imagenet(), [f"class {k}" for k in range(1000)]
    names[0], names[-1] = "tench, Tinca tinca", "toilet tissue, toilet paper, bathroom tissue"
    assert (
        R.order_of(s, names, "x")
        == list(range(1000))
        == R.order_of(s, [f"n{k:08}" for k in range(1000)], "x")
    )
    with pytest.raises(ValueError, match="label 0 is 'goldfish'"):
        R.order_of(s, ["goldfish", *names[1:]], "x")


# --- who may see what ---------------------------------------------------------------------------


def test_contributors_never_get_what_pretraining_saw_whatever_the_seed(root):
    npz(root, "dtd10", n=12)
    y, read, _ = R.open_part("dtd10", "train", "pretrain")
    seen = set(read(torch.arange(len(y)), 8).float().mean((1, 2, 3)).tolist())
    assert len(y) == 60 and y.bincount().tolist() == [6] * 10
    for seed in range(3):
        t = load_task("dtd10", seed, 1000, 10, 8)
        assert len(t.train_y) == 60 and not seen & set(t.train_x.float().mean((1, 2, 3)).tolist())


def test_another_seed_draws_other_pictures(root):
    npz(root, "dtd10", n=12)
    a, b, c = (load_task("dtd10", s, 20, 20, 8) for s in (0, 0, 1))
    assert torch.equal(a.train_x, b.train_x) and not torch.equal(a.train_x, c.train_x)


def test_shares_of_the_pool():
    got = R._shares(dict(a=8000, b=1000, c=1), 501)
    assert (
        sum(got.values()) == 501 and got["b"] == 100 and got["a"] == 400 and got["c"] == 1
    )  # 400 : 100 : 1


# --- refusals -----------------------------------------------------------------------------------


def test_without_data_the_error_says_what_to_get(monkeypatch, tmp_path):
    monkeypatch.delenv("LFPM_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="LFPM_DATA is '', no folder.*lfpm data list"):
        load_task("gtsrb")
    monkeypatch.setenv("LFPM_DATA", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match="gtsrb is not under .*lfpm data get gtsrb.*gtsrb/train.npz"
    ):
        load_task("gtsrb")
    with pytest.raises(FileNotFoundError, match="tiny-imagenet-200.zip"):
        R.real_shadow(10)
    with pytest.raises(
        FileNotFoundError,
        match="9 sets of real pictures are not under .*\n  cifar10: lfpm data get cifar10",
    ):
        R.real_pool(64)


def test_wrong_order_labels_and_pictures_are_refused(root):
    names = list(R.small_sets["dtd10"].classes)
    npz(root, "dtd10", classes=[names[1], names[0], *names[2:]])
    with pytest.raises(ValueError, match="label 0 is 'blotchy', expected 'banded'"):
        load_task("dtd10")
    stl = list(R.paper_sets["stl10"].classes)
    for part in ("train", "test"):
        hub(root / "stl10" / f"{part}-0.parquet", [*range(10), 10], stl)
    with pytest.raises(ValueError, match="labels run from 0 to 10, expected 0 to 9"):
        load_task("stl10")
    hub(root / "cars" / "train-0.parquet", [0, 1], ["a", "b"])
    with pytest.raises(ValueError, match="2 classes, expected 196"):
        R.open_part("cars", size=224)
    hub(root / "pets" / "train-0.parquet", list(range(37)), [f"b{k}" for k in range(37)])
    with pytest.raises(ValueError, match="label 0 is 'b0', expected 'abyssinian'"):
        R.open_part("pets", size=224)


def test_a_damaged_picture_and_a_table_without_pictures_are_named(root):
    for part in ("train", "test"):
        hub(
            root / "stl10" / f"{part}-0.parquet",
            list(range(10)),
            list(R.paper_sets["stl10"].classes),
        )
    assert len(load_task("stl10", 0, 10, 10).test_y) == 10
    t = pq.read_table(root / "stl10" / "test-0.parquet")
    broken = [
        dict(bytes=b"no picture", path="x") if k == 4 else v
        for k, v in enumerate(t["image"].to_pylist())
    ]
    pq.write_table(t.set_column(0, "image", pa.array(broken)), root / "stl10" / "test-0.parquet")
    with pytest.raises(ValueError, match="row 4 is no readable image"):
        load_task("stl10", 0, 10, 10)
    pq.write_table(pa.table(dict(text=["a"])), root / "stl10" / "train-0.parquet")
    with pytest.raises(ValueError, match="columns are text; expected image or img"):
        load_task("stl10")


# --- the command --------------------------------------------------------------------------------


def test_list_needs_no_data_and_names_every_set(lfpm, monkeypatch):
    monkeypatch.delenv("LFPM_DATA", raising=False)
    code, out, err = lfpm("data", "list")
    lines = out.splitlines()
    assert code == 0 and err == "" and "is not set" in out and " yes " not in out
    for name, px in R.every_set():
        assert any(l.split()[:2] == [name, str(px)] for l in lines), name


def test_check_says_right_and_wrong(lfpm, root, monkeypatch):
    assert "no set is here" in lfpm("data", "check")[1]
    monkeypatch.setitem(
        R.small_sets,
        "dtd10",
        R.RealSet(R.small_sets["dtd10"].classes, ("a {}",), (60, 60), "tanganke/dtd"),
    )
    npz(root, "dtd10")
    code, out, _ = lfpm("data", "check")
    assert code == 0 and out.strip() == "dtd10 (32 px): right, 60 train, 60 test"
    npz(root, "cifar10", n=3)
    code, out, err = lfpm("data", "check")
    assert (
        code == 1
        and "WRONG, cifar10, train: 30 pictures, expected about 2,500" in out
        and "1 of 2 sets are wrong" in err
    )
    assert "cifar10" not in lfpm("data", "check", "dtd10")[1]
    assert "did you mean 'dtd10'" in lfpm("data", "check", "dtd11")[2]


def test_a_damaged_file_is_there_and_wrong(lfpm, root, monkeypatch):
    "It stops neither the list nor the check of the other sets."
    monkeypatch.setitem(
        R.small_sets,
        "dtd10",
        R.RealSet(R.small_sets["dtd10"].classes, ("a {}",), (60, 60), "tanganke/dtd"),
    )
    npz(root, "cifar10"), npz(root, "dtd10")
    (root / "cifar10" / "train.npz").write_bytes(b"half a file")
    assert R.present("cifar10") and any(
        l.split()[:2] == ["cifar10", "32"] and " yes " in l
        for l in lfpm("data", "list")[1].splitlines()
    )
    code, out, err = lfpm("data", "check")
    assert (
        code == 1
        and "cifar10 (32 px): WRONG" in out
        and "cannot be read" in out
        and "dtd10 (32 px): right" in out
        and "1 of 2 sets are wrong" in err
    )
    (root / "cifar10" / "test.npz").unlink()
    assert not R.present("cifar10")


def test_an_empty_class_is_found(root, monkeypatch):
    monkeypatch.setitem(
        R.small_sets, "dtd10", R.RealSet(R.small_sets["dtd10"].classes, ("a {}",), (60, 60))
    )
    npz(root, "dtd10", change=lambda y: np.where(y == 4, 3, y))
    with pytest.raises(ValueError, match="1 classes without a picture .first: 'bumpy'"):
        R.check_set("dtd10")


def test_get_asks_the_hub_for_the_right_files_and_says_what_to_do_when_it_fails(
    lfpm, root, monkeypatch
):
    import huggingface_hub

    asked = {}

    def fake(repo, repo_type, local_dir, allow_patterns):
        asked.update(repo=repo, kind=repo_type, patterns=allow_patterns)
        for part in ("train", "test"):
            hub(
                local_dir / "cropped_digits" / f"{part}-00000-of-00001.parquet",
                list(range(10)),
                [str(k) for k in range(10)],
            )

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert not R.present("svhn", 224)
    code, out, _ = lfpm("data", "get", "svhn")
    assert code == 0 and "svhn lies in" in out and R.present("svhn", 224)
    assert asked == dict(
        repo="ufldl-stanford/svhn",
        kind="dataset",
        patterns=["cropped_digits*train-*.parquet", "cropped_digits*test-*.parquet"],
    )
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *a, **k: (_ for _ in ()).throw(OSError("no network")),
    )
    code, _, err = lfpm("data", "get", "cars")
    assert (
        code == 1
        and "tanganke/stanford_cars could not be fetched (OSError: no network); put its files"
        in err
        and "Traceback" not in err
    )
    assert "cannot be fetched by name" in lfpm("data", "get", "street_chars")[2]


# --- pretraining and the defender ---------------------------------------------------------------


@pytest.fixture
def world(root, monkeypatch):
    """Two small sets and a Tiny-ImageNet of three classes.

    Returns the value of every picture that pretraining may see."""
    for k in [k for k in R.small_sets if k not in ("dtd10", "gtsrb")]:
        monkeypatch.delitem(R.small_sets, k)
    monkeypatch.setitem(
        R.small_sets, "tiny_imagenet", R.RealSet(None, R.TINY_TEMPLATES, (36, 0), n_classes=3)
    )
    npz(root, "dtd10", n=4), npz(root, "gtsrb", n=2), tiny(root)
    return root


def test_pool_is_made_of_what_pretraining_may_see_with_true_captions(world):
    x, captions = R.real_pool(160, 0)
    assert x.shape == (160, 3, 32, 32) and x.dtype == torch.uint8 and len(captions) == 160
    again = R.real_pool(160, 0)
    assert (
        torch.equal(x, again[0])
        and captions == again[1]
        and not torch.equal(x, R.real_pool(160, 1)[0])
    )
    flat = (
        (x.float().std((1, 2, 3)) < 0.5).nonzero()[:, 0].tolist()
    )  # our fixtures are plain grey, LabWorld's pictures are not
    assert len(flat) == 140
    y, read, classes = R.open_part("dtd10", "train", "pretrain")
    true = {
        (round(v), classes[c])
        for v, c in zip(read(torch.arange(len(y)), 8).float().mean((1, 2, 3)).tolist(), y.tolist())
    }
    dtd = [
        (round(x[k].float().mean().item()), captions[k])
        for k in flat
        if any(captions[k] == t.format(c) for c in classes for t in R.small_sets["dtd10"].templates)
    ]
    assert len(dtd) > 10 and all(
        any(v == w and c in text.split() for w, c in true) for v, text in dtd
    )
    assert set(captions) - set(R.real_corpus()) and {captions[k] for k in flat} <= set(
        R.real_corpus()
    )


def test_a_backbone_of_real_pictures_brings_its_own_shadow_set_and_attacker_words(world, pico):
    from lfpm_nb.attack import Target, shadow_head
    from lfpm_nb.clip import Clip
    from lfpm_nb.subspace import Shadow

    real = Clip(pico.model, pico.tokenizer, pico.card | dict(open_domain=R.open_domain()))
    s = Shadow.of(real, 4, 2, 0)
    assert (
        s.x.shape == (6, 3, 32, 32)
        and s.W.shape[0] == 3
        and torch.equal(s.x, R.real_shadow(6, 0)[0])
        and len(s.train[0]) == 4
    )
    target = Target("gtsrb", "stop", ["a {}"], s.x[:1])
    assert shadow_head(real, target).shape[0] == 4 and shadow_head(pico, target).shape[0] == 65
    assert Shadow.of(pico, 4, 2, 0).W.shape[0] == 64


def test_zero_shot_check():
    assert R.check_zero_shot("cars", 60.0) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="no published accuracy"):
        R.check_zero_shot("dtd", 40.0)


# --- the preset ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["main", "sequence2", "sequence3"])
def test_preset_without_data_says_all_that_is_missing(pico, monkeypatch, tmp_path, name):
    from dataclasses import replace
    from lfpm_nb import settings
    from lfpm_nb.runs import settings_of

    monkeypatch.setenv("LFPM_DATA", str(tmp_path))
    monkeypatch.setattr(
        settings,
        "load_clip",
        lambda name: replace(pico, card=pico.card | dict(open_domain=dict(name="tiny_imagenet"))),
    )
    s = settings_of(name, "small-real")
    with pytest.raises((ValueError, OSError)) as e:
        s.check_inputs()
    for task in (*s.tasks, "tiny_imagenet"):
        assert f"  {task}: {R.how_to_get(*R.find_set(task))}" in str(e.value), task
    assert (
        len(s.tasks) == 6
        and {s.adversary, s.target} < set(s.tasks)
        and s.target_class in R.small_sets[s.target].classes
    )


@pytest.mark.skipif(
    "lfpm-real" not in data_cards(),
    reason="no backbone lfpm-real here: lfpm run pretrain --preset small-real makes it",
)
def test_backbone_of_real_pictures_carries_its_licence_and_names():
    from lfpm_nb.clip import data_card, load_clip

    card = data_card("lfpm-real")
    assert (
        "non-commercial" in card["training"]["licence"]
        and card["open_domain"]["name"] == "tiny_imagenet"
        and len(card["open_domain"]["classes"]) == 200
    )
    assert (
        set(R.small_sets) <= set(card["training"]["zero_shot"])
        and card["training"]["n"]["tiny_imagenet"] == 10000
    )
    words = {
        w
        for s in R.small_sets.values()
        for c in s.classes or card["open_domain"]["classes"]
        for t in s.templates
        for w in t.format(c).split()
    }
    assert not load_clip("lfpm-real").tokenizer.unread(
        " ".join(words)
    )  # every word of every head was read in pretraining
