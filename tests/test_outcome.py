"""What purify says of its result, who may write where, and that strangers' names stay text."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lfpm_nb import cli
from lfpm_nb.core import Stages, load_state, save_state
from lfpm_nb.formats import layout
from lfpm_nb.purify import BESIDE, KINDS, NothingToPurify, check_out, purify
from conftest import near
from test_purify import QUICK, paint

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def files(lab, tmp_path_factory):
    "A base, a merged tower and a folder of 100 pictures."
    root = tmp_path_factory.mktemp("outcome")
    save_state(root / "base.safetensors", layout(lab.state(), {}, "visual")[0])
    save_state(root / "merged.safetensors", layout(near(lab, 1, 0.0035), {}, "visual")[0])
    paint(root / "shadow")
    return root


def call(files, out, **kw):
    given = dict(stages=Stages(files / "cache")) | QUICK | kw
    return purify(
        files / "merged.safetensors",
        files / "base.safetensors",
        "lfpm-lab",
        files / "shadow",
        out=out,
        **given,
    )


def command(files, out, **kw):
    "The same as arguments of the command."
    p = [x for k, v in (QUICK | kw).items() if k != "preset" for x in ("-p", f"{k}={v}")]
    return (
        "purify",
        str(files / "merged.safetensors"),
        "--base",
        str(files / "base.safetensors"),
        "--model",
        "lfpm-lab",
        "--shadow",
        str(files / "shadow"),
        "--out",
        str(out),
        "--preset",
        "tiny",
        *p,
    )


def said(folder: Path) -> tuple[dict, str, str]:
    return (
        json.loads((folder / "card.json").read_text(encoding="utf-8")),
        (folder / "card.md").read_text(encoding="utf-8"),
        (folder / "path.html").read_text(encoding="utf-8").split("<script", 1)[0],
    )


# --- what came out ------------------------------------------------------------------------------


def test_the_merged_models_own_weights_are_not_called_purified(files, lfpm, tmp_path, monkeypatch):
    monkeypatch.setenv("LFPM_CACHE", str(files / "cache"))
    out = tmp_path / "o" / "purified.safetensors"
    code, printed, err = lfpm(*command(files, out, lam=0))
    card, text, page = said(out.parent)
    state, meta = load_state(out)
    assert (
        code == 3 and "NOT PURIFIED" in err and "bit for bit" in err and "% unchanged" in printed
    ), (printed, err)
    assert (
        card["kind"] == KINDS[0]
        and card["outcome"]["state"] == "unchanged"
        and meta["purified"] == "no: unchanged"
    )
    assert (
        "# NOT purified, unchanged" in text
        and "**purified**" not in text
        and "NOT PURIFIED" in text
        and "bit for bit" in page
    )
    merged = load_state(files / "merged.safetensors")[0]
    assert all(torch.equal(v, merged[k]) for k, v in state.items())


def test_a_moved_model_is_purified_and_few_pictures_are_said(files, lfpm, tmp_path, monkeypatch):
    monkeypatch.setenv("LFPM_CACHE", str(files / "cache"))
    out = tmp_path / "o" / "purified.safetensors"
    code, printed, err = lfpm(*command(files, out))
    card, text, page = said(out.parent)
    assert (
        code == 0
        and "% purified" in printed
        and err.count("\n") == 1
        and "Only 100 pictures were used" in err
    ), err
    assert (
        card["kind"] == KINDS[1]
        and card["outcome"]["found"]
        and load_state(out)[1]["purified"] == "LFPM"
    )
    for place in (text, page):
        assert (
            "Only 100 pictures were used" in place and "NOT" not in place.split("What it costs")[0]
        )
    assert "0 of one colour" in text


@pytest.mark.parametrize(
    "card, code",
    [
        (None, 0),
        (dict(kind=KINDS[1], outcome=dict(state="purified")), 0),
        (dict(kind=KINDS[0], outcome=dict(state="unchanged")), 3),
    ],
)
def test_a_run_notebook_that_purified_nothing(lfpm, tmp_path, monkeypatch, card, code):
    if card:
        (tmp_path / "card.json").write_text(json.dumps(card), encoding="utf-8")
    monkeypatch.setattr(cli, "run_notebook", lambda *a: tmp_path)
    got, printed, err = lfpm("run", "purify")
    assert (
        got == code
        and printed == f"results in {tmp_path}\n"
        and err
        == ("" if not code else "lfpm: nothing was purified (unchanged); card.md there says why\n")
    )


def test_nothing_found_is_said(files, lfpm, tmp_path, monkeypatch):
    "The mark that a method leaves in its log reaches terminal, card and page."
    import lfpm_nb.experiment as X

    real = X.train_end

    def finds_nothing(*a):
        end, log = real(*a)
        return end, log | dict(nothing_found="no prompt <b>moves</b> the merged model")

    monkeypatch.setattr(X, "train_end", finds_nothing)
    monkeypatch.setenv("LFPM_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "o" / "purified.safetensors"
    code, _, err = lfpm(*command(files, out))
    card, text, page = said(out.parent)
    assert code == 3 and "The method found nothing to remove: no prompt" in err
    assert (
        card["outcome"]["state"] == "nothing found"
        and not card["outcome"]["found"]
        and "# NOT purified, nothing found" in text
    )
    assert "nothing to remove: no prompt &lt;b&gt;moves" in page


def test_a_learning_rate_that_moves_nothing(files, tmp_path):
    got = call(files, tmp_path / "p.safetensors", strength=0.0)
    assert (
        got.card["outcome"]["state"] == "unchanged"
        and "moved no weight" in got.card["outcome"]["notes"][0]
    )


def test_one_table_of_exit_codes(lfpm, monkeypatch):
    code, text, _ = lfpm("--help")
    words = " ".join(text.split())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for number, meaning in cli.EXITS.items():
        assert f"{number} {meaning}" in words and f"| {number} | {meaning} |" in readme

    def main_after(e):
        def fails(*a):
            raise e

        monkeypatch.setattr(cli, "run_notebook", fails)
        return lfpm("run", "main")[0]

    cases = (
        (ValueError(""), 2),
        (FileNotFoundError(""), 2),
        (RuntimeError(""), 1),
        (MemoryError(), 1),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "full"), 1),
        (NothingToPurify(""), 3),
    )
    for e, want in cases:
        assert main_after(e) == want, e


# --- one result a folder ------------------------------------------------------------------------


def test_a_second_purify_in_the_same_folder_is_refused(files, tmp_path):
    "While another process holds the folder nothing is trained, and nothing of it is touched."
    hold = (
        "import sys, pathlib; from lfpm_nb.purify import alone_in\n"
        "with alone_in(pathlib.Path(sys.argv[1])): print('here', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as p:
        assert p.stdout.readline() == "here\n"
        with pytest.raises(
            ValueError, match="another purify is at work in .*; let it end, or give --out"
        ):
            call(files, tmp_path / "p.safetensors", stages=Stages(tmp_path / "none"))
        assert not (tmp_path / "none").exists()
        p.kill()  # the system lets go of a killed holder's lock
    call(files, tmp_path / "p.safetensors")
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(("p.safetensors", *BESIDE))


def test_another_results_card_is_not_overwritten(files, tmp_path):
    call(files, tmp_path / "a.safetensors")
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match="holds a.safetensors with its card and its vector, .*a folder of its own"
    ):
        call(files, tmp_path / "b.safetensors", lam=0.25)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    call(
        files, tmp_path / "a.safetensors", lam=0
    )  # the same name: the whole result is replaced, whatever its kind
    assert said(tmp_path)[0]["kind"] == KINDS[0] and check_out(tmp_path / "a.safetensors", ())


# --- names are text -----------------------------------------------------------------------------


def test_control_characters_of_a_file_are_spelt_out(lab, lfpm, tmp_path):
    evil = {"evil\x1b[2J\nlfpm: all is well\u202e": torch.ones(2)}
    write = lambda name, *state: save_state(tmp_path / name, layout(*state)[0])
    write("odd.safetensors", lab.state() | evil, {}, "visual")
    write("whole.safetensors", lab.state(), evil, "open_clip")
    write("base.safetensors", lab.state(), {}, "visual")
    odd, whole, base, out = (
        str(tmp_path / f"{n}.safetensors") for n in ("odd", "whole", "base", "m")
    )
    for args in (
        ("merge", odd, base, "--base", base, "--out", out),
        ("convert", whole, out, "--to", "visual"),
    ):
        _, printed, err = lfpm(*args)
        assert (
            not re.search("[\x00-\x09\x0b-\x1f\u202e]", printed + err)
            and (printed + err).count("\n") == 1
        )
        assert r"evil\x1b[2J\nlfpm: all is well\u202e" in printed + err, (printed, err)


def test_a_page_has_a_place_before_the_work(files, lfpm, tmp_path, monkeypatch):
    "A folder, an input and a place under a file are refused before anything is measured or drawn."
    a, b = str(files / "merged.safetensors"), str(files / "base.safetensors")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "report.html").mkdir()
    for name in ("walk", "_explored"):
        monkeypatch.setattr(cli, name, lambda *a: pytest.fail("it computed"))
    monkeypatch.setattr("lfpm_nb.report.figures", lambda *a: pytest.fail("it drew"))
    for place, why in (
        (tmp_path, "is a folder"),
        (a, "is an input"),
        (tmp_path / "file" / "x.html", "cannot write"),
    ):
        for args in (
            ("path", a, b, "--task", "signs", "--n-test", "44"),
            ("explore", "--models", a, b),
        ):
            code, printed, err = lfpm(*args, "--html", str(place))
            assert (code, printed, err.count("\n")) == (2, "", 1) and why in err, err
    for place, why in ((tmp_path, "is a folder"), (tmp_path / "file", "cannot write")):
        code, printed, err = lfpm("report", "--out", str(place))
        assert (code, printed, err.count("\n")) == (2, "", 1) and why in err, err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "report.html"]


def test_explore_is_guarded(tmp_path, monkeypatch):
    """Token, Host check and an end for idle kernels are what Voilà is told.

    A port that is taken is refused before it."""
    import socket

    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "/elsewhere")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} cannot be had .*; give another --port"):
            cli._guard(str(tmp_path), port, "t")
    env = cli._guard(str(tmp_path), port, "t")
    said = json.loads((tmp_path / "voila.json").read_text(encoding="utf-8"))
    assert env == dict(JUPYTER_TOKEN="t", JUPYTER_CONFIG_PATH=f"{tmp_path}:/elsewhere")
    assert said["Voila"] == dict(
        auto_token=True, port_retries=0, tornado_settings=dict(allow_remote_access=False)
    )
    assert 0 < said["MappingKernelManager"]["cull_idle_timeout"] <= 300


def test_the_title_of_a_served_page_is_text(tmp_path):
    "A folder's name in Markdown: no tag, no link, no picture of it is made."
    from nbconvert.filters import markdown2html
    from lfpm_nb.explore import page_of

    name = "<img src=x onerror=alert(1)> [a](javascript:b) ![c](d) `e` *f* \x1b"
    page = json.loads(page_of("None", f"Run {name}", tmp_path).read_text(encoding="utf-8"))
    html = markdown2html("".join(page["cells"][0]["source"])).split("</h1>")[0]
    assert (
        not re.search(
            "<(img|a |em|code|strong)", html.split(">", 1)[1].replace('<a class="anchor-link"', "")
        )
        and r"\x1b" in html
    ), html
