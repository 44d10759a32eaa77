"""Each kind of picture and label of `benchmarks/pictures.py` comes out as it says there."""

import pytest
from test_benchmark import load

pictures = load("pictures")


def test_there_are_many_kinds():
    assert len(pictures.KINDS) >= 100 and sum(bool(r) for _, r in pictures.KINDS.values()) >= 40


@pytest.mark.parametrize("name", pictures.KINDS)
def test_right_or_refused(name, tmp_path):
    verdict, came = pictures.judged(name, tmp_path)
    assert verdict == ("refused" if pictures.KINDS[name][1] else "right"), came


def test_a_wrong_number_a_traceback_and_a_hang_are_seen(tmp_path, monkeypatch):
    "The script can fail: each fault it looks for is found."

    def looks(call, want=None, refused=""):
        monkeypatch.setitem(pictures.KINDS, "toy", (lambda folder: (call, want), refused))
        return pictures.judged("toy", tmp_path)

    def fails(e):
        raise e

    assert looks(lambda: [1, 2, 3], [90, 90, 90])[0] == "wrong" == looks(lambda: 1, refused="no")[0]
    assert looks(lambda: fails(KeyError("x")))[0] == "wrong"
    for e in (ValueError("no,\nin two lines"), ValueError("yes")):
        assert looks(lambda: fails(e), refused="no")[0] == "wrong"
    assert looks(lambda: fails(ValueError("no")), refused="no")[0] == "refused"
