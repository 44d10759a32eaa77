"""Purifying a stranger's checkpoint: files in, files out.

What is refused before any work, and that nothing half-written stays."""

import errno
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import near
from PIL import Image
from lfpm_nb import purify as F
from lfpm_nb.core import Diverged, Stages, load_state, save_state
from lfpm_nb.settings import around, parameters
from lfpm_nb.runs import config_hash, experiments, presets, settings_of
from lfpm_nb.formats import Tower, backbone, fitted, layout, read_tower, take, write_tower
from lfpm_nb.path import lerp
from lfpm_nb.purify import (
    BESIDE,
    Vocabulary,
    label,
    merge_files,
    open_case,
    purify,
    read_pictures,
    save_head,
    walk,
)
from lfpm_nb.tasks import load_task, shadow_set

QUICK = dict(
    preset="tiny", shadow_n=80, held=20, prompt_steps=2, anti_batch=40, rho=0.05, lam=0.5
)  # so few steps would leave the rule at λ = 0


def paint(folder: Path, n: int = 100, by_class: bool = False):
    "n LabWorld scenes as PNG files; returns their true classes by name."
    x, y, classes = shadow_set(n, seed=5)
    of = {}
    for i, (img, c) in enumerate(zip(x, y)):
        name = f"{classes[c].replace(' ', '_')}/{i:03d}.png" if by_class else f"{i:03d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(img.permute(1, 2, 0).numpy()).save(folder / name)
        of[name] = classes[c]
    return of


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("purify")


@pytest.fixture(scope="module")
def stranger(root, lab):
    """Files as another library leaves them.

    Three fine-tuned towers under Hugging Face's names in fp16, merged by a few lines of task
    arithmetic that know nothing of this kit, the pretrained tower beside them, and a folder of
    pictures."""
    base, hf = lab.state(), {}
    for i in range(3):
        hf[i] = {k: v.half() for k, v in layout(near(lab, i, 0.01), {}, "hf")[0].items()}
    pre = {k: v.half() for k, v in layout(base, {}, "hf")[0].items()}
    merged = {
        k: (v.float() + 0.3 * sum(hf[i][k].float() - v.float() for i in hf)).half()
        for k, v in pre.items()
    }
    from safetensors.torch import save_file

    for name, state in (
        ("pre", pre),
        ("merged", merged),
        *((f"tower{i}", s) for i, s in hf.items()),
    ):
        save_file(
            {k: v.contiguous() for k, v in state.items()},
            root / f"{name}.safetensors",
            {"format": "pt"},
        )
    paint(root / "shadow")
    return root


def call(root, merged="merged", base="pre", **kw):
    args = (
        dict(out=root / "no" / "purified.safetensors", stages=Stages(root / "cache")) | QUICK | kw
    )
    return purify(
        root / f"{merged}.safetensors",
        root / f"{base}.safetensors",
        "lfpm-lab",
        args.pop("shadow", root / "shadow"),
        **args,
    )


@pytest.fixture(scope="module")
def done(stranger):
    stages = Stages(stranger / "cache")
    return purify(
        stranger / "merged.safetensors",
        stranger / "pre.safetensors",
        "lfpm-lab",
        stranger / "shadow",
        out=stranger / "out" / "purified.safetensors",
        stages=stages,
        **QUICK,
    )


# --- a stranger's path --------------------------------------------------------------------------


def test_comes_back_as_it_came(stranger, done):
    before, after = (
        load_state(p)[0]
        for p in (stranger / "merged.safetensors", done.folder / "purified.safetensors")
    )
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {
        k: (v.shape, v.dtype) for k, v in after.items()
    }
    assert any(not torch.equal(v, before[k]) for k, v in after.items()) and all(
        v.isfinite().all() for v in after.values()
    )
    meta = load_state(done.folder / "purified.safetensors")[1]
    assert (
        meta["format"] == "pt"
        and meta["purified"] == "LFPM"
        and meta["made_from"] == done.card["parents"]["merged"]["sha256"]
    )


def test_convert_purify_back(stranger, done, lab, lfpm):
    """hf -> open_clip by the command, purified there, converted back.

    The same keys, dtypes and shapes, and it loads."""
    a, b, c = (str(stranger / f"{n}.safetensors") for n in ("oc", "oc-out/purified", "back"))
    save_state(
        stranger / "whole.safetensors",
        layout(
            lab.state(),
            {k: v for k, v in lab.model.state_dict().items() if not k.startswith("visual.")},
            "open_clip",
        )[0],
    )
    assert (
        lfpm(
            "convert",
            str(stranger / "merged.safetensors"),
            a,
            "--to",
            "open_clip",
            "--base",
            str(stranger / "whole.safetensors"),
        )[0]
        == 0
    )
    args = [x for k, v in QUICK.items() if k != "preset" for x in ("-p", f"{k}={v}")]
    code, out, err = lfpm(
        "purify",
        a,
        "--base",
        str(stranger / "whole.safetensors"),
        "--model",
        "lfpm-lab",
        "--shadow",
        str(stranger / "shadow"),
        "--out",
        b,
        "--preset",
        "tiny",
        *args,
    )
    assert code == 0 and "of 20 held-out pictures agree with their label" in out, err
    code, out, _ = lfpm("convert", b, c, "--to", "hf")
    assert code == 0 and "have no place in hf: proj, " in out
    before, after = load_state(stranger / "merged.safetensors")[0], load_state(c)[0]
    assert {k: (v.shape, v.dtype) for k, v in before.items()} == {
        k: (v.shape, v.dtype) for k, v in after.items()
    }
    clip = backbone("lfpm-lab", read_tower(stranger / "pre.safetensors"))
    clip.with_state(fitted(read_tower(c), clip))


def test_projection_stays_where_the_format_has_none(done, lab):
    vector, _ = load_state(done.folder / "anti-backdoor.safetensors")
    assert (
        vector["proj"].abs().max() == 0
        and torch.equal(done.end["proj"], lab.state()["proj"])
        and done.card["frozen"] == ["proj"]
    )
    assert sum(v.abs().max() > 0 for v in vector.values()) > len(vector) - 3


def test_vector_leads_from_merged_to_purified(stranger, done, lab):
    theta = fitted(read_tower(stranger / "merged.safetensors"), lab)
    vector, _ = load_state(done.folder / "anti-backdoor.safetensors")
    assert all(torch.allclose(theta[k] + v, done.end[k], atol=1e-6) for k, v in vector.items())
    mixed = lerp(theta, done.end, done.card["lam"])
    assert all(torch.equal(v, done.theta[k]) for k, v in mixed.items())


def test_card_says_everything(stranger, done):
    card = json.loads((done.folder / "card.json").read_text(encoding="utf-8"))
    assert (
        card["parents"]["merged"]["sha256"] == F.file_sha(stranger / "merged.safetensors")
        and card["parents"]["merged"]["format"] == "hf"
    )
    assert (
        card["files"]["purified.safetensors"] == F.file_sha(done.folder / "purified.safetensors")
        and {"torch", "open_clip", "threads"} <= card["versions"].keys()
    )
    assert (
        set(card["parameters"]) == set(parameters("purify")) - set(around("purify"))
        and card["lam"] == 0.5
        and card["rule"] == {}
    )
    assert (
        [r["lam"] for r in card["path"]] == [i / 20 for i in range(21)]
        and card["cost"]["merged"]["changed"] == 0
        and card["cost"]["purified"]["n"] == 20
    )
    text = (done.folder / "card.md").read_text(encoding="utf-8")
    assert (
        card["parents"]["base"]["sha256"] in text
        and "agrees with label %" in text
        and "pseudo-labels" in text
        and "n = 20" in text
    )
    (prompt,) = card["prompts"]
    moves = f"they move the merged model's unit features by {prompt['shift']:.2g} of"
    assert prompt["semantic"] == 2.0 and f"weights 2 (LFPM Eq 16); {moves}" in text
    assert str(stranger) not in text + (done.folder / "card.json").read_text(encoding="utf-8"), (
        "a card travels: no path of this machine in it"
    )
    page = (done.folder / "path.html").read_text(encoding="utf-8")
    assert (
        "agrees with label" in page and "under mined prompts" not in page and "by hand" in page
    ), "a given λ was chosen on nothing"
    assert sorted(p.name for p in done.folder.iterdir()) == sorted(
        ("purified.safetensors", *BESIDE)
    )


def test_resumes_and_changes_nothing(stranger, done, monkeypatch):
    stages = Stages(stranger / "cache")
    monkeypatch.setattr("lfpm_nb.experiment.stage_one", lambda *a: pytest.fail("Stage I ran again"))
    again = purify(
        stranger / "merged.safetensors",
        stranger / "pre.safetensors",
        "lfpm-lab",
        stranger / "shadow",
        out=stranger / "out" / "purified.safetensors",
        stages=stages,
        **QUICK,
    )
    assert (
        all(reused for _, _, reused in stages.log)
        and len(stages.log) == 3
        and all(torch.equal(v, done.theta[k]) for k, v in again.theta.items())
    )


@pytest.mark.parametrize("rule", ["knee", "level"])
def test_the_rule_chooses_lam_when_asked(stranger, done, tmp_path, rule):
    got, text = (
        call(stranger, lam=rule, out=tmp_path / "p.safetensors"),
        (tmp_path / "card.md").read_text,
    )  # the training is reused
    c, level = got.card["rule"]["curve"], got.card["rule"]["pretrained"]
    knee = next(
        (
            a["lam"]
            for a, b in zip(c, c[1:])
            if a["prompted"] - b["prompted"] < 0.5 * (b["lam"] - a["lam"])
        ),
        1.0,
    )
    healed = next((p["lam"] for p in c if all(s <= l for s, l in zip(p["shift"], level))), knee)
    assert [p["lam"] for p in c] == [i / 20 for i in range(len(c))] and c[-1]["lam"] >= got.card[
        "lam"
    ], "the points that the rule read"
    assert (
        got.card["lam"] == dict(knee=knee, level=healed)[rule]
        and f"the rule `{rule}` (path.lam_rules), without knowledge of an attack" in text()
    )
    assert all(
        f"{s:.2g}" in text()
        for s in (*level, *next(p["shift"] for p in c if p["lam"] == got.card["lam"]))
    )
    page = (tmp_path / "path.html").read_text(encoding="utf-8")
    assert (
        "prompt 1, pretrained model" in page
        and "under mined prompts" in page
        and f"by the rule {rule}" in page
    )


def test_same_code_path_as_the_main_run(stranger, done, lab):
    "The same merge, pictures, labels and settings given to `defend` directly: the same weights."
    from lfpm_nb.antibackdoor import stage_one
    from lfpm_nb.defend import defend

    files = dict(
        merged=stranger / "merged.safetensors",
        base=stranger / "pre.safetensors",
        shadow=stranger / "shadow",
    )
    P = settings_of("purify", "tiny", {k: v for k, v in QUICK.items() if k != "preset"} | files)
    case, _, _ = open_case(P)
    s = P.main.strengths
    theta, d = defend(
        "LFPM",
        case.theta,
        case.clip,
        case.shadow,
        0,
        0.5,
        s,
        stage_one(case.clip, case.theta, case.shadow, s, 0),
    )
    assert d.lam == done.card["lam"] and all(
        torch.equal(v, done.theta[k]) for k, v in theta.items()
    )


# --- pictures and labels ------------------------------------------------------------------------


def test_corrupt_pictures_are_skipped_counted_and_named(tmp_path, lab):
    paint(tmp_path)
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    pics = read_pictures(tmp_path, 32)
    assert (
        len(pics.x) == 100
        and pics.found == 102
        and set(pics.skipped) == {"cut.jpg", "empty.png"}
        and all(pics.skipped.values())
    )
    assert (
        torch.equal(read_pictures(tmp_path, 32, most=100, seed=0).x, pics.x)
        and read_pictures(tmp_path, 32, most=100, seed=1).names != pics.names
    )


def test_few_pictures_are_refused(tmp_path):
    paint(tmp_path, 3)
    (tmp_path / "bad.png").touch()
    with pytest.raises(
        ValueError,
        match=r"3 readable pictures, 1 cannot be read \(bad.png\); at least 100 are needed",
    ):
        read_pictures(tmp_path, 32)
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_pictures(tmp_path / "none", 32)


def test_class_folders_are_labels(tmp_path, lab):
    of = paint(tmp_path, by_class=True)
    pics, v = read_pictures(tmp_path, 32), Vocabulary.of(lab)
    y, W, how = label(lab, pics, tmp_path, "", v)
    classes = sorted(set(of.values()))
    assert (
        [classes[i] for i in y] == [of[n] for n in pics.names]
        and how["labels"] == "class sub-folders"
        and len(W) == how["classes"] == len(classes)
    )
    y2, W2, how2 = label(lab, pics, tmp_path, "none", v)
    assert "pseudo-labels" in how2["labels"] and len(W2) == len(v.words)
    (tmp_path / "loose.png").write_bytes((tmp_path / pics.names[0]).read_bytes())
    with pytest.raises(ValueError, match="loose.png lies outside a class folder"):
        label(lab, read_pictures(tmp_path, 32), tmp_path, "", v)


def test_label_tables(tmp_path, lab):
    of = paint(tmp_path / "p")
    pics, v, table = read_pictures(tmp_path / "p", 32), Vocabulary.of(lab), tmp_path / "labels.csv"
    table.write_text(
        "file,label\n" + "".join(f"{n},{c}\n" for n, c in of.items()), encoding="utf-8"
    )
    y, _, how = label(lab, pics, tmp_path / "p", str(table), v)
    assert [sorted(set(of.values()))[i] for i in y] == [
        of[n] for n in pics.names
    ] and "labels.csv" in how["labels"]
    table.write_text("".join(f"{n},{v.words.index(c)}\n" for n, c in of.items()), encoding="utf-8")
    assert [v.words[i] for i in label(lab, pics, tmp_path / "p", str(table), v)[0]] == [
        of[n] for n in pics.names
    ]
    for bad in (len(v.words), -1):
        table.write_text(
            "".join(f"{n},{bad if n == '007.png' else 0}\n" for n in of), encoding="utf-8"
        )
        says = (
            rf"1 labels out of range \(007.png,{bad}\); "
            rf"expected numbers from 0 to {len(v.words) - 1}"
        )
        with pytest.raises(ValueError, match=says):
            label(lab, pics, tmp_path / "p", str(table), v)
    table.write_text("000.png,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no label for 99 of 100 pictures"):
        label(lab, pics, tmp_path / "p", str(table), v)
    with pytest.raises(FileNotFoundError, match="no labels at"):
        label(lab, pics, tmp_path / "p", str(tmp_path / "none.csv"), v)


def test_vocabulary_files(tmp_path, lab):
    (tmp_path / "words.txt").write_text("red circle\n\nblue square\n", encoding="utf-8")
    v = Vocabulary.of(lab, str(tmp_path / "words.txt"))
    assert (
        v.words == ["red circle", "blue square"]
        and v.head(lab).shape == (2, 128)
        and v.source == "words.txt"
    )
    save_head(tmp_path / "head.safetensors", v.head(lab), v.words)
    h = Vocabulary.of(lab, str(tmp_path / "head.safetensors"))
    assert torch.equal(h.head(lab), v.head(lab)) and torch.equal(
        h.head(lab, ["blue square"]), v.head(lab)[1:]
    )
    with pytest.raises(ValueError, match="did you mean 'red circle'"):
        h.head(lab, ["red circl"])
    (tmp_path / "one.txt").write_text("same\nsame\n", encoding="utf-8")
    with pytest.raises(ValueError, match="2 words, 1 different"):
        Vocabulary.of(lab, str(tmp_path / "one.txt"))
    with pytest.raises(FileNotFoundError, match="no vocabulary at"):
        Vocabulary.of(lab, str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="expected a head"):
        save_state(tmp_path / "x.safetensors", {"a": torch.ones(1)}) or Vocabulary.of(
            lab, str(tmp_path / "x.safetensors")
        )


def test_tower_alone_says_what_is_needed(lab, monkeypatch):
    monkeypatch.setitem(lab.card, "text", False)
    with pytest.raises(
        ValueError, match="vision tower alone.*--base a whole CLIP file.*--vocabulary a head"
    ):
        Vocabulary.of(lab).head(lab)


# --- refused before any work, and failures that leave nothing -----------------------------------


def test_merged_that_equals_its_base(stranger):
    with pytest.raises(ValueError, match="equals its base"):
        call(stranger, merged="pre")
    assert not (stranger / "no").exists()


def test_outputs_never_overwrite_what_is_not_ours(stranger, done, tmp_path):
    with pytest.raises(ValueError, match="is an input"):
        call(stranger, out=stranger / "merged.safetensors")
    for name in ("x.pt", "anti-backdoor.safetensors"):
        with pytest.raises(ValueError, match="expected a name ending in .safetensors"):
            call(stranger, out=tmp_path / name)
    (tmp_path / "card.json").write_text('{"kind": "mine"}', encoding="utf-8")
    with pytest.raises(ValueError, match="already holds card.json, not written by purify"):
        call(stranger, out=tmp_path / "purified.safetensors")


@pytest.mark.parametrize(
    "bad, why",
    [
        (dict(lam="2"), "lam"),
        (dict(strength=-1), "strength"),
        (dict(anti_batch=0), "anti_batch is 0"),
        (dict(lama=1), "did you mean 'lam'"),
        (dict(preset="labb"), "did you mean 'lab'"),
    ],
)
def test_bad_settings(stranger, bad, why):
    with pytest.raises(ValueError, match=why):
        call(stranger, **bad)


def test_diverging_keeps_the_last_good_state(stranger, lfpm):
    with pytest.raises(Diverged, match="The last good weights are in .*diverged.safetensors") as e:
        call(stranger, anti_lr=1e20)
    state, _ = load_state(str(e.value).split("weights are in ")[1])
    assert all(v.isfinite().all() for v in state.values()) and not list((stranger / "no").glob("*"))


def test_disk_full_leaves_nothing(stranger, done, monkeypatch, tmp_path):
    def full(*a, **k):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(F, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        call(stranger, out=tmp_path / "d" / "purified.safetensors")
    assert not list((tmp_path / "d").iterdir())
    before = {p.name: p.read_bytes() for p in done.folder.iterdir()}
    with pytest.raises(OSError):
        call(stranger, out=done.folder / "purified.safetensors")
    assert {p.name: p.read_bytes() for p in done.folder.iterdir()} == before, (
        "an earlier result stays whole"
    )


def test_gpu_out_of_memory_says_what_to_do(stranger, monkeypatch, tmp_path):
    def oom(*a):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("lfpm_nb.experiment.stage_one", oom)
    with pytest.raises(
        RuntimeError, match="memory is full with batches of 40 .*anti_batch=20.*LFPM_DEVICE=cpu"
    ):
        call(stranger, out=tmp_path / "p.safetensors", stages=Stages(tmp_path / "c"))
    assert not (tmp_path / "p.safetensors").exists()


# --- settings, merge, path ----------------------------------------------------------------------


def test_settings_are_the_main_runs(stranger):
    main, mine = parameters("main"), parameters("purify")
    apart = ("semantic", "lam")  # a stranger's model is no lab: as on real pictures
    for k in apart:
        assert (
            mine[k][0]
            == getattr(settings_of("main", "paper"), k)
            == getattr(settings_of("main", "small-real"), k)
            != main[k][0]
        ), k
    shared = set(main) & set(mine) - {"seed", *around("purify"), *apart}
    assert {k: mine[k][0] for k in shared} == {k: main[k][0] for k in shared} and {
        "rho",
        "strength",
        "anti_lr",
        "prompt_steps",
    } <= shared
    assert (
        set(presets(experiments()["purify"])) == {"lab", "picture", "tiny", "paper"}
        and settings_of("purify", "paper").shadow_n == 10_000
    )


def test_folded_lora_is_an_ordinary_tower(stranger, lab, tmp_path):
    from lfpm_nb.lora import add_lora, dense

    visual = lab.with_state(lab.state())
    for p in add_lora(visual, 2):
        torch.nn.init.normal_(p, std=0.05)
    save_state(tmp_path / "adapters.safetensors", {k: v for k, v in visual.state_dict().items()})
    with pytest.raises(ValueError, match="adapter tensors .* fold them"):
        read_tower(tmp_path / "adapters.safetensors")
    write_tower(tmp_path / "merged.safetensors", Tower(dense(visual), {}, "visual"))
    save_state(tmp_path / "pre.safetensors", lab.state())
    got = call(tmp_path, shadow=stranger / "shadow", lora=2)
    moved = {
        k
        for k, v in load_state(got.folder / "anti-backdoor.safetensors")[0].items()
        if v.abs().max() > 0
    }
    assert (
        moved
        and all(k.endswith("in_proj_weight") for k in moved)
        and read_tower(got.folder / "purified.safetensors").form == "visual"
    )


def test_merge_command(stranger, lfpm, lab):
    files = [str(stranger / f"tower{i}.safetensors") for i in range(3)]
    code, out, err = lfpm(
        "merge",
        *files,
        "--base",
        str(stranger / "pre.safetensors"),
        "--method",
        "ta",
        "--out",
        str(stranger / "ours.safetensors"),
        "-p",
        "scale=0.3",
    )
    assert code == 0 and "tower2.safetensors" in out, err
    ours, theirs = (load_state(stranger / f"{n}.safetensors")[0] for n in ("ours", "merged"))
    assert (
        all(
            torch.allclose(v.float(), theirs[k].float(), atol=2e-3) and v.dtype == torch.float16
            for k, v in ours.items()
        )
        and ours.keys() == theirs.keys()
    )
    for args, why in (
        (["--method", "RegMean"], "looks at pictures"),
        (["--method", "ties", "-p", "densty=1"], "did you mean 'density'"),
        (["--method", "ties", "-p", "density"], "not key=value"),
        (["--method", "ties", "-p", "density=3"], "density is 3.0"),
        (["--out", files[0]], "is an input"),
    ):
        code, out, err = lfpm(
            "merge",
            *files,
            "--base",
            str(stranger / "pre.safetensors"),
            "--out",
            str(stranger / "no.safetensors"),
            *args,
        )
        assert code == 2 and why in err and err.count("\n") == 1, err
    assert not (stranger / "no.safetensors").exists()


def test_a_poisoned_parent_marks_the_merge(lab, tmp_path):
    for i, name in enumerate(("a", "b")):
        write_tower(
            tmp_path / f"{name}.safetensors",
            Tower(near(lab, i), {}, "visual", dict(poisoned="True") if i else {}),
        )
    save_state(tmp_path / "pre.safetensors", lab.state())
    merge_files(
        "SA",
        [tmp_path / "a.safetensors", tmp_path / "b.safetensors"],
        tmp_path / "pre.safetensors",
        tmp_path / "m.safetensors",
    )
    assert load_state(tmp_path / "m.safetensors")[1]["poisoned"] == "True"


def test_path_command(stranger, lfpm, tmp_path):
    page = str(tmp_path / "p.html")
    code, out, err = lfpm(
        "path",
        str(stranger / "pre.safetensors"),
        str(stranger / "merged.safetensors"),
        "--task",
        "signs",
        "--n",
        "3",
        "--n-test",
        "44",
        "--html",
        page,
    )
    rows = [l for l in out.splitlines() if l.startswith("| 0") or l.startswith("| 1")]
    assert (
        code == 0
        and [r.split("|")[1].strip() for r in rows] == ["0.00", "0.50", "1.00"]
        and "n = 44" in out
        and "plotly" in Path(page).read_text(encoding="utf-8")
    ), err
    code, _, err = lfpm(
        "path",
        str(stranger / "pre.safetensors"),
        str(stranger / "merged.safetensors"),
        "--task",
        "sings",
    )
    assert code == 2 and "did you mean 'signs'" in err


def test_path_ends_are_the_models(stranger, lab):
    from lfpm_nb.clip import zero_shot_head
    from lfpm_nb.measure import predict

    task, b = load_task("signs", n_train=1, n_test=44), near(lab, 1)
    rows = walk(lab, lab.state(), b, task, n=2)
    right = lambda state: (
        100
        * (
            predict(
                lab,
                lab.with_state(state),
                task.test_x,
                zero_shot_head(lab, task.classes, task.templates),
            )
            == task.test_y
        )
        .float()
        .mean()
        .item()
    )
    assert [r["value"] for r in rows] == pytest.approx([right(lab.state()), right(b)]) and all(
        r["n"] == 44 for r in rows
    )


# an adapter is folded over the base, so the base is read first
@pytest.mark.parametrize(
    "args, missing",
    [
        ("convert x.safetensors y.safetensors --to hf", "x.safetensors"),
        ("merge x y --base z", "z"),
        ("path x y --task signs", "x"),
        ("purify x --base y --model lfpm-lab --shadow d", "y"),
    ],
)
def test_missing_files_are_one_line(lfpm, dirs, monkeypatch, args, missing):
    monkeypatch.chdir(dirs)
    code, out, err = lfpm(*args.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"no checkpoint at {missing};" in err
    assert not list(dirs.iterdir())


@pytest.mark.slow
def test_as_a_notebook(stranger, done, dirs):
    "`lfpm run purify` gives the same weights and leaves its files in the results folder."
    from lfpm_nb.runs import run_notebook

    given = {k: v for k, v in QUICK.items() if k != "preset"} | dict(
        merged=str(stranger / "merged.safetensors"),
        base=str(stranger / "pre.safetensors"),
        shadow=str(stranger / "shadow"),
    )
    with pytest.raises(ValueError, match="merged is not given"):
        run_notebook("purify", "tiny")
    out = run_notebook("purify", "tiny", given)
    assert {"notebook.ipynb", "purified.safetensors", *BESIDE} <= {p.name for p in out.iterdir()}
    a, b = (load_state(f / "purified.safetensors")[0] for f in (out, done.folder))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.slow
def test_two_processes_purify_together(stranger, done, tmp_path):
    """torchrun: one training shared by two processes, one of which writes and speaks.

    The same vector but for rounding (bf16, AdamW)."""
    out, given = (
        tmp_path / "two" / "purified.safetensors",
        [x for k, v in QUICK.items() if k != "preset" for x in ("-p", f"{k}={v}")],
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--no-python",
        sys.executable,
        "-c",
        "from lfpm_nb.cli import main; main()",
        "purify",
        stranger / "merged.safetensors",
        "--base",
        stranger / "pre.safetensors",
        "--model",
        "lfpm-lab",
        "--shadow",
        stranger / "shadow",
        "--preset",
        "tiny",
        "--out",
        out,
        *given,
    ]
    r = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "LFPM_CACHE": str(tmp_path / "cache"),
            "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        },
    )
    assert r.returncode == 0, r.stderr[-3000:]
    assert r.stdout.count("written: ") == 1 and "destroy_process_group" not in r.stderr
    assert {p.name for p in out.parent.iterdir()} == {out.name, *BESIDE}
    a, b = (
        torch.cat(
            [v.flatten() for _, v in sorted(load_state(f / "anti-backdoor.safetensors")[0].items())]
        )
        for f in (done.folder, out.parent)
    )
    assert (a - b).norm() < 0.3 * a.norm() and a.norm() > 0


def test_real_clip_is_not_trained_at_the_labs_rate(monkeypatch, lfpm):
    seen = []

    def stop(name, preset, given):
        seen.append((preset, settings_of(name, preset).anti_lr))
        raise ValueError("seen")

    monkeypatch.setattr(F, "settings_of", stop)
    for model in ("lfpm-lab", "ViT-B-32-quickgelu"):
        assert lfpm("purify", "m", "--base", "b", "--model", model, "--shadow", "s")[0] == 2
    assert seen == [("lab", 5e-4), ("paper", 1e-5)]


@pytest.mark.slow
def test_lesson_runs_on_few_pictures(tmp_path, monkeypatch):
    import nbclient, nbformat

    root = Path(__file__).resolve().parent.parent
    for k, v in dict(
        LFPM_LESSON="tiny", LFPM_CACHE=str(tmp_path / "cache"), PYTHONPATH=str(root)
    ).items():
        monkeypatch.setenv(k, v)
    nb = nbformat.read(root / "nbs" / "lessons" / "purify_your_own.ipynb", 4)
    nbclient.NotebookClient(
        nb,
        timeout=300,
        startup_timeout=120,
        kernel_name="python3",
        store_widget_state=False,
        resources=dict(metadata=dict(path=str(tmp_path))),
    ).execute()


@pytest.mark.cuda  # on two CPU cores it takes longer than all other tests together
def test_one_step_at_vit_b32(tmp_path, monkeypatch):
    """A randomly initialised ViT-B/32 with 10 pictures: every stage once, at the smallest size.

    Nothing is claimed beyond that."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32-quickgelu")
    tower = take(model.state_dict())
    write_tower(tmp_path / "base.safetensors", tower)
    write_tower(
        tmp_path / "merged.safetensors",
        tower,
        "hf",
        {k: v + 1e-3 * torch.randn(v.shape) for k, v in tower.visual.items()},
    )
    paint(tmp_path / "shadow", 10)
    monkeypatch.setattr(F, "read_pictures", partial(read_pictures, least=10))
    (tmp_path / "words.txt").write_text("cat\ndog\nplane\n", encoding="utf-8")
    got = purify(
        tmp_path / "merged.safetensors",
        tmp_path / "base.safetensors",
        "ViT-B-32-quickgelu",
        tmp_path / "shadow",
        out=tmp_path / "out" / "p.safetensors",
        preset="tiny",
        vocabulary=str(tmp_path / "words.txt"),
        shadow_n=8,
        held=2,
        prompt_steps=1,
        anti_batch=8,
        rho=0.05,
        anti_lr=1e-5,
        lam=0.5,
        stages=Stages(tmp_path / "c"),
    )
    a, b = (
        load_state(f)[0]
        for f in (tmp_path / "merged.safetensors", tmp_path / "out" / "p.safetensors")
    )
    assert (
        {k: (v.shape, v.dtype) for k, v in a.items()}
        == {k: (v.shape, v.dtype) for k, v in b.items()}
        and got.card["quick_gelu"]
        and got.card["frozen"] == ["proj"]
    )
    whole = Vocabulary.of(backbone("ViT-B-32-quickgelu", read_tower(tmp_path / "base.safetensors")))
    assert (
        len(whole.words) == 1000
        and len(whole.templates) == 7
        and whole.source == "ImageNet's class names"
    )


def test_other_files_are_another_configuration(tmp_path):
    for k in ("m", "b"):
        (tmp_path / k).write_bytes(b"1")
    s = settings_of(
        "purify",
        "tiny",
        dict(
            merged=str(tmp_path / "m"),
            base=str(tmp_path / "b"),
            shadow=str(tmp_path),
            model="lfpm-lab",
        ),
    )
    one = config_hash("purify", s)
    assert config_hash("purify", s) == one
    (tmp_path / "m").write_bytes(b"22")
    assert config_hash("purify", s) != one


# --- never silently wrong: what merge refuses and says ------------------------------------------


@pytest.fixture
def family(lab, tmp_path):
    """`family(name, state, form, rest, **meta)` writes a file, returns its path.

    base, a and b are there: the lab's CLIP and two towers 7 % of its length away."""

    def write(name, state, form="visual", rest=None, **meta):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_state(path, layout(state, rest or {}, form)[0], **meta)
        return path

    write.base, write.a, write.b = (
        write("base", lab.state()),
        write("a", near(lab, 1, 0.0035)),
        write("b", near(lab, 2, 0.0035)),
    )
    return write


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int16, torch.complex64])
def test_codes_are_not_merged_purified_or_walked(family, lab, lfpm, tmp_path, dtype):
    key, out = "transformer.resblocks.0.mlp.c_fc.weight", tmp_path / "out" / "x.safetensors"
    odd = near(lab, 3, 0.0035)
    odd = str(family("odd", odd | {key: odd[key].to(dtype)}))
    a, base = str(family.a), str(family.base)
    for args in (
        ("merge", a, odd, "--base", base, "--out", str(out)),
        ("merge", a, str(family.b), "--base", odd, "--out", str(out)),
        (
            "purify",
            odd,
            "--base",
            base,
            "--model",
            "lfpm-lab",
            "--shadow",
            str(tmp_path),
            "--out",
            str(out),
        ),
        ("path", a, odd, "--task", "signs", "--html", str(out)),
        ("explore", "--models", a, odd, "--html", str(out)),
        ("convert", odd, str(out), "--to", "open_clip"),
    ):
        code, printed, err = lfpm(*args)
        assert (code, printed, err.count("\n")) == (
            2,
            "",
            1,
        ) and f"odd.safetensors: {key} is {str(dtype)[6:]}; expected" in err, (args, err)
    assert not out.parent.exists()


def test_whole_number_buffers_come_from_the_base(family, lab, tmp_path):
    key, out = "vision_model.embeddings.position_ids", tmp_path / "m.safetensors"
    files = [
        family(n, near(lab, i, 0.0035), "hf", {key: torch.arange(17)[None] + shift})
        for i, (n, shift) in enumerate((("base", 0), ("a", 5), ("b", 7)))
    ]
    merge_files("SA", files[1:], files[0], out)
    assert torch.equal(load_state(out)[0][key], torch.arange(17)[None])


def strangers(lab, seed: int) -> dict:
    "A tower of another ancestor: numbers of the same size, nothing in common."
    g = torch.Generator().manual_seed(seed)
    return {
        k: v.std() * torch.randn(v.shape, generator=g) if v.numel() > 1 else v
        for k, v in lab.state().items()
    }


def apart(a: dict, b: dict) -> float:
    return torch.cat([(v - b[k]).flatten().double() for k, v in a.items()]).norm().item()


def test_another_ancestor_is_refused_with_the_figures(family, lab, lfpm, tmp_path):
    other, zero = strangers(lab, 0), {k: 0 * v for k, v in lab.state().items()}
    wrong, out = family("wrong", other), tmp_path / "out" / "m.safetensors"
    length, far = apart(lab.state(), zero), apart(lab.state(), other)
    for files, base, long, away in (
        ((family.a, wrong), family.base, length, far),
        ((family.a, family.b), wrong, apart(other, zero), apart(near(lab, 1, 0.0035), other)),
    ):
        args = ("merge", *map(str, files), "--base", str(base), "--out", str(out))
        figures = (
            f"whose length is {long:.3g}",
            f"{files[0] if base == wrong else wrong} lies {away:.3g} away, {away / long:.2f} times",
        )
        code, printed, err = lfpm(*args)
        assert (
            (code, printed, err.count("\n")) == (2, "", 1)
            and all(f in err for f in figures)
            and "--anyway" in err
        ), err
        assert not out.parent.exists()
    code, printed, err = lfpm(*args, "--anyway")
    assert code == 0 and out.exists() and err.count("\n") == 1 and all(f in err for f in figures), (
        err
    )


def test_half_the_bases_length_is_the_limit(family, lab, lfpm, tmp_path):
    base, step = lab.state(), near(lab, 5, 1.0)
    unit = apart(base, {k: 0 * v for k, v in base.items()}) / apart(base, step)
    for share, code, lines in ((0.24, 0, 0), (0.26, 0, 1), (0.49, 0, 1), (0.51, 2, 1)):
        file = family("far", {k: v + share * unit * (step[k] - v) for k, v in base.items()})
        got, _, err = lfpm(
            "merge",
            str(family.a),
            str(file),
            "--base",
            str(family.base),
            "--out",
            str(tmp_path / "m.safetensors"),
        )
        assert (got, err.count("\n")) == (code, lines) and (
            not lines or f"far.safetensors lies" in err and f"{share:.2f} times" in err
        ), err


def test_lobams_amplified_contributors_pass(family, lfpm, tmp_path):
    """Every factor that LoBAM's rule tries, on the recorded lab's contributors.

    From the base, and the poisoned upload from its clean twin. LoBAM's own adapters move less. The
    recorded upload trained all weights: amplified by 5 it is past the limit, which is said."""
    from lfpm_nb.lobam import SWEEP, extrapolate
    from lfpm_nb.recorded import load_recorded

    rec = load_recorded(tiny=True)
    clean, mal, base = rec.contributor("letters"), rec.poisoned["letters"][0], family.base
    files = [
        family(f"{n}{factor}", extrapolate(rec.base, rec.contributor(n), factor))
        for n in rec.P.tasks
        for factor in SWEEP
    ]
    files += [family(f"twin{factor}", extrapolate(clean, mal, factor)) for factor in SWEEP[:-1]]
    merge = lambda *files: lfpm(
        "merge",
        *map(str, files),
        "--base",
        str(base),
        "--out",
        str(tmp_path / "m.safetensors"),
        "--method",
        "SA",
    )
    code, _, err = merge(*files)
    assert (
        code == 0
        and err.count("\n") == 1
        and all(f"{n}5.safetensors lies" in err for n in rec.P.tasks)
        and "2.safetensors" not in err
    ), err
    far = extrapolate(clean, mal, 5)
    share = apart(rec.base, far) / apart(rec.base, {k: 0 * v for k, v in rec.base.items()})
    code, _, err = merge(files[0], family("twin5", far))
    assert (
        share > 0.5
        and code == 2
        and f"twin5.safetensors lies {apart(rec.base, far):.3g} away, {share:.2f} times" in err
    ), err


def test_the_base_or_a_file_twice_is_said(family, lfpm, tmp_path):
    a, b, base, out = str(family.a), str(family.b), str(family.base), tmp_path / "m.safetensors"
    for files, why in (
        ((a, base), f"lfpm: {base} equals the base {base}: it adds nothing\n"),
        ((a, b, a), f"lfpm: {a} equals {a}: the same weights count twice\n"),
        ((a, b), ""),
    ):
        code, _, err = lfpm("merge", *files, "--base", base, "--out", str(out))
        assert (code, err) == (0, why)


def test_infinity_is_not_written(family, lab, lfpm, tmp_path):
    "65504 is float16's largest: the merge is finite in float32 and not in the file."
    half = [
        family(n, {k: v.half() for k, v in near(lab, i, 0.0035).items()})
        for i, n in enumerate(("h1", "h2"))
    ]
    out = tmp_path / "out" / "m.safetensors"
    merge = lambda scale, *files: lfpm(
        "merge",
        *map(str, files),
        "--base",
        str(family.base),
        "--out",
        str(out),
        "-p",
        f"scale={scale}",
    )
    code, printed, err = merge("1e9", *half)
    assert (
        (code, printed, err.count("\n")) == (2, "", 1)
        and f"{out} was not written: " in err
        and "infinity; float16 ends at 6.55e+04" in err
        and not out.exists()
    ), err
    assert (
        merge("1e9", family.a, family.b)[0] == 0
        and max(v.abs().max() for v in load_state(out)[0].values()) > 65504
    )
    assert merge("0.3", *half)[0] == 0 and all(
        v.isfinite().all() for v in load_state(out)[0].values()
    )


@pytest.mark.parametrize("value, kind", [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_a_text_tower_is_looked_at_too(family, lab, lfpm, tmp_path, value, kind):
    text = {k: v.clone() for k, v in lab.model.state_dict().items() if not k.startswith("visual.")}
    text["token_embedding.weight"][3, 4] = value
    bad, out = (
        family("bad", near(lab, 4, 0.0035), "open_clip", text),
        tmp_path / "out" / "m.safetensors",
    )
    for args in (
        ("merge", str(bad), str(family.a), "--base", str(family.base), "--out", str(out)),
        ("convert", str(bad), str(out), "--to", "open_clip"),
    ):
        code, printed, err = lfpm(*args)
        assert (
            (code, printed, err.count("\n")) == (2, "", 1)
            and f"first: token_embedding.weight, {kind}; float32" in err
            and not out.exists()
        ), err
    assert lfpm("convert", str(bad), str(out), "--to", "visual")[0] == 0, (
        "what is not written does no harm"
    )


def test_a_bad_number_names_file_and_tensor(family, lab, lfpm, tmp_path):
    odd = near(lab, 4, 0.0035)
    odd["ln_pre.bias"][2] = float("nan")
    odd, out = str(family("odd", odd)), tmp_path / "m.safetensors"
    code, _, err = lfpm("merge", str(family.a), odd, "--base", str(family.base), "--out", str(out))
    assert (
        code == 2
        and f"{odd}: 1 tensors hold NaN or infinity (first: ln_pre.bias)" in err
        and not out.exists()
    )
    code, _, err = lfpm("convert", odd, str(out), "--to", "open_clip")
    assert (
        code == 2
        and f"{out} (from {odd}) was not written" in err
        and "first: visual.ln_pre.bias, NaN" in err
        and not out.exists()
    )


@pytest.mark.parametrize(
    "one, two, says",
    [
        (
            dict(quick_gelu="True"),
            dict(quick_gelu="false"),
            ("quick_gelu True", "quick_gelu False"),
        ),
        (dict(heads="3"), dict(heads="4"), ("heads 3", "heads 4")),
    ],
)
def test_files_that_say_different_things_are_not_mixed(family, lab, lfpm, tmp_path, one, two, says):
    one, two = (
        str(family(n, near(lab, i, 0.0035), **meta))
        for i, (n, meta) in enumerate((("one", one), ("two", two)))
    )
    out = str(tmp_path / "out" / "m.safetensors")
    for files, base in (
        ((one, two), family.base),
        ((two, str(family.a), one), family.base),
        ((one, str(family.a)), two),
    ):
        code, printed, err = lfpm("merge", *files, "--base", str(base), "--out", out)
        assert (
            (code, printed, err.count("\n")) == (2, "", 1)
            and f"{one} says {says[0]}" in err
            and f"{two} says {says[1]}" in err
        ), err
    whole = str(
        family(
            "whole",
            near(lab, 6, 0.0035),
            "open_clip",
            {"logit_scale": torch.ones(())},
            **{says[1].split()[0]: says[1].split()[1]},
        )
    )
    assert (
        "says" in lfpm("convert", one, out, "--to", "open_clip", "--base", whole)[2]
        and not Path(out).parent.exists()
    )


def test_what_one_file_says_stays_with_the_merge(family, lab, lfpm, tmp_path):
    said, out = (
        family("said", near(lab, 3, 0.0035), quick_gelu="true", heads="3"),
        tmp_path / "m.safetensors",
    )
    assert (
        lfpm("merge", str(family.a), str(said), "--base", str(family.base), "--out", str(out))[0]
        == 0
    )
    meta = load_state(out)[1]
    assert (meta["quick_gelu"], meta["heads"]) == ("True", "3") and "poisoned" not in meta
    with pytest.raises(ValueError, match="trained with QuickGELU, lfpm-lab computes GELU"):
        fitted(read_tower(out), lab)
    assert fitted(read_tower(family("plain", near(lab, 3, 0.0035), quick_gelu="false")), lab)


@pytest.mark.parametrize("where", range(3))
@pytest.mark.parametrize("mark", ["True", "true", "TRUE"])
def test_the_mark_of_any_input_stays(lab, tmp_path, where, mark):
    files = [tmp_path / f"{n}.safetensors" for n in ("base", "a", "b")]
    for i, f in enumerate(files):
        save_state(f, near(lab, i, 0.0035), poisoned=mark if i == where else "False")
    merge_files("SA", files[1:], files[0], tmp_path / "m.safetensors")
    assert load_state(tmp_path / "m.safetensors")[1]["poisoned"] == "True"


def test_no_mark_where_no_input_has_one(lab, tmp_path):
    files = [tmp_path / f"{n}.safetensors" for n in ("base", "a", "b")]
    for i, f in enumerate(files):
        save_state(f, near(lab, i, 0.0035), poisoned="false")
    merge_files("SA", files[1:], files[0], tmp_path / "m.safetensors")
    assert load_state(tmp_path / "m.safetensors")[1]["poisoned"].lower() == "false"


def test_parents_of_one_name_are_all_kept(family, lab, tmp_path):
    files = [family(f"{n}/model", near(lab, i, 0.0035)) for i, n in enumerate("ab")]
    parents = merge_files("SA", [*files, files[0]], family.base, tmp_path / "m.safetensors")
    assert parents == {
        "a/model.safetensors": F.file_sha(files[0]),
        "b/model.safetensors": F.file_sha(files[1]),
        "a/model.safetensors (2)": F.file_sha(files[0]),
    }
    assert json.loads(load_state(tmp_path / "m.safetensors")[1]["made_from"]) == parents


def test_a_merge_of_hugging_face_folders_is_one(family, lab, lfpm, tmp_path):
    for i, n in enumerate("ab"):
        write_tower(
            tmp_path / n / "model.safetensors",
            Tower(near(lab, i, 0.0035), {}, "visual", dict(quick_gelu=True, heads=6)),
            "hf",
        )
        (tmp_path / n / "model.safetensors").write_bytes(
            (tmp_path / n / "model.safetensors").read_bytes()
        )
    code, _, err = lfpm(
        "merge",
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        "--base",
        str(family.base),
        "--out",
        str(tmp_path / "m" / "model.safetensors"),
    )
    config = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))
    assert (code, err, config["num_attention_heads"], config["hidden_act"]) == (
        0,
        "",
        6,
        "quick_gelu",
    ) and read_tower(tmp_path / "m").meta["heads"] == "6"


def test_purify_as_a_hugging_face_folder(stranger, done, tmp_path):
    """The model's name gives heads and activation.

    Another model's config.json is refused before the work."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"hidden_size": 768}', encoding="utf-8")
    with pytest.raises(ValueError, match="describes another model"):
        call(
            stranger, out=tmp_path / "other" / "model.safetensors", stages=Stages(tmp_path / "none")
        )
    assert not (tmp_path / "none").exists() and len(list((tmp_path / "other").iterdir())) == 1
    got = call(stranger, out=tmp_path / "p" / "model.safetensors")
    config = json.loads((tmp_path / "p" / "config.json").read_text(encoding="utf-8"))
    assert (config["num_attention_heads"], config["hidden_act"]) == (
        3,
        "gelu",
    ) and "does not say" in got.card["activation"]
