"""Tasks by name: generated, real, your own; and what is refused."""

import io
import os
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from lfpm_nb import tasks
from lfpm_nb.labworld import FAMILIES, SCENE_CLASSES, STYLES
from lfpm_nb.tasks import (
    TASK_NAMES,
    fit,
    load_task,
    own_data,
    pick_balanced,
    pretrain_pool,
    prompt_corpus,
    shadow_set,
    split_by_class,
)


def pictures(x: torch.Tensor) -> set[bytes]:
    return {i.tobytes() for i in x.numpy()}


def picture(value: int, mode="RGB", size=(8, 8)) -> Image.Image:
    return Image.new("RGB", size, (value,) * 3).convert(mode)


def folder(root, counts: dict[str, int], suffix=".png"):
    "A folder per class; image k of class c is grey with value 40 c + k."
    for c, (name, n) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for k in range(n):
            picture(40 * c + k).save(root / name / f"{k}{suffix}")
    return root


def packed(root, file, prefix=""):
    with zipfile.ZipFile(file, "w") as z:
        for p in sorted(root.rglob("*.*")):
            z.write(p, prefix + p.relative_to(root).as_posix())
    return file


def arrays(n=12, classes=3, size=8):
    return dict(
        images=np.arange(n, dtype=np.uint8)[:, None, None, None]
        + np.zeros((n, size, size, 3), np.uint8),
        labels=np.arange(n) % classes,
        classes=np.array([f"thing {c}" for c in range(classes)]),
    )


@pytest.mark.parametrize("name", TASK_NAMES)
def test_built_in_tasks(name):
    t = load_task(name, seed=3, n_train=52, n_test=26)
    assert (
        t.train_x.shape == (52, 3, 32, 32)
        and t.test_x.shape == (26, 3, 32, 32)
        and t.train_x.dtype == torch.uint8
        and t.train_y.dtype == torch.int64
    )
    assert not pictures(t.train_x) & pictures(t.test_x)
    count = t.train_y.bincount(minlength=len(t.classes))
    assert (
        count.max() - count.min() <= 1
        and len(t.classes) >= 10
        and all("{}" in s for s in t.templates)
    )
    again, other = (
        load_task(name, seed=3, n_train=52, n_test=26),
        load_task(name, seed=4, n_train=52, n_test=26),
    )
    assert (
        torch.equal(t.train_x, again.train_x)
        and torch.equal(t.test_y, again.test_y)
        and not torch.equal(t.train_x, other.train_x)
    )
    assert name in repr(t) and "0x" not in repr(t)


def test_handwritten_is_real_and_large_enough():
    t = load_task("handwritten")
    assert (
        len(t.train_y) == 1100
        and 500 <= len(t.test_y) <= 697
        and t.classes == list(FAMILIES["digits"].classes)
    )
    words = {w for text in pretrain_pool(3000)[1] for w in text.lower().split()}
    assert {
        w for s in t.templates for c in t.classes for w in s.format(c).split()
    } <= words  # no prompt word is new to the text tower


def test_enough_test_images_besides_the_target():
    t = load_task("signs", n_train=22, n_test=1100)
    assert len(t.test_y) - t.test_y.bincount().max() >= 1000


def test_shadow_images_come_from_scenes_only(monkeypatch):
    def forbidden(*_):
        raise AssertionError("a shadow image was drawn by a family's renderer")

    for fam in FAMILIES.values():
        for style in STYLES:
            monkeypatch.setitem(fam.render, style, forbidden)
    x, y, classes = shadow_set(128, 1)
    assert (
        x.shape == (128, 3, 32, 32)
        and classes == SCENE_CLASSES
        and y.bincount().tolist() == [2] * 64
    )
    with pytest.raises(AssertionError):
        load_task("signs", n_train=2, n_test=2)


def test_shadow_and_pretraining_share_no_image():
    x = pictures(shadow_set(640, 0)[0])
    assert (
        len(x) == 640
        and not x & pictures(pretrain_pool(1400, 0)[0])
        and not x & pictures(shadow_set(640, 1)[0])
    )


@settings(max_examples=8, deadline=None)
@given(
    n=st.integers(1, 120),
    seed=st.one_of(st.integers(0, 9), st.tuples(st.text(max_size=3), st.integers(0, 9))),
)
def test_pretraining_pool(n, seed):
    x, captions = pretrain_pool(n, seed)
    assert (
        x.shape == (n, 3, 32, 32)
        and len(captions) == n
        and torch.equal(x, pretrain_pool(n, seed)[0])
    )


def test_pool_shares():
    captions = pretrain_pool(2800, 1)[1]
    scene = sum(any(c in text for c in SCENE_CLASSES) for text in captions)
    flags = sum(
        "flag" in text or any(c in text for c in FAMILIES["flags"].classes) for text in captions
    )
    assert 1400 <= scene < 1600 and 150 < flags < 300


def test_corpus_holds_every_prompt():
    corpus = set(prompt_corpus())
    for name in TASK_NAMES:
        t = load_task(name, n_train=1, n_test=1)
        assert {s.format(c) for s in t.templates for c in t.classes} <= corpus


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(sum), n=st.integers(0, 60)
)
def test_pick_balanced(counts, n):
    y = torch.cat([torch.full((k,), c) for c, k in enumerate(counts)])
    rows = pick_balanced(y, n, torch.Generator().manual_seed(0))
    assert len(rows) == len(set(rows.tolist())) == min(n, len(y))
    got, have = y[rows].bincount(minlength=len(counts)), torch.tensor(counts)
    assert all(
        g == h or g >= got.max() - 1 for g, h in zip(got, have)
    )  # a class falls behind only when it has no more


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(2, 20), min_size=1, max_size=6), share=st.floats(0.01, 0.99))
def test_split_by_class(counts, share):
    y = torch.cat([torch.full((k,), c) for c, k in enumerate(counts)])
    train, test = split_by_class(y, share, torch.Generator().manual_seed(0))
    assert sorted(torch.cat([train, test]).tolist()) == list(range(len(y)))
    assert (
        y[train].bincount(minlength=len(counts)).min() >= 1
        and y[test].bincount(minlength=len(counts)).min() >= 1
    )


@settings(max_examples=20, deadline=None)
@given(
    h=st.integers(1, 50), w=st.integers(1, 50), size=st.integers(1, 40), grey=st.integers(0, 255)
)
def test_fit_any_size(h, w, size, grey):
    x = fit(torch.full((2, 3, h, w), grey, dtype=torch.uint8), size)
    assert x.shape == (2, 3, size, size) and x.dtype == torch.uint8 and (x == grey).all()


def test_folder_round_trip(tmp_path):
    t = load_task(
        str(folder(tmp_path / "pets", {"big_dog": 10, "cat": 6})), n_train=12, n_test=4, size=8
    )
    assert t.name == "pets" and t.classes == ["big dog", "cat"] and t.train_x.shape[1:] == (3, 8, 8)
    for x, y in ((t.train_x, t.train_y), (t.test_x, t.test_y)):
        assert ((x[:, 0, 0, 0] // 40) == y).all()
    assert len(pictures(t.train_x) | pictures(t.test_x)) == 16 and not pictures(
        t.train_x
    ) & pictures(t.test_x)


def test_zip_equals_folder(tmp_path):
    root = folder(tmp_path / "pets", {"dog": 8, "cat": 5})
    plain = load_task(str(root), n_train=9, n_test=3, size=8)
    for prefix in ("", "outer/inner/"):
        t = load_task(
            str(packed(root, tmp_path / f"z{len(prefix)}.zip", prefix)), n_train=9, n_test=3, size=8
        )
        assert (
            t.classes == plain.classes
            and torch.equal(t.train_x, plain.train_x)
            and torch.equal(t.test_y, plain.test_y)
        )


def test_given_halves_are_kept(tmp_path):
    (
        folder(tmp_path / "set/train", {"a": 3, "b": 3}),
        folder(tmp_path / "set/test", {"a": 1, "b": 1}),
    )
    t = load_task(str(tmp_path / "set"), size=8)
    assert len(t.train_y) == 6 and len(t.test_y) == 2
    (tmp_path / "two").mkdir()
    for s, n in (("train", 9), ("test", 6)):
        np.savez(tmp_path / f"two/{s}.npz", **arrays(n))
    t = load_task(str(tmp_path / "two"), size=8)
    assert sorted(t.train_x[:, 0, 0, 0].tolist()) == list(range(9)) and sorted(
        t.test_x[:, 0, 0, 0].tolist()
    ) == list(range(6))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_modes_become_rgb(tmp_path, mode):
    root = tmp_path / "modes"
    for c in "ab":
        for k in range(2):
            (root / c).mkdir(parents=True, exist_ok=True)
            img = (
                Image.fromarray(np.full((5, 9), 257 * 255, np.uint16))
                if mode == "I;16"
                else Image.new("I", (9, 5), 65535)
                if mode == "I"
                else picture(255, mode, (9, 5))
            )
            # 32 bits in a TIFF may mean anything; a PGM of them has 16 and says so
            img.save(root / c / f"{k}.{'pgm' if mode == 'I' else 'tif'}", compression=None)
    t = load_task(str(root), size=6)
    assert t.train_x.shape == (2, 3, 6, 6) and (t.train_x == 255).all()


def test_npz_split_by_seed(tmp_path):
    np.savez(tmp_path / "one.npz", **arrays(30))
    t = load_task(str(tmp_path / "one.npz"), n_train=20, n_test=10, size=8)
    assert (len(t.train_y), len(t.test_y)) == (20, 9)  # a third of each class of ten is for testing
    assert ((t.train_x[:, 0, 0, 0] % 3) == t.train_y).all() and t.classes == [
        "thing 0",
        "thing 1",
        "thing 2",
    ]


def test_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LFPM_DATA", str(tmp_path))
    folder(tmp_path / "pets", {"dog": 3, "cat": 3}), packed(tmp_path / "pets", tmp_path / "zoo.zip")
    np.savez(tmp_path / "things.npz", **arrays())
    assert set(own_data()) == {"pets", "zoo", "things"}
    assert [load_task(n, size=8).name for n in ("pets", "zoo", "Things")] == [
        "pets",
        "zoo",
        "things",
    ]
    with pytest.raises(ValueError, match="did you mean 'things'"):
        load_task("thingz")
    monkeypatch.setenv("LFPM_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="unknown task 'zoo'"):
        load_task("zoo")


def bad_npz(**change):
    return lambda p: np.savez(
        p / "x.npz", **{k: v for k, v in {**arrays(), **change}.items() if v is not None}
    )


def text_file(p, name, content="not an image"):
    (p / name).parent.mkdir(parents=True, exist_ok=True)
    (p / name).write_text(content, encoding="utf-8")


def truncated(p):
    data = io.BytesIO()
    np.savez(data, **arrays())
    (p / "x.npz").write_bytes(data.getvalue()[:200])


def bad_member(p):
    packed(folder(p / "x", {"a": 2, "b": 2}), p / "x.zip")
    data = bytearray((p / "x.zip").read_bytes())
    data[60:70] = bytes(10)
    (p / "x.zip").write_bytes(data)


BAD = {
    "one image": (
        "x",
        lambda p: folder(p / "x", {"a": 1, "b": 3}),
        "class 'a' has 1 image; give every class at least two",
    ),
    "empty folder": (
        "x",
        lambda p: (p / "x").mkdir(),
        "holds no images; put them in one folder per class",
    ),
    "only text": ("x", lambda p: text_file(p, "x/a/notes.txt"), "holds no images"),
    "loose image": (
        "x",
        lambda p: (folder(p / "x", {"a": 2}), picture(1).save(p / "x/loose.png")),
        "loose.png lies outside a class folder",
    ),
    "damaged image": (
        "x",
        lambda p: (folder(p / "x", {"a": 2, "b": 2}), text_file(p, "x/a/0.png")),
        "a/0.png is no readable image",
    ),
    "damaged zip": ("x.zip", lambda p: text_file(p, "x.zip"), "is no readable zip"),
    "damaged member": ("x.zip", bad_member, "0.png (cannot be unpacked|is no readable image)"),
    "damaged npz": ("x.npz", truncated, "cannot be read"),
    "text as npz": ("x.npz", lambda p: text_file(p, "x.npz"), "cannot be read"),
    "array as npz": (
        "x.npz",
        lambda p: (np.save(p / "x.npy", np.zeros(3)), (p / "x.npy").rename(p / "x.npz")),
        "cannot be read",
    ),
    "no labels": (
        "x.npz",
        bad_npz(labels=None),
        "lacks labels; it needs the keys images, labels and classes",
    ),
    "label too large": (
        "x.npz",
        bad_npz(labels=np.arange(12)),
        "labels are int64 from 0 to 11; expected whole numbers from 0 to 2",
    ),
    "label negative": ("x.npz", bad_npz(labels=np.arange(12) % 3 - 1), "from -1 to 1"),
    "label not whole": ("x.npz", bad_npz(labels=np.zeros(12)), "labels are float64"),
    "fewer labels": ("x.npz", bad_npz(labels=np.zeros(5, int)), "12 images but 5 labels"),
    "NaN images": ("x.npz", bad_npz(images=np.full((12, 8, 8, 3), np.nan)), "images are float64"),
    "channels first": (
        "x.npz",
        bad_npz(images=np.zeros((12, 3, 8, 8), np.uint8)),
        r"expected uint8 \(N, H, W, 3\)",
    ),
    "no images": (
        "x.npz",
        bad_npz(images=np.zeros((0, 8, 8, 3), np.uint8), labels=np.zeros(0, int)),
        "at least one image",
    ),
    "class without images": (
        "x.npz",
        bad_npz(classes=np.array(list("abcd"))),
        "class 'd' has 0 images",
    ),
    "pickled classes": (
        "x.npz",
        bad_npz(classes=np.array(["a", None, "c"], object)),
        "holds pickled objects, which could run code",
    ),
    "different classes": (
        "x",
        lambda p: (
            (p / "x").mkdir(),
            np.savez(p / "x/train.npz", **arrays()),
            np.savez(p / "x/test.npz", **arrays(classes=2)),
        ),
        "different classes",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_are_refused_and_leave_nothing_behind(tmp_path, case):
    name, make, message = BAD[case]
    make(tmp_path)
    before = sorted(p for p in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message) as e:
        load_task(str(tmp_path / name))
    assert name in str(e.value) and sorted(p for p in tmp_path.rglob("*")) == before
    if os.name == "posix" and os.path.isdir("/proc/self/fd"):
        held = [
            os.readlink(f"/proc/self/fd/{f}")
            for f in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{f}")
        ]
        assert not [h for h in held if str(tmp_path) in h]  # no file is left open


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(name="leters"), "did you mean 'letters'"),
        (dict(name=""), "unknown task ''"),
        (dict(name="letters", n_train=0), "n_train=0"),
        (dict(name="letters", n_test=-1), "n_test=-1"),
    ],
)
def test_bad_arguments_are_refused(kw, message):
    with pytest.raises(ValueError, match=message):
        load_task(**kw)


def test_only_wanted_images_are_opened(tmp_path, monkeypatch):
    opened, real = [], tasks._image
    monkeypatch.setattr(
        tasks, "_image", lambda f, p, name, size: (opened.append(name), real(f, p, name, size))[1]
    )
    load_task(str(folder(tmp_path / "many", {"a": 30, "b": 30})), n_train=4, n_test=2, size=8)
    assert len(opened) == 6
