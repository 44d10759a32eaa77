"""Hashes, seeds, files, registries, progress and cached stages."""

import json
import os
import subprocess
import platform
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

from lfpm_nb import core
from lfpm_nb.core import (
    Diverged,
    Peak,
    Progress,
    Registry,
    Stages,
    check_same,
    choose,
    code_hash,
    content_hash,
    damage,
    load_state,
    save_state,
    stable_seed,
    write_json,
    writing,
)

STATE = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1, 2]),
    "c": torch.zeros(3, dtype=torch.float16),
}

# --- content hash -------------------------------------------------------------------------------

leaf = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5)
)
nested = st.recursive(
    leaf,
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=3), x, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=4) | st.integers(0, 9), nested, max_size=6), st.randoms())
def test_hash_ignores_the_order_of_keys(d, rng):
    keys = list(d)
    rng.shuffle(keys)
    assert content_hash(d) == content_hash({k: d[k] for k in keys})


def test_hash_ignores_the_order_of_keys_that_print_alike():
    assert (
        content_hash({1: "x", "1": "y"})
        == content_hash({"1": "y", 1: "x"})
        != content_hash({"1": "x", 1: "y"})
    )


@given(st.lists(nested, min_size=1, max_size=5), st.data())
def test_hash_sees_every_change(things, data):
    i = data.draw(st.integers(0, len(things) - 1))
    other = data.draw(nested.filter(lambda v: repr(v) != repr(things[i])))
    changed = [*things[:i], other, *things[i + 1 :]]
    assert content_hash(things) != content_hash(changed)
    assert content_hash({"k": things}) != content_hash({"k": changed}) and content_hash(
        things
    ) != content_hash(*things, "x")


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=6), st.integers(0, 5))
def test_hash_sees_every_element_shape_and_kind_of_a_tensor(values, i):
    t = torch.tensor(values)
    u = t.clone()
    u[i % len(values)] += 1
    assert content_hash(t) == content_hash(t.clone()) != content_hash(u)
    assert (
        len({content_hash(x) for x in (t, t[None], t[:, None], t.double(), t.half(), t.tolist())})
        == 6
    )


def test_hash_takes_views_empty_tensors_and_all_kinds():
    m = torch.arange(6.0).reshape(2, 3)
    assert content_hash(m.t()) == content_hash(m.t().contiguous()) != content_hash(m)
    kinds = [
        torch.zeros(2, dtype=d) for d in (torch.bool, torch.uint8, torch.bfloat16, torch.int64)
    ] + [torch.zeros(0), torch.zeros(())]
    assert len({content_hash(k) for k in kinds}) == len(kinds)


def test_hash_of_dataclasses_and_refusal_of_the_rest():
    @dataclass
    class A:
        x: int

    @dataclass
    class B:
        x: int

    assert (
        content_hash(A(1)) == content_hash(A(1))
        and len({content_hash(v) for v in (A(1), A(2), B(1))}) == 3
    )
    with pytest.raises(TypeError, match="cannot hash a function"):
        content_hash(lambda: 0)
    assert len(content_hash(1, n=20)) == 20


def test_the_same_in_another_process():
    code = (
        "import torch; from pathlib import Path; "
        "from lfpm_nb.core import code_hash, content_hash, generator, stable_seed; "
        "print(stable_seed('a', 1, None), "
        "content_hash({'x': [1, torch.ones(2)], 'y': Path('p')}), code_hash('path'), "
        "torch.rand(2, generator=generator('z')).tolist())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "77"},
        check=True,
    ).stdout
    here = (
        stable_seed("a", 1, None),
        content_hash({"y": Path("p"), "x": [1, torch.ones(2)]}),
        code_hash("path"),
        torch.rand(2, generator=core.generator("z")).tolist(),
    )
    assert out.split(None, 3)[:3] == [str(v) for v in here[:3]] and out.split(None, 3)[
        3
    ].strip() == str(here[3])


@given(
    st.lists(st.text(max_size=4) | st.integers(), min_size=1, max_size=3),
    st.lists(st.text(max_size=4) | st.integers(), min_size=1, max_size=3),
)
def test_seeds_differ_whenever_names_differ(a, b):
    assert 0 <= stable_seed(*a) < 2**63 and (stable_seed(*a) == stable_seed(*b)) == (a == b)


@pytest.mark.parametrize(
    "spelling", ["from lfpm_nb.{} import x", "from .{} import x", "from .{} import (x,\n    y)"]
)
def test_code_hash_follows_imports(tmp_path, monkeypatch, spelling):
    for m, of in dict(leaf="", mid="leaf", top="mid", apart="").items():
        (tmp_path / f"{m}.py").write_text(
            (spelling.format(of) if of else "x = 1") + "\n", encoding="utf-8"
        )
    monkeypatch.setattr(core, "__file__", str(tmp_path / "core.py"))
    before = {m: code_hash(m) for m in ("top", "mid", "apart")}
    (tmp_path / "leaf.py").write_text("x = 2\n", encoding="utf-8")
    assert (
        code_hash("top") != before["top"]
        and code_hash("mid") != before["mid"]
        and code_hash("apart") == before["apart"]
    )


def test_code_hash_does_not_see_comments_and_docstrings(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text(
        '"About."\ndef f(x):\n    "Says."\n    return x\n', encoding="utf-8"
    )
    monkeypatch.setattr(core, "__file__", str(tmp_path / "core.py"))
    before = code_hash("one")
    (tmp_path / "one.py").write_text(
        '"Other."\n# why\ndef f(x): return x   # so\n', encoding="utf-8"
    )
    assert code_hash("one") == before
    (tmp_path / "one.py").write_text("def f(x): return -x\n", encoding="utf-8")
    assert code_hash("one") != before


def test_several_processes_that_want_one_stage_compute_it_once(tmp_path):
    "Threads with a Stages of their own: the lock is on the file, so for processes too."
    calls, results = [], []

    def compute():
        calls.append(1)
        time.sleep(0.3)
        return {"w": torch.ones(2)}, {}

    def want():
        results.append(Stages(tmp_path)("s", ("k",), compute))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    assert (
        len(calls) == 1
        and len(results) == 4
        and all(torch.equal(r[0]["w"], torch.ones(2)) for r in results)
    )


def test_code_hash_of_every_module_sees_a_change_in_core(tmp_path, monkeypatch):
    package = Path(core.__file__).parent
    modules = [
        p.stem
        for p in package.glob("*.py")
        if p.stem[0] != "_" and (p.stem == "core" or "\nfrom ." in p.read_text(encoding="utf-8"))
    ]  # `checks` stands alone
    before = {m: code_hash(m) for m in modules}
    for p in package.glob("*.py"):
        (tmp_path / p.name).write_text(
            p.read_text(encoding="utf-8") + "changed = 1\n" * (p.stem == "core"), encoding="utf-8"
        )
    monkeypatch.setattr(core, "__file__", str(tmp_path / "core.py"))
    assert len(modules) > 10 and [m for m in modules if code_hash(m) == before[m]] == []


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "sub" / "f.txt"
    with pytest.raises(error):
        with writing(path) as tmp:
            tmp.write_text("half", encoding="utf-8")
            raise error
    assert list(path.parent.iterdir()) == []
    write_json(path, {"a": 1})
    with pytest.raises(error):
        with writing(path) as tmp:
            tmp.write_text("half", encoding="utf-8")
            raise error
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": 1} and [
        p.name for p in path.parent.iterdir()
    ] == ["f.txt"]


def test_state_round_trip(tmp_path):
    save_state(tmp_path / "m.safetensors", {**STATE, "a": STATE["a"].t()}, poisoned=True, seed=3)
    back, meta = load_state(tmp_path / "m.safetensors")
    assert meta == {"poisoned": "True", "seed": "3"} and torch.equal(back["a"], STATE["a"].t())
    assert {k: v.dtype for k, v in back.items()} == {k: v.dtype for k, v in STATE.items()}


def test_load_refuses_a_missing_file(tmp_path):
    for p in (tmp_path / "no.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint at {p}; give the path"):
            load_state(p)


def test_load_refuses_damaged_files(tmp_path):
    path = tmp_path / "m.safetensors"
    save_state(path, STATE)
    whole = path.read_bytes()
    for broken in (b"", b"junk", whole[:40], whole[:-4], b"\xff" * 8 + whole[8:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
            load_state(path)


def test_a_disk_that_is_full_is_an_os_error(tmp_path):
    "What safetensors raises for it is no OSError; the half-written file goes."
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="the weights could not be written to"):
            save_state(tmp_path / "m.safetensors", {"a": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


# --- checks before mixing -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("a"), "a only in the first"),
        (lambda s: s.update(z=torch.ones(1)), "z only in the second"),
        (lambda s: s.update(a=torch.ones(3, 2)), r"a: \(2, 3\) vs \(3, 2\)"),
        (lambda s: s.update(a=STATE["a"].long()), "a: torch.float32 vs torch.int64"),
        (
            lambda s: s.update(a=torch.full((2, 3), float("nan"))),
            r"1 tensors hold NaN or infinity \(first: a\)",
        ),
        (lambda s: s.update(c=torch.tensor([0, float("inf"), 0]).half()), r"\(first: c\)"),
    ],
)
def test_check_same_names_the_difference(change, message):
    other = {k: v.clone() for k, v in STATE.items()}
    check_same(STATE, other)
    change(other)
    with pytest.raises(ValueError, match=message) as e:
        check_same(STATE, other, "these two")
    assert "these two" in str(e.value)


def test_check_same_is_short_and_allows_other_float_kinds():
    with pytest.raises(ValueError, match="differ in 26 places") as e:
        check_same({c: torch.ones(1) for c in "abcdefghijklmnopqrstuvwxyz"}, {})
    assert len(str(e.value)) < 250 and all(f"{c} only in the first" in str(e.value) for c in "abc")
    check_same(STATE, {k: v.half() if v.is_floating_point() else v for k, v in STATE.items()})


# --- names --------------------------------------------------------------------------------------


@given(st.sampled_from(["letters", "signs", "textures", "handwritten"]), st.integers(0, 20))
def test_choose_suggests_the_word_with_one_letter_lost(word, i):
    i %= len(word)
    with pytest.raises(ValueError, match=f"did you mean '{word}'"):
        choose(word[:i] + word[i + 1 :], ["letters", "signs", "textures", "handwritten"], "task")


def test_choose_is_blind_to_case_and_lists_what_there_is():
    assert choose("SIGNS", ["signs"], "task") == "signs"
    with pytest.raises(ValueError, match="unknown task 'qqqq'; known: signs, land"):
        choose("qqqq", ["signs", "land"], "task")


def test_registry():
    reg = Registry("merge")

    @reg.register("TA", long="Task Arithmetic", needs=("pretrained",), source="there")
    def ta(x, scale=1.0, *, side=2):
        return x * scale + side

    assert reg("task ARITHMETIC", 3, scale=2) == reg("ta", 3, scale=2) == 8 and ta(1) == 3
    assert reg["TA"] == dict(f=ta, long="Task Arithmetic", needs=("pretrained",), source="there")
    assert reg.accepts("ta", dict(x=0, scale=5, lam=1)) == dict(scale=5)
    with pytest.raises(ValueError, match="unknown merge 'taa'; did you mean 'TA'"):
        reg("taa", 1)


def test_method_adds_methods_and_properties():
    class A:
        pass

    calls = []

    @core.method(A)
    def f(self, x):
        return x + 1

    @core.method(A, once=True)
    def g(self):
        calls.append(1)
        return 5

    a = A()
    assert a.f(1) == 2 and a.g == a.g == 5 and calls == [1] and f.__qualname__.endswith("A.f")


# --- progress -----------------------------------------------------------------------------------


def test_progress_says_what_how_far_and_note(capsys, monkeypatch):
    monkeypatch.delenv("LFPM_QUIET")
    monkeypatch.delenv("LFPM_LIVE", raising=False)
    bar = Progress(range(3), "count sheep")
    for i in bar:
        bar.note = f"loss {i}"
    err = capsys.readouterr().err
    assert (
        "count sheep: 3/3" in err and "loss 2" in err and err.count("\n") == 1
    )  # a log gets one line
    monkeypatch.setenv("LFPM_LIVE", "1")
    assert list(Progress(iter("ab"), "live", total=2, every=0)) == ["a", "b"]
    err = capsys.readouterr().err
    assert "live: 1/2" in err and "s left" in err and "\r" in err and err.endswith("\n")
    monkeypatch.setenv("LFPM_QUIET", "1")
    assert list(Progress([1], "quiet")) == [1] and capsys.readouterr().err == ""


# --- stages -------------------------------------------------------------------------------------


def computing(calls, x=1.0, record=None):
    def compute():
        calls.append(x)
        return {"x": torch.tensor([x])}, record or {"acc": (1, 2)}

    return compute


def test_a_stage_is_computed_once_per_key(tmp_path):
    calls, stages = [], Stages(tmp_path)
    first, again = (
        stages("s", ("k", 1), computing(calls)),
        stages("s", ("k", 1), computing(calls, 9.0)),
    )
    assert (
        calls == [1.0]
        and torch.equal(first[0]["x"], again[0]["x"])
        and first[1]
        == again[1]
        == {"acc": [1, 2], **{k: first[1][k] for k in ("seconds", "cpu_seconds", "peak_mb")}}
    )
    assert (
        stages("s", ("k", 2), computing(calls, 3.0))[0]["x"].item() == 3
        and stages("t", ("k", 1), computing(calls, 4.0))[0]["x"].item() == 4
    )
    assert Stages(tmp_path)("s", ("k", 1), computing(calls, 9.0))[0]["x"].item() == 1
    assert [(n, r) for n, _, r in stages.log] == [
        ("s", False),
        ("s", True),
        ("s", False),
        ("t", False),
    ]


def test_peak_counts_what_was_held_even_if_it_is_gone():
    with Peak() as peak:
        big = torch.ones(100 * 2**18)  # 100 MB
        del big
    with Peak() as small:
        torch.ones(8)
    assert sys.platform != "linux" or (peak.mb > 80 and small.mb < 20)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to give back")
def test_what_was_freed_before_does_not_hide_what_is_held_now():
    """Small pieces come from the heap.

    It keeps them for reuse when something later lies above them."""
    above, peaks = [], []
    for _ in range(3):
        with Peak() as peak:
            pieces = [torch.ones(2**12) for _ in range(4000)]  # 4,000 of 16 kB
            above.append(torch.ones(2**12))
            del pieces
        peaks.append(peak.mb)
    assert min(peaks) > 50, peaks


def test_a_diverged_stage_keeps_the_last_good_weights(tmp_path):
    def compute():
        raise Diverged("demo, step 3: the loss is nan", {"w": torch.ones(2)})

    with pytest.raises(Diverged, match="step 3.*last good weights are in") as e:
        Stages(tmp_path)("s", ("k",), compute, poisoned=True)
    (kept,) = (tmp_path / "s").iterdir()
    state, meta = load_state(kept)
    assert (
        str(kept) in str(e.value)
        and "poisoned" in kept.name
        and meta["poisoned"] == "True"
        and state["w"].tolist() == [1, 1]
    )
    assert (
        Stages(tmp_path)("s", ("k",), lambda: ({"w": torch.zeros(1)}, {}))[0]["w"].item() == 0
    )  # it is no result


def test_a_stage_depends_on_threads_device_and_precision(tmp_path, monkeypatch):
    calls, stages = [], Stages(tmp_path)
    stages("s", ("k",), computing(calls))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    stages("s", ("k",), computing(calls, 2.0))
    monkeypatch.setenv("LFPM_DEVICE", "meta")
    monkeypatch.setenv("LFPM_AMP", "1")
    stages("s", ("k",), computing(calls, 3.0))
    monkeypatch.setenv("LFPM_AMP", "0")
    stages("s", ("k",), computing(calls, 4.0))
    monkeypatch.setenv("LFPM_AMP", "1")
    assert stages("s", ("k",), computing(calls, 5.0))[0]["x"].item() == 3.0
    assert calls == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_stage_leaves_nothing_and_runs_again(tmp_path, error):
    calls, stages = [], Stages(tmp_path)

    def dies():
        raise error

    with pytest.raises(error):
        stages("s", ("k",), dies)
    assert [p for p in tmp_path.rglob("*.*") if p.suffix != ".lock"] == [] and stages.log == []
    assert stages("s", ("k",), computing(calls))[0]["x"].item() == 1 and calls == [1.0]


def test_force_computes_each_stage_once_more(tmp_path, monkeypatch):
    calls = []
    Stages(tmp_path)("s", ("k",), computing(calls, 1.0))
    stages = Stages(tmp_path, force=True)
    for _ in range(3):
        stages("s", ("k",), computing(calls, 2.0))
    assert (
        calls == [1.0, 2.0]
        and Stages(tmp_path)("s", ("k",), computing(calls, 3.0))[0]["x"].item() == 2
    )
    monkeypatch.setenv("LFPM_FORCE", "1")
    assert Stages(tmp_path).force and not Stages(tmp_path, force=False).force


def test_poisoned_stages_say_so(tmp_path):
    Stages(tmp_path)("s", ("k",), computing([]), poisoned=True)
    Stages(tmp_path)("s", ("k",), computing([]))
    marks = {
        p.name.endswith("-poisoned.safetensors"): load_state(p)[1]["poisoned"]
        for p in (tmp_path / "s").iterdir()
    }
    assert marks == {True: "True", False: "False"}


@pytest.mark.parametrize("library", ["torch", "open_clip_torch"])
def test_a_stage_depends_on_the_versions_of_the_libraries(tmp_path, monkeypatch, library):
    calls, asked = [], core.metadata.version
    Stages(tmp_path)("s", ("k",), computing(calls, 1.0))
    with monkeypatch.context() as m:
        m.setattr(core.metadata, "version", lambda name: "0.0" if name == library else asked(name))
        assert Stages(tmp_path)("s", ("k",), computing(calls, 2.0))[0]["x"].item() == 2
    assert Stages(tmp_path)("s", ("k",), computing(calls, 3.0))[0]["x"].item() == 1 and calls == [
        1.0,
        2.0,
    ]


@pytest.mark.parametrize(
    "spoil, why",
    [
        (lambda b: b[:30], "carries no hash of itself"),
        (lambda b: b"", "is empty"),
        (lambda b: b + b"x", "another hash"),
        (lambda b: b.replace(b'"seal"', b'"sead"'), "carries no hash of itself"),
        (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "another hash"),
    ],
)
def test_a_damaged_stage_is_computed_again_and_named(tmp_path, capsys, spoil, why):
    calls = []
    Stages(tmp_path)("s", ("k",), computing(calls, 1.0))
    (path,) = (tmp_path / "s").iterdir()
    path.write_bytes(spoil(path.read_bytes()))
    assert Stages(tmp_path)("s", ("k",), computing(calls, 2.0))[0]["x"].item() == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(path) in err and why in err
    assert (
        Stages(tmp_path)("s", ("k",), computing(calls, 3.0))[0]["x"].item() == 2
        and calls == [1.0, 2.0]
        and capsys.readouterr().err == ""
    )


def test_a_file_without_a_seal_is_no_stage(tmp_path, capsys):
    calls = []
    Stages(tmp_path)("s", ("k",), computing(calls, 1.0))
    (path,) = (tmp_path / "s").iterdir()
    state, meta = load_state(path)
    save_state(path, state, record=meta["record"], poisoned=meta["poisoned"])
    assert Stages(tmp_path)("s", ("k",), computing(calls, 2.0))[0]["x"].item() == 2
    assert "carries no hash of itself" in capsys.readouterr().err


def test_no_flipped_bit_of_a_stage_passes(tmp_path):
    """Every bit of a small file.

    Length of the header, names, shapes, padding, record, the hash itself, weights."""
    compute = lambda: ({"w": torch.arange(5.0).reshape(1, 5), "n": torch.tensor(3)}, dict(acc=0.5))
    Stages(tmp_path)("s", ("k",), compute, poisoned=True)
    (path,) = (tmp_path / "s").iterdir()
    whole = path.read_bytes()
    assert damage(path) == ""
    for bit in range(8 * len(whole)):
        bad = bytearray(whole)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        assert damage(path), f"bit {bit} of {8 * len(whole)}"


def test_code_hash_follows_every_kind_of_import(monkeypatch):
    """The experiment's methods register on import (`from . import x`).

    Their code is part of what a result depends on."""
    from pathlib import Path

    read, seen = Path.read_text, []
    monkeypatch.setattr(
        Path, "read_text", lambda self, *a, **k: (seen.append(self.stem), read(self, *a, **k))[1]
    )
    code_hash("experiment")
    assert {"core", "merge", "adaptive", "attack", "lobam", "trojan", "defend", "baselines"} <= set(
        seen
    )


# --- data where the work is ---------------------------------------------------------------------


@pytest.mark.parametrize("free, moves", [(200, True), (199, False)])
def test_pictures_move_to_the_device_if_they_take_half_of_it_at_most(monkeypatch, free, moves):
    class There(torch.Tensor):
        "A picture that notes where it is sent; there is no GPU to send it to."

        sent = None

        def to(self, dev):
            self.sent = dev
            return self

    x = torch.zeros(100, dtype=torch.uint8).as_subclass(There)
    monkeypatch.setattr(core, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda dev: (free, 1000))
    assert core.resident(x)[0] is x and x.sent == (torch.device("cuda") if moves else None)
