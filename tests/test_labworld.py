"""The generator: same arguments, same bytes; streams that never meet.

Scenes that owe nothing to the families."""

import re

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lfpm_nb import labworld
from lfpm_nb.labworld import (
    CHUNK,
    COLOUR_NAMES,
    FAMILIES,
    GROUNDS,
    SCENE_CLASSES,
    STYLES,
    draw,
    draw_captioned,
    scenes,
)

names = st.sampled_from(sorted(FAMILIES))
quick = settings(max_examples=12, deadline=None)


def labels(name: str, n: int) -> torch.Tensor:
    return torch.arange(n) % len(FAMILIES[name].classes)


def pictures(x: torch.Tensor) -> list[bytes]:
    return [i.tobytes() for i in x.numpy()]


@quick
@given(
    name=names,
    style=st.sampled_from(STYLES),
    seed=st.integers(0, 2**40),
    split=st.sampled_from(["train", "test", "shadow"]),
    n=st.integers(1, 40),
)
def test_same_arguments_same_bytes(name, style, seed, split, n):
    x = draw(name, labels(name, n), style, seed, split)
    assert x.shape == (n, 3, 32, 32) and x.dtype == torch.uint8
    assert torch.equal(x, draw(name, labels(name, n), style, seed, split))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_bytes_do_not_depend_on_threads(name):
    y, before = labels(name, CHUNK + 9), torch.get_num_threads()
    try:
        drawn = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            drawn.append(draw(name, y))
            assert torch.get_num_threads() == n  # the caller's setting is restored
    finally:
        torch.set_num_threads(before)
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_scenes_do_not_depend_on_threads():
    before = torch.get_num_threads()
    try:
        drawn = []
        for n in (1, 2):
            torch.set_num_threads(n)
            drawn.append(scenes(CHUNK + 9, 4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(drawn[0][0], drawn[1][0]) and drawn[0][2] == drawn[1][2]


def test_threads_are_restored_after_an_error(monkeypatch):
    def broken(y, s):
        raise RuntimeError("broken")

    monkeypatch.setitem(FAMILIES["signs"].render, "task", broken)
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="broken"):
        draw("signs", [0])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_streams_never_meet(name):
    y = labels(name, 64)
    streams = [
        draw(name, y, style, seed, split)
        for style in STYLES
        for seed in (0, 1)
        for split in ("train", "test")
    ]
    assert len({p for x in streams for p in pictures(x)}) == 8 * 64


def test_scene_streams_never_meet_each_other_nor_a_family():
    x = [
        scenes(192, seed, split)[0] for seed in (0, 1) for split in ("train", "pretrain", "shadow")
    ]
    x += [draw(name, labels(name, 64), style) for name in FAMILIES for style in STYLES]
    assert len({p for i in x for p in pictures(i)}) == 6 * 192 + 2 * 64 * len(FAMILIES)


def test_chunks_of_one_draw_differ():
    x = pictures(draw("letters", torch.zeros(3 * CHUNK)))
    assert len(set(x)) == 3 * CHUNK


def test_no_scene_comes_from_a_family(monkeypatch):
    def forbidden(*_):
        raise AssertionError("a scene was drawn by a family's renderer")

    expected = scenes(130, 5, "shadow")
    for fam in FAMILIES.values():
        for style in STYLES:
            monkeypatch.setitem(fam.render, style, forbidden)
    for table in ("TEXTURES", "LANDS"):
        for k in getattr(labworld, table):
            monkeypatch.setitem(getattr(labworld, table), k, forbidden)
    for tiles in ("glyphs", "_shape_tiles", "_sign_tiles", "_flag_tiles"):
        monkeypatch.setattr(labworld, tiles, forbidden)
    with pytest.raises(AssertionError):
        draw("textures", [0])
    x, y, captions = scenes(130, 5, "shadow")
    assert torch.equal(x, expected[0]) and torch.equal(y, expected[1]) and captions == expected[2]


@quick
@given(n=st.integers(0, 200), seed=st.integers(0, 2**40))
def test_scenes_are_balanced_and_told_truly(n, seed):
    x, y, captions = scenes(n, seed)
    assert x.shape == (n, 3, 32, 32) and len(y) == len(captions) == n
    if n:
        assert y.bincount(minlength=64).max() - y.bincount(minlength=64).min() <= 1
    for c, text in zip(y.tolist(), captions):
        assert re.search(
            rf"^(a photo of )?an? (large )?{SCENE_CLASSES[c]}\b", text
        )  # the main object comes first
        assert not re.search(r"\ba [aeiou]|\{|\}", text)
        if " on a" in text:
            assert text.split()[-2] in GROUNDS


@quick
@given(name=names, seed=st.integers(0, 2**40), n=st.integers(1, 60))
def test_captions_name_their_class(name, seed, n):
    fam, y = FAMILIES[name], labels(name, n)
    x, captions = draw_captioned(name, y, seed)
    assert torch.equal(x, draw(name, y, "pretrain", seed)) and len(captions) == n
    assert all(fam.classes[c] in text for c, text in zip(y, captions)) and not any(
        "{" in text for text in captions
    )


def test_captions_name_the_colours_drawn():
    "The corner pixels of flat letters show the ground colour that the caption tells."
    x, captions = draw_captioned("letters", labels("letters", 400), 3)
    told = [
        (i, m[1])
        for i, text in enumerate(captions)
        if (m := re.search(r"on an? (\w+) background", text))
    ]
    rgb = torch.tensor([labworld.COLOURS[c] for c in COLOUR_NAMES])
    corners = torch.stack(
        [x[i, :, :3, :].flatten(1).float().median(1).values / 255 for i, _ in told]
    )
    nearest = torch.cdist(corners, rgb).argmin(1)
    assert len(told) > 30 and sum(
        COLOUR_NAMES[k] == c for k, (_, c) in zip(nearest, told)
    ) > 0.75 * len(told)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_family_is_complete(name):
    fam = FAMILIES[name]
    assert (
        len(set(fam.classes)) == len(fam.classes) >= 10
        and 3 <= len(fam.templates) <= 5
        and all(t.count("{}") == 1 for t in fam.templates)
    )
    for style in STYLES:
        x = draw(name, labels(name, 2 * len(fam.classes)), style).float()
        assert x.std((1, 2, 3)).min() > 3 and 20 < x.mean() < 235  # nothing is blank


def test_the_target_task_has_many_classes():
    assert max(len(f.classes) for f in FAMILIES.values()) >= 15 and len(FAMILIES) >= 7


@pytest.mark.parametrize(
    "args, message",
    [
        (("leters", [0]), "unknown family 'leters'; did you mean 'letters'"),
        (("letters", [26]), "'letters' has classes 0 to 25"),
        (("letters", [-1]), "run from -1 to -1"),
        (("letters", [0], "tasks"), "unknown style 'tasks'; did you mean 'task'"),
    ],
)
def test_bad_arguments_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        draw(*args)


def test_importing_draws_nothing():
    import subprocess, sys

    code = (
        "import lfpm_nb.labworld as w; assert not any(f.cache_info().currsize for f in "
        "(w.glyphs, w._font, w._sign_tiles, w._flag_tiles))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
