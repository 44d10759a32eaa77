"""The reader that runs nothing: what torch.save writes, and files that ask for more than they hold.

Modules whose classes are gone, TorchScript, nested dictionaries, shards."""

import importlib.util
import json
import pickle
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import new_pico
from lfpm_nb.checkpoints import Kept, Machine, cut, load_weights, prefix_of, weights_sha
from lfpm_nb.clip import whole
from lfpm_nb.core import file_sha, load_state, save_state
from lfpm_nb.formats import read_tower


@pytest.fixture(scope="module")
def clip():
    return new_pico("read")


@pytest.fixture(scope="module")
def state(clip):
    return {k: v.detach().clone() for k, v in clip.model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items()
    )


@pytest.fixture
def gone(clip):
    """`gone(path, touch=…)` pickles an encoder as task_vectors does.

    Of classes that are no longer there when it returns."""

    def save(path, touch=None, **kw):
        home = types.ModuleType("gone_src")
        exec(
            "import torch\nclass ImageEncoder(torch.nn.Module): pass\n"
            "class Touch:\n    def __reduce__(self): return open, (self.path, 'w')",
            home.__dict__,
        )
        for c in (home.ImageEncoder, home.Touch):
            c.__module__ = "gone_src"
        sys.modules["gone_src"] = home
        enc = home.ImageEncoder()
        enc.model, enc.cache_dir = clip.model, "somewhere"
        if touch:
            enc.hook = home.Touch()
            enc.hook.path = str(touch)
        with whole(clip.visual):
            torch.save(enc, path, **kw)
        del sys.modules["gone_src"]
        return path

    return save


@pytest.mark.parametrize("new", [True, False])
def test_an_encoder_whose_classes_are_gone(gone, state, tmp_path, capsys, new):
    path = gone(tmp_path / "zeroshot.pt", _use_new_zipfile_serialization=new)
    assert importlib.util.find_spec("gone_src") is None
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        torch.load(path, weights_only=False)
    w = load_weights(path)
    assert same(w.state, state) and "ImageEncoder" in w.how
    assert capsys.readouterr().err.count("gone_src.ImageEncoder") == 1
    tower = read_tower(path)
    assert tower.how == w.how and tower.sha256 == file_sha(path)


def test_nothing_in_a_pickle_runs(gone, state, tmp_path):
    marker = tmp_path / "ran"
    path = gone(tmp_path / "x.pt", touch=marker)
    assert same(load_weights(path).state, state) and not marker.exists()

    class Bomb:
        def __reduce__(self):
            return open, (str(marker), "w")

    torch.save({"conv1.weight": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(
        ValueError, match=r"bomb.pt: conv1.weight is made by \w*io.open, no plain tensor"
    ):
        load_weights(tmp_path / "bomb.pt")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb()))  # the marker works
    assert marker.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_as_pickle_reads_them(protocol):
    value = {
        "a": [1, -2, 3.5, True, None, "text", 2**70],
        "b": ("x", (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        3: {"deep": {}},
        "bytes": b"abc",
    }
    if protocol < 3:
        value.pop("bytes")
    from io import BytesIO

    assert Machine(lambda pid: pid).run(BytesIO(pickle.dumps(value, protocol))) == value


def test_a_script_archive_without_its_program(clip, state, tmp_path):
    m, holder = clip.model, torch.nn.Module()
    for k in (
        "visual",
        "transformer",
        "token_embedding",
        "ln_final",
        "positional_embedding",
        "text_projection",
        "logit_scale",
    ):
        setattr(holder, k, getattr(m, k))
    for k, v in dict(input_resolution=32, context_length=24, vocab_size=600).items():
        holder.register_buffer(k, torch.tensor(v))
    holder.forward = types.MethodType(lambda self, x: self.visual(x), holder)
    with whole(clip.visual):
        torch.jit.trace(holder.eval(), torch.zeros(1, 3, 32, 32)).save(tmp_path / "ViT.pt")
    w = load_weights(tmp_path / "ViT.pt")
    ints = {k: w.state.pop(k) for k in ("input_resolution", "context_length", "vocab_size")}
    assert same(w.state, state) and int(ints["context_length"]) == 24 and "TorchScript" in w.how
    tower = read_tower(tmp_path / "ViT.pt")
    assert tower.form == "openai" and tower.meta["quick_gelu"] is True


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 1},
        lambda s: {"model": s},
        lambda s: {"module": {"model": s}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {
            "state_dict": {f"net.clip.{k}": v for k, v in s.items()},
            "optimizer_states": [{0: torch.ones(2)}],
        },
        lambda s: {k: torch.nn.Parameter(v) for k, v in s.items()},
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ""])
def test_unwrapped(state, tmp_path, wrap, suffix):
    torch.save(wrap(state), tmp_path / f"x{suffix}")
    assert same(load_weights(tmp_path / f"x{suffix}").state, state)


def test_the_bytes_decide_not_the_suffix(state, tmp_path):
    save_state(tmp_path / "x.bin", state)
    torch.save(state, tmp_path / "x.safetensors")
    assert same(load_weights(tmp_path / "x.bin").state, state) and same(
        load_weights(tmp_path / "x.safetensors").state, state
    )


@pytest.mark.parametrize("mark", [b"\x80", b"P"])
def test_a_safetensors_header_may_begin_like_something_else(tmp_path, mark):
    "Its length is its first byte: 128 is the mark of a pickle, 80 the first letter of a zip."
    for n in range(300):
        save_state(tmp_path / "x.safetensors", {"conv1.weight": torch.ones(2)}, pad="x" * n)
        if (tmp_path / "x.safetensors").read_bytes()[:1] == mark:
            break
    else:
        pytest.skip("safetensors pads its header to other lengths")
    assert list(load_weights(tmp_path / "x.safetensors").state) == ["conv1.weight"]


def test_two_towers_are_refused_and_what_is_left_out_is_said(state, tmp_path, capsys):
    torch.save({"model": state, "ema": state}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt: 2 towers in one file .*save the one that is meant"):
        load_weights(tmp_path / "x.pt")
    save_state(
        tmp_path / "y.safetensors",
        {f"enc.{k}": v for k, v in state.items()} | {"head.weight": torch.ones(2)},
    )
    assert same(load_weights(tmp_path / "y.safetensors").state, state)
    assert "1 entries outside enc. are left out (first: head.weight)" in capsys.readouterr().err
    assert prefix_of(["visual.conv1.weight", "visual.layer1.0.conv1.weight"]) == "", (
        "a ResNet is one tower"
    )


def sharded(folder, state):
    folder.mkdir()
    halves = list(state)[::2], list(state)[1::2]
    for i, keys in enumerate(halves):
        save_state(folder / f"m-{i}.safetensors", {k: state[k] for k in keys}, poisoned=i)
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps(
            dict(
                weight_map={k: f"m-{i}.safetensors" for i, keys in enumerate(halves) for k in keys}
            )
        ),
        encoding="utf-8",
    )
    return index


def test_shards(state, tmp_path):
    index = sharded(tmp_path / "s", state)
    assert same(load_weights(index).state, state) and same(
        load_weights(tmp_path / "s").state, state
    )
    before = weights_sha(index)
    save_state(
        tmp_path / "s" / "m-1.safetensors",
        {k: v + 1 for k, v in load_state(tmp_path / "s" / "m-1.safetensors")[0].items()},
    )
    assert weights_sha(index) != before
    (tmp_path / "s" / "m-1.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="lists 2 files, 1 of them missing .m-1.safetensors"
    ):
        load_weights(index)
    for text in (
        "[]",
        "{",
        '{"weight_map": {"a": "../x"}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": 3}',
    ):
        index.write_text(text, encoding="utf-8")
        with pytest.raises(
            ValueError, match="model.safetensors.index.json (is no index|names no files)"
        ):
            load_weights(index)


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "open_clip_model.safetensors",
        "pytorch_model.bin",
        "open_clip_pytorch_model.bin",
    ],
)
def test_folders(state, tmp_path, name):
    save_state(tmp_path / name, state) if name.endswith("safetensors") else torch.save(
        state, tmp_path / name
    )
    assert same(load_weights(tmp_path).state, state)
    with pytest.raises(FileNotFoundError, match="no checkpoint in the folder"):
        load_weights(tmp_path.parent)


def test_open_clips_config_says_the_activation(state, tmp_path):
    save_state(tmp_path / "open_clip_model.safetensors", state)
    cfg = dict(
        embed_dim=32,
        quick_gelu=True,
        vision_cfg=dict(width=64, layers=2, patch_size=8, image_size=32),
        text_cfg=dict(heads=1),
    )
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps(dict(model_cfg=cfg)), encoding="utf-8"
    )
    assert read_tower(tmp_path).meta == dict(heads=1, text_heads=1, quick_gelu=True)
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps(dict(model_cfg=dict(vision_cfg=[]))), encoding="utf-8"
    )
    with pytest.raises(ValueError, match="open_clip_config.json is no open_clip config"):
        read_tower(tmp_path)


# --- more than it holds -------------------------------------------------------------------------


def rewritten(path, change) -> Path:
    "A torch.save file with its members changed by `change(name, data)`."
    with zipfile.ZipFile(path) as z:
        parts = {n: z.read(n) for n in z.namelist()}
    with zipfile.ZipFile(path, "w") as z:
        for n, data in parts.items():
            if (new := change(n, data)) is not None:
                z.writestr(n, new)
    return path


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda n, d: None if n.endswith("data.pkl") else d, "a zip without data.pkl"),
        (lambda n, d: b"big" if n.endswith("byteorder") else d, "big-endian"),
        (lambda n, d: d[:-4] if "/data/3" in n else d, "another size than its tensors say"),
        (lambda n, d: None if n.endswith("/data/3") else d, "is damaged at"),
        (
            lambda n, d: b"\x80\x02" + b"}0" * 2_000_000 + b"}." if n.endswith("data.pkl") else d,
            "more than 3,000,000 instructions",
        ),
        (
            lambda n, d: (
                b"\x80\x02})" + b"\x85" * 400_000 + b"K\x01s." if n.endswith("data.pkl") else d
            ),
            "no CLIP vision tower",
        ),
        (
            lambda n, d: (
                b"\x80\x02}q\x00X\x01\x00\x00\x00xh\x00sX\x01\x00\x00\x00yh\x00s."
                if n.endswith("data.pkl")
                else d
            ),
            "is damaged .*(names|nested)",
        ),
    ],
)
def test_damaged_archives(state, tmp_path, change, why):
    torch.save(state, tmp_path / "x.pt")
    rewritten(tmp_path / "x.pt", change)
    with pytest.raises(ValueError, match=f"x.pt.*{why}") as e:
        read_tower(tmp_path / "x.pt")
    assert "\n" not in str(e.value)


def test_a_small_file_asks_for_a_large_machine(state, tmp_path):
    torch.save({f"visual.{i}": state["visual.proj"] for i in range(3000)}, tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match="x.pt asks for .* bytes of tensors, more than twice its own size"
    ):
        load_weights(tmp_path / "x.pt")
    torch.save(
        state | {"visual.conv1.weight": torch.ones(1).expand(2**20, 3, 1, 1)}, tmp_path / "y.pt"
    )
    with pytest.raises(ValueError, match="y.pt"):
        load_weights(tmp_path / "y.pt")


@pytest.mark.parametrize(
    "data, what",
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"\x89HDF\r\n", "an HDF5 file"),
        (b"GGUF", "GGUF"),
        (b"", "damaged"),
        (b"hello", "damaged"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, data, what):
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(ValueError, match=f"x.pt is .*{what}"):
        load_weights(tmp_path / "x.pt")


def test_a_pipe_does_not_hang(tmp_path, lfpm):
    import os
    from lfpm_nb.clip import weights_id

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*pipe"):
        weights_id(f"ViT-B-32:{tmp_path / 'pipe'}")
    code, _, err = lfpm("run", "main", "--dry-run", "-p", f"backbone=ViT-B-32:{tmp_path / 'pipe'}")
    assert code == 2 and "pipe" in err


def test_openais_archive_as_a_backbone(tmp_path):
    "Its three whole numbers are no weights, and say QuickGELU."
    import open_clip
    from lfpm_nb.clip import load_clip

    state = open_clip.create_model("ViT-B-32").state_dict()
    torch.save(
        state
        | {
            "input_resolution": torch.tensor(224),
            "context_length": torch.tensor(77),
            "vocab_size": torch.tensor(49408),
        },
        tmp_path / "x.pt",
    )
    with pytest.raises(ValueError, match="quick_gelu=True, ViT-B-32 has False"):
        load_clip("ViT-B-32", tmp_path / "x.pt")
    assert torch.equal(
        load_clip("ViT-B-32-quickgelu", tmp_path / "x.pt").model.visual.proj, state["visual.proj"]
    )


@pytest.mark.parametrize(
    "offset, size, stride",
    [(0, (2, 3), (3, 2)), (1, (6,), (1,)), (0, (1000, 1000), (0, 0)), (6, (), ())],
)
def test_a_tensor_lies_inside_its_storage_and_repeats_nothing(offset, size, stride):
    kept = Kept(("0", torch.float32, 6), offset, size, stride, torch.float32)
    with pytest.raises(ValueError, match="in a storage of 6 entries"):
        cut(kept, bytearray(24))
