"""LabWorld writes with matplotlib's fonts through Pillow's FreeType.

Other glyphs would be another data set; a few other pixels are another rounding.

`python tests/test_glyphs.py` records the glyphs anew, for whoever changes them on purpose."""

import hashlib
import json
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import PIL
import pytest
from PIL import Image, features

from lfpm_nb import labworld
from lfpm_nb.core import write_json

REFERENCE = Path(__file__).parent / "reference" / "glyphs.json"
# Of a glyph's ink. Pillow 10.4, 11.3, 12.0 and 13.0, with four FreeTypes, agreed in every bit of
# single characters; another font is off by far more.
TOLERANCE = 0.01


def made_with() -> dict:
    return dict(
        pillow=PIL.__version__,
        freetype=features.version("freetype2"),
        matplotlib=matplotlib.__version__,
    )


def font_hash(name: str) -> str:
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def bits(mask: Image.Image) -> np.ndarray:
    "What `labworld.sdf` sees of a mask."
    return np.asarray(mask) > 127


def glyphs_drawn() -> dict:
    "{(font, text, fill): bits} of every glyph that any family draws, in the order of their names."
    seen, plain = {}, labworld.glyph

    def record(text, font, fill=0.8):
        mask = plain(text, font, fill)
        seen[font, text, fill] = bits(mask)
        return mask

    caches = (labworld.glyphs, labworld._sign_tiles)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(labworld, "glyph", record)
        for cache in caches:
            cache.cache_clear()
        for name in labworld.FAMILIES:
            for style in labworld.STYLES:
                labworld.draw(name, [0], style)
    for cache in caches:
        cache.cache_clear()
    return dict(sorted(seen.items()))


def summary(drawn: dict) -> dict:
    "What is recorded of glyphs: one hash of all, and the ink of each in pixels."
    h, ink = hashlib.sha256(), {}
    for (font, text, fill), mask in drawn.items():
        h.update(f"{font} {text} {fill} {mask.shape}".encode() + np.packbits(mask).tobytes())
        ink.setdefault(font, {})[f"{text} {fill}"] = int(mask.sum())
    return dict(hash=h.hexdigest(), ink=ink)


def differences(recorded: dict, now: dict) -> list[str]:
    "Glyphs that are missing, new, or differ by more than TOLERANCE of their ink."
    out = []
    for font in sorted({*recorded["ink"], *now["ink"]}):
        a, b = recorded["ink"].get(font, {}), now["ink"].get(font, {})
        out += [
            f"{font}: {k.split()[0]!r} has {b.get(k, 0)} pixels of ink, recorded {a.get(k, 0)}"
            for k in sorted({*a, *b})
            if abs(a.get(k, 0) - b.get(k, 0)) > TOLERANCE * a.get(k, 0)
        ]
    return out


def check(recorded: dict, now: dict) -> None:
    "Silent for the same bits, a warning for single pixels, AssertionError for other glyphs."
    if now["hash"] == recorded["hash"]:
        return
    off, fonts = (
        differences(recorded, now),
        [f for f, h in recorded["fonts"].items() if font_hash(f) != h],
    )
    why = (
        f"made with {recorded['made_with']}, here {made_with()}; font files that differ:"
        f" {', '.join(fonts) or 'none'}"
    )
    assert not off, (
        f"{len(off)} glyphs are others than those of the shipped backbone and results ({why}),"
        f" first {off[:3]}. Pictures with them are another data set: install the recorded"
        " matplotlib, or, if the change is meant, run `python tests/test_glyphs.py`, pretrain and"
        " measure the lab anew"
    )
    warnings.warn(
        f"single pixels of LabWorld's glyphs differ ({why}): results of this machine will not"
        " repeat the shipped ones bit for bit"
    )


@pytest.fixture(scope="module")
def drawn():
    return glyphs_drawn()


@pytest.fixture(scope="module")
def recorded():
    return json.loads(REFERENCE.read_text(encoding="utf-8"))


def test_glyphs_are_those_of_the_shipped_results(drawn, recorded):
    assert len(drawn) > 400 and {"STOP", "A", "7"} <= {text for _, text, _ in drawn}
    check(recorded, summary(drawn))


def test_one_pixel_is_a_warning_and_another_font_is_an_error(drawn, recorded):
    key = ("DejaVuSans", "A", 0.8)
    mask = drawn[key].copy()
    mask[0, 0] = True
    with pytest.warns(UserWarning, match="single pixels .* will not repeat"):
        check(recorded, summary(drawn | {key: mask}))
    other = drawn | {key: bits(labworld.glyph("A", "DejaVuSerif"))}
    with pytest.raises(AssertionError, match="1 glyphs are others .* another data set"):
        check(recorded, summary(other))
    with pytest.raises(AssertionError, match="1 glyphs"):
        check(recorded, summary({k: v for k, v in drawn.items() if k != key}))


if __name__ == "__main__":
    now = glyphs_drawn()
    write_json(
        REFERENCE,
        dict(made_with=made_with(), fonts={f: font_hash(f) for f, _, _ in now}, **summary(now)),
    )
