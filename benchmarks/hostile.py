"""Files of every spelling, and files that are broken or hostile, given to the commands.

What comes of each: right, refused in one line, or wrong.

    python benchmarks/hostile.py [weights …] [--only TEXT] [--keep FOLDER]

Everything is built here, from the shipped backbone and a seed. A part is a function that yields
cases; a case is a name, a file or folder, and what must come of it. Each case is given to
commands, each in a process of its own with 20 seconds and 2 GB beside what Python holds already.
*Right*: the exit code is 0 and every number written is the one that clean files give. *Refused*:
another exit code, one line beside notes, nothing written. All else is wrong: a traceback, a kill,
a hang, other numbers. Pickles that would make a file if they were run look for that file
afterwards. Exit code 1 if one case is wrong."""

import argparse
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import types
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

os.environ |= dict(OMP_NUM_THREADS="1", LFPM_QUIET="1", LFPM_DEVICE="cpu")
import open_clip  # noqa: F401, so that no case pays for its import
import torch

from lfpm_nb.cli import main as lfpm
from lfpm_nb.clip import load_clip, whole
from lfpm_nb.core import load_state, save_state
from lfpm_nb.formats import FORMS, Tower, layout, write_tower

SECONDS, MEMORY = 20, 2 * 2**30
PREFIXES = (
    "module.",
    "model.",
    "state_dict.",
    "net.image_encoder.",
    "_orig_mod.module.",
    "clip_model.",
    "a.b.c.d.",
)
FLOATS = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass
class Case:
    """What is given, and what must come of it.

    `ends`: right, refused, or either. `marker`: a file that must not appear."""

    kind: str
    name: str
    path: Path
    ends: str = "either"
    marker: Path | None = None
    truth: str = "a"  # whose weights it holds


# --- running --------------------------------------------------------------------------------------


def run(args: list, seconds: int = SECONDS) -> tuple[int, str]:
    "(exit code, or minus the signal; what was printed) of an lfpm command in a process of its own."
    with tempfile.TemporaryFile() as log:
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            held = 1024 * int(
                next(
                    r for r in open("/proc/self/status", encoding="utf-8") if r.startswith("VmSize")
                ).split()[1]
            )
            resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY,) * 2)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            sys.argv = ["lfpm", *map(str, args)]
            code = 0
            try:
                lfpm()
            except SystemExit as e:
                code = e.code if isinstance(e.code, int) else 1
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 99
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        log.seek(0)
        return os.waitstatus_to_exitcode(status), log.read().decode(errors="replace")


def verdict(case: Case, code: int, said: str, out: Path, truth: Path) -> str:
    "'right', 'refused', or what is wrong."
    if case.marker and case.marker.exists():
        return "EXECUTED"
    if code < 0:
        return "hang" if -code == signal.SIGALRM else f"killed by signal {-code}"
    if "Traceback" in said:
        return "traceback"
    if code:
        lines = [r for r in said.splitlines() if r.strip()]
        told = [r for r in lines if case.path.name in r or str(case.path.parent) in r]
        if out.exists():
            return "refused, but something was written"
        if not told:
            return "refused without naming the file"
        return (
            "refused"
            if len(lines) <= 3 and case.ends != "right"
            else "refused, but it should be read"
            if case.ends == "right"
            else "many lines"
        )
    if case.ends == "refused":
        return "taken, but it should be refused"
    return "right" if same(out, truth) else "other numbers, without a word"


def same(a: Path, b: Path) -> bool:
    "Whether two outputs hold the same numbers; a text or a figure is only there."
    if a.suffix != ".safetensors":
        return a.exists()
    x, y = load_state(a)[0], load_state(b)[0]
    return x.keys() == y.keys() and all(torch.equal(v.float(), y[k].float()) for k, v in x.items())


# --- weights --------------------------------------------------------------------------------------


class Weights:
    "A base and a contributor of it, and the files that are made of them."

    def __init__(self, work: Path):
        self.work, self.clip = work, load_clip()
        g = torch.Generator().manual_seed(1)
        self.base = self.clip.state()
        # numbers that float8 holds, so that every dtype below is exact
        eight = lambda v: v.to(torch.float8_e4m3fn).float().to(torch.float8_e5m2).float()
        self.base = {k: eight(v) for k, v in self.base.items()}
        step = lambda v: eight(v * (1 + (torch.rand(v.shape, generator=g) < 0.02)))
        # Hugging Face's towers have no projection, so all share the base's
        self.a, self.b = (
            {k: v if k == "proj" else step(v) for k, v in self.base.items()} for _ in range(2)
        )
        self.rest = {
            k: v.detach().float()
            for k, v in self.clip.model.state_dict().items()
            if not k.startswith("visual.")
        }
        for n in ("base", "a", "b"):
            write_tower(work / f"{n}.safetensors", Tower(getattr(self, n), {}, "visual"))

    def whole(self) -> dict:
        return layout(self.a, self.rest, "open_clip")[0]

    def folder(self, name: str) -> Path:
        (at := self.work / name).mkdir()
        return at

    def module(self, old: bool = False, marker: Path | None = None) -> Path:
        "A pickled encoder whose classes are gone when it is read."
        home = types.ModuleType("gone")
        exec(
            "import torch\n"
            "class Encoder(torch.nn.Module): pass\n"
            "class Preprocess: pass\n"
            "class Touch:\n"
            "    def __reduce__(self): return open, (self.path, 'w')",
            home.__dict__,
        )
        for c in (home.Encoder, home.Preprocess, home.Touch):
            c.__module__ = "gone"
        sys.modules["gone"] = home
        enc, at = home.Encoder(), self.work / f"encoder{old}{bool(marker)}.pt"
        enc.model = self.clip.model
        enc.val_preprocess = home.Preprocess()
        if marker:
            enc.touch = home.Touch()
            enc.touch.path = str(marker)
        before = self.clip.state()
        with whole(self.clip.visual):
            self.clip.visual.load_state_dict(self.a)
            torch.save(enc, at, _use_new_zipfile_serialization=not old)
        self.clip.visual.load_state_dict(before)
        del sys.modules["gone"]
        return at

    def script(self) -> Path:
        "A TorchScript archive, as OpenAI publishes: both towers and three whole numbers."
        m, holder = self.clip.model, torch.nn.Module()
        for k in ("visual", "transformer", "token_embedding", "ln_final"):
            setattr(holder, k, getattr(m, k))
        for k in ("positional_embedding", "text_projection", "logit_scale"):
            setattr(holder, k, getattr(m, k))
        for k, v in (("context_length", 24), ("vocab_size", 600)):
            holder.register_buffer(k, torch.tensor(v))
        holder.forward = types.MethodType(lambda self, x: self.visual(x), holder)
        before = self.clip.state()
        with whole(self.clip.visual):
            self.clip.visual.load_state_dict(self.a)
            torch.jit.trace(holder.eval(), torch.zeros(1, 3, 32, 32)).save(self.work / "script.pt")
        self.clip.visual.load_state_dict(before)
        return self.work / "script.pt"

    def sharded(self, name: str = "shards", index: str = "model.safetensors.index.json") -> Path:
        at, state = self.folder(name), self.whole()
        halves = list(state)[::2], list(state)[1::2]
        files = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
        for f, keys in zip(files, halves):
            save_state(at / f, {k: state[k] for k in keys})
        where = {k: f for f, keys in zip(files, halves) for k in keys}
        (at / index).write_text(json.dumps(dict(metadata={}, weight_map=where)), encoding="utf-8")
        return at

    def adapter(self, name: str, named=lambda k: k, **config) -> Path:
        """A peft folder that changes one attention and one MLP by nothing but zeros in B.

        Folded it is the base."""
        at, width = self.folder(name), 192
        part = named("transformer.resblocks.0")
        state = {
            f"base_model.model.{part}.mlp.c_fc.lora_A.weight": torch.ones(2, width),
            f"base_model.model.{part}.mlp.c_fc.lora_B.weight": torch.zeros(480, 2),
        }
        save_state(at / "adapter_model.safetensors", state)
        (at / "adapter_config.json").write_text(
            json.dumps(dict(peft_type="LORA", r=2, lora_alpha=4) | config), encoding="utf-8"
        )
        return at

    # --- files that must be read

    def spellings(self):
        w, n = self.work, 0

        def st(name, state, suffix=".safetensors", **kw):
            nonlocal n
            n += 1
            save_state(w / f"s{n}{suffix}", state)
            return Case("spelling", name, w / f"s{n}{suffix}", "right", **kw)

        def pt(name, obj, suffix=".pt", **kw):
            nonlocal n
            n += 1
            torch.save(obj, w / f"s{n}{suffix}", **kw)
            return Case("spelling", name, w / f"s{n}{suffix}", "right")

        for form in FORMS:
            yield st(f"{form}, safetensors", layout(self.a, self.rest, form)[0])
            yield pt(f"{form}, torch.save", layout(self.a, self.rest, form)[0])
        for p in PREFIXES:
            yield st(f"prefix {p}", {p + k: v for k, v in self.whole().items()})
        for dtype in FLOATS:
            yield st(f"{dtype}", {k: v.to(dtype) for k, v in self.a.items()})
        for key in ("state_dict", "model", "module", "ema"):
            yield pt(f"nested under {key}", {key: self.whole(), "epoch": 3})
        yield pt(
            "Lightning",
            {
                "state_dict": {f"model.{k}": v for k, v in self.whole().items()},
                "optimizer_states": [{0: torch.ones(3)}],
                "callbacks": {"a": 1},
            },
            ".ckpt",
        )
        for suffix in (".bin", ".pth", ".ckpt", "", ".model"):
            yield pt(f"suffix {suffix!r}", self.whole(), suffix)
        for suffix in (".bin", ""):
            yield st(f"safetensors with suffix {suffix!r}", self.whole(), suffix)
        yield pt("before 2020", self.whole(), _use_new_zipfile_serialization=False)
        yield pt("protocol 4", self.whole(), pickle_protocol=4)
        yield pt(
            "half precision, before 2020",
            {k: v.half() for k, v in self.a.items()},
            _use_new_zipfile_serialization=False,
        )
        yield pt(
            "tied and sliced storages",
            (lambda big: {k: big[k][0] for k in self.a})(
                {k: torch.stack([v, v]) for k, v in self.a.items()}
            ),
        )
        yield pt("parameters", {k: torch.nn.Parameter(v) for k, v in self.a.items()})
        for old in (False, True):
            yield Case(
                "spelling",
                f"pickled encoder of classes that are gone{', before 2020' * old}",
                self.module(old),
                "right",
            )
        marker = w / "ran"
        yield Case(
            "spelling",
            "pickled encoder that would run code",
            self.module(False, marker),
            "right",
            marker,
        )
        yield Case("spelling", "TorchScript archive", self.script(), "right")
        yield Case("spelling", "shards, folder", self.sharded(), "right")
        yield Case(
            "spelling",
            "shards, index",
            self.sharded("shards2") / "model.safetensors.index.json",
            "right",
        )
        for file in ("model.safetensors", "open_clip_model.safetensors"):
            save_state((at := self.folder(f"f-{file}")) / file, self.whole())
            yield Case("spelling", f"folder with {file}", at, "right")
        for file in ("pytorch_model.bin", "open_clip_pytorch_model.bin"):
            torch.save(self.whole(), (at := self.folder(f"f-{file}")) / file)
            yield Case("spelling", f"folder with {file}", at, "right")
        for name, named in (
            ("bare", lambda k: k),
            ("wrapped", lambda k: f"net.{k}"),
            ("open_clip", lambda k: f"visual.{k}"),
        ):
            yield Case(
                "spelling",
                f"adapter, {name} names",
                self.adapter(f"ad-{name}", named),
                "right",
                truth="base",
            )
        yield Case(
            "spelling",
            "adapter, its file",
            self.adapter("ad-file") / "adapter_model.safetensors",
            "right",
            truth="base",
        )

    # --- files that are broken

    def broken(self):
        w, n = self.work, 0

        def at(suffix):
            nonlocal n
            n += 1
            return w / f"x{n}{suffix}"

        def raw(name, data: bytes, suffix=".pt", ends="either", kind="bytes"):
            p = at(suffix)
            p.write_bytes(data)
            return Case(kind, name, p, ends)

        def state(name, s, ends="refused", suffix=".safetensors", kind="state"):
            p = at(suffix)
            save_state(p, s) if suffix == ".safetensors" else torch.save(s, p)
            return Case(kind, name, p, ends)

        g = torch.Generator().manual_seed(2)
        some = {"safetensors": (w / "a.safetensors").read_bytes()}
        for name, obj, kw in (
            ("zip", self.a, {}),
            ("older", self.a, dict(_use_new_zipfile_serialization=False)),
        ):
            torch.save(obj, p := at(".pt"), **kw)
            some[name] = p.read_bytes()
        some["module"], some["script"] = (
            (w / "encoderFalseFalse.pt").read_bytes(),
            (w / "script.pt").read_bytes(),
        )
        for kind, data in some.items():
            head = (
                struct.unpack("<Q", data[:8])[0] + 8
                if kind == "safetensors"
                else min(len(data), 20_000)
            )
            suffix = ".safetensors" if kind == "safetensors" else ".pt"
            for part in (
                0,
                1,
                7,
                8,
                9,
                100,
                head - 1,
                head,
                head + 5,
                len(data) // 2,
                len(data) - 30,
                len(data) - 1,
            ):
                yield raw(f"{kind} cut after {part}", data[:part], suffix, "refused")
            for i in range(24):
                where = int(torch.randint(head, (1,), generator=g))
                flipped = bytearray(data)
                flipped[where] ^= 1 << i % 8
                # the older kind has no checksum: another stride or number goes unseen
                if kind != "older" or where < 200:
                    yield raw(f"{kind}, bit {i % 8} of byte {where}", bytes(flipped), suffix)
            for i in range(6):
                cut = int(torch.randint(head, (1,), generator=g))
                yield raw(
                    f"{kind}, 16 bytes missing at {cut}", data[:cut] + data[cut + 16 :], suffix
                )
            yield raw(f"{kind} twice", data + data, suffix)
            yield raw(f"{kind}, zeros behind", data + bytes(999), suffix)
        for name, data in dict(
            empty=b"",
            junk=os.urandom(0) + bytes(range(256)) * 9,
            html=b"<!DOCTYPE html><title>404</title>",
            lfs=b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            hdf=b"\x89HDF\r\n",
            gguf=b"GGUF\3",
            npy=b"\x93NUMPY",
            zip=b"PK\5\6" + bytes(18),
            petabyte=struct.pack("<Q", 2**50) + b"{}",
            text=b"hello",
        ).items():
            for suffix in (".safetensors", ".pt", ""):
                yield raw(f"{name} as {suffix!r}", data, suffix, "refused")
        key = "transformer.resblocks.0.mlp.c_fc.weight"
        for dtype in (
            torch.int8,
            torch.uint8,
            torch.bool,
            torch.int16,
            torch.int32,
            torch.int64,
            torch.complex64,
        ):
            for suffix in (".safetensors", ".pt"):
                yield state(
                    f"{key} as {dtype}", self.a | {key: self.a[key].to(dtype)}, suffix=suffix
                )
        for k in (
            "conv1.weight",
            "proj",
            "positional_embedding",
            "class_embedding",
            "ln_post.bias",
            key,
        ):
            one = lambda v: self.a | {k: v}
            yield state(
                f"{k} is missing",
                {n: v for n, v in self.a.items() if n != k},
                "either" if k == "proj" else "refused",
            )
            yield state(f"{k} is one number", one(torch.tensor(1.0)))
            yield state(f"{k} is empty", one(torch.ones(0)))
            yield state(f"{k} has a dimension more", one(self.a[k][None].contiguous()))
            yield state(f"{k} is too long", one(torch.cat([self.a[k], self.a[k]])))
            yield state(f"{k} holds NaN", one(self.a[k] * float("nan")))
            yield state(
                f"{k} holds infinity", one(self.a[k].clone().fill_(float("inf"))), suffix=".pt"
            )
        yield state("a stranger beside", self.a | {"odd": torch.ones(3)})
        yield state("control characters", self.a | {"\x1b[31m\nodd": torch.ones(3)})
        yield state(
            "two towers",
            {f"{p}.{k}": v.clone() for p in ("student", "teacher") for k, v in self.a.items()},
        )
        yield state(
            "adapters inside",
            self.a | {"transformer.resblocks.0.attn.lora_A.weight": torch.ones(2, 2)},
        )
        yield state(
            "ResNet",
            {
                "visual.conv1.weight": torch.ones(2, 3, 3, 3),
                "visual.layer1.0.conv1.weight": torch.ones(2, 2, 1, 1),
                "visual.attnpool.positional_embedding": torch.ones(2, 2),
            },
        )
        for name, obj in dict(
            number=3,
            text="x",
            none=None,
            list=[self.a],
            tuple=(1, 2),
            tensor=torch.ones(3),
            nothing={},
            ints={i: v for i, v in enumerate(self.a.values())},
            nonekey={None: torch.ones(2)},
            tuplekey={(1, 2): torch.ones(2)},
            deep=nested(200),
            mixed=self.a | {3: torch.ones(2)},
            shared=many_paths(25),
            quantised=self.a
            | {"proj": torch.quantize_per_tensor(self.a["proj"], 0.1, 0, torch.qint8)},
            sparse=self.a | {"proj": self.a["proj"].to_sparse()},
            expanded=self.a | {"conv1.weight": torch.ones(1).expand(2**20, 3, 1, 1)},
        ).items():
            yield state(
                f"a pickled {name}",
                obj,
                "either" if name == "mixed" else "refused",
                ".pt",
                "pickle",
            )
        for name, data in programs(w).items():
            yield Case("pickle", name, write_zip(at(".pt"), data), "refused", w / "ran-program")
        good = pickle_of(self.a)
        for name, kw in dict(
            compressed=dict(compress=zipfile.ZIP_DEFLATED),
            bigendian=dict(more={"byteorder": b"big"}),
            twice=dict(more={"second/data.pkl": good}),
            nodata=dict(storages=False),
        ).items():
            yield Case("zip", name, write_zip(at(".pt"), good, self.a, **kw), "refused")
        for name, value in dict(
            list=[],
            text="x",
            null=None,
            number=3,
            nested_list=dict(vision_config=[1]),
            heads_text=dict(num_attention_heads="many"),
            heads_list=dict(num_attention_heads=[3]),
            heads_float=dict(num_attention_heads=7),
            act_list=dict(hidden_act=["gelu"]),
            text_list=dict(text_config=[3]),
            quick=dict(hidden_act="quick_gelu"),
            files=dict(lfpm_files=3),
        ).items():
            yield Case(
                "config",
                f"config.json is {name}",
                self.with_config(f"c-{name}", json.dumps(value)),
                "either",
            )
        for name, text in dict(broken="{", deep="[" * 200_000, binary="\x00\x01", empty="").items():
            yield Case(
                "config", f"config.json is {name}", self.with_config(f"c-{name}", text), "refused"
            )
        for name, change in dict(
            no_map={},
            list_map=dict(weight_map=[]),
            outside=dict(weight_map={"a": "../a.safetensors"}),
            absolute=dict(weight_map={"a": str(w / "a.safetensors")}),
            gone=dict(weight_map={"a": "gone.safetensors"}),
            numbers=dict(weight_map={"a": 3}),
        ).items():
            at_ = self.sharded(f"i-{name}")
            (at_ / "model.safetensors.index.json").write_text(json.dumps(change), encoding="utf-8")
            yield Case("shards", f"index {name}", at_, "refused")
        at_ = self.sharded("i-lost")
        (at_ / "model-00002-of-00002.safetensors").unlink()
        yield Case("shards", "a shard is missing", at_, "refused")
        yield Case("shards", "one shard alone", at_ / "model-00001-of-00002.safetensors", "refused")
        for name, config in dict(
            ia3=dict(peft_type="IA3"),
            dora=dict(use_dora=True),
            pissa=dict(init_lora_weights="pissa"),
            r_text=dict(r="2"),
            r_zero=dict(r=0),
            r_other=dict(r=3),
            alpha_nan=dict(lora_alpha=float("nan")),
            alpha_none=dict(lora_alpha=None),
            pattern=dict(rank_pattern={"(a+)+$": 2}),
            pattern_list=dict(rank_pattern=[1]),
            new=dict(use_something_new=True),
        ).items():
            yield Case(
                "adapter",
                f"adapter with {name}",
                self.adapter(f"ad-{name}", **config),
                "refused",
                truth="base",
            )
        (at_ := self.adapter("ad-alone") / "adapter_config.json").unlink()
        yield Case("adapter", "adapter without its config", at_.parent, "refused")
        yield Case(
            "adapter",
            "adapter of no module",
            self.adapter("ad-odd", lambda k: k.replace("transformer", "former")),
            "refused",
        )
        os.mkfifo(w / "pipe")
        (w / "dangling.pt").symlink_to(w / "nowhere")
        for name, p in dict(
            pipe=w / "pipe",
            dangling=w / "dangling.pt",
            folder=self.folder("nothing"),
            device=Path("/dev/zero"),
            absent=w / "absent.safetensors",
        ).items():
            yield Case("path", name, p, "refused")

    def with_config(self, name: str, text: str) -> Path:
        at = self.folder(name)
        save_state(at / "model.safetensors", layout(self.a, {}, "hf")[0])
        (at / "config.json").write_text(text, encoding="utf-8")
        return at

    # --- commands

    def commands(self, case: Case, out: Path):
        "(name, arguments, output, the file whose numbers it must have)."
        w, base, b = self.work, self.work / "base.safetensors", self.work / "b.safetensors"
        yield (
            "convert",
            ["convert", case.path, out, "--to", "visual", "--base", base],
            out,
            w / f"{case.truth}.safetensors",
        )
        if case.kind == "spelling" or zlib_pick(case.name, 2):
            yield (
                "merge",
                ["merge", b, case.path, "--base", base, "--out", out],
                out,
                w / f"merged-{case.truth}.safetensors",
            )
        if case.kind != "spelling" and zlib_pick(case.name, 3):
            yield "merge base", ["merge", b, b, "--base", case.path, "--out", out], out, None
        if case.kind != "spelling" and zlib_pick(case.name, 5):
            html = out.with_suffix(".html")
            yield (
                "path",
                [
                    "path",
                    b,
                    case.path,
                    "--base",
                    base,
                    "--task",
                    "signs",
                    "--n",
                    2,
                    "--n-test",
                    20,
                    "--html",
                    html,
                ],
                html,
                None,
            )
        if case.ends == "refused" and zlib_pick(case.name, 7):
            yield (
                "purify",
                [
                    "purify",
                    case.path,
                    "--base",
                    base,
                    "--model",
                    "lfpm-lab",
                    "--shadow",
                    w,
                    "--out",
                    out,
                ],
                out,
                None,
            )

    def cases(self):
        for name in ("a", "base"):
            code, said = run(
                [
                    "merge",
                    self.work / "b.safetensors",
                    self.work / f"{name}.safetensors",
                    "--base",
                    self.work / "base.safetensors",
                    "--out",
                    self.work / f"merged-{name}.safetensors",
                ]
            )
            assert code == 0, said
        yield from self.spellings()
        yield from self.broken()


def zlib_pick(name: str, n: int) -> bool:
    "One case in n, the same ones every time."
    import zlib

    return zlib.crc32(name.encode()) % n == 0


def nested(n: int) -> dict:
    out = {}
    for _ in range(n):
        out = {"x": out}
    return out


def many_paths(n: int) -> dict:
    "2^n ways to one tensor."
    out = {"t": torch.ones(1)}
    for _ in range(n):
        out = {"l": out, "r": out}
    return out


def pickle_of(state: dict) -> bytes:
    "data.pkl of a state dict, as torch.save writes it."
    with tempfile.TemporaryDirectory() as d:
        torch.save(state, f"{d}/x.pt")
        with zipfile.ZipFile(f"{d}/x.pt") as z:
            return z.read("x/data.pkl")


def write_zip(
    path: Path, pickled: bytes, state=None, compress=zipfile.ZIP_STORED, more=None, storages=True
) -> Path:
    with zipfile.ZipFile(path, "w", compress) as z:
        z.writestr("x/data.pkl", pickled)
        for i, v in enumerate((state or {}).values() if storages else ()):
            z.writestr(f"x/data/{i}", v.numpy().tobytes())
        for k, v in (more or {}).items():
            z.writestr(k if "/" in k else f"x/{k}", v)
    return path


def programs(work: Path) -> dict[str, bytes]:
    "Pickles that ask for something odd. None would do harm if it were run: at most a file appears."
    touch = f"{work}/ran-program"
    call = lambda module, name, arg: (
        f"c{module}\n{name}\n".encode() + b"(" + pickle.dumps(arg, 2)[2:-1] + b"tR"
    )
    tensor = lambda size, stride, offset=0, n=4: (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0"
        + b"0X\3\0\0\0cpu"
        + pickle.dumps(n, 2)[2:-1]
        + b"tQ"
        + pickle.dumps((offset, size, stride, False, {}), 2)[2:-1].replace(b"t.", b"t")
        + b"tR"
    )
    entry = lambda value: b"\x80\2}X\x0c\0\0\0conv1.weight" + value + b"s."
    return {
        "touches a file by open": entry(call("io", "open", touch)[:-2] + b"X\1\0\0\0wtR"),
        "touches a file by pathlib": entry(call("pathlib", "Path.touch", touch)),
        "evaluates text": entry(call("builtins", "eval", f"open({touch!r}, 'w')")),
        "global by stack": b"\x80\4\x8c\x02io\x8c\x04open\x93"
        + b"("
        + pickle.dumps(touch, 2)[2:-1]
        + b"X\1\0\0\0wtR.",
        "builds on a function": b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n"
        b"N}X\x08\0\0\0__code__K\1s\x86b.",
        "builds on a class": b"\x80\2ccollections\nOrderedDict\nN}X\x08\0\0\0__init__K\1s\x86b.",
        "inst": b"(X\1\0\0\0xiio\nopen\n.",
        "obj": b"(cio\nopen\nX\1\0\0\0xo.",
        "extension": b"\x80\2\x82\1.",
        "memo of four billion": b"\x80\2}r\xff\xff\xff\xff.",
        "no stop": b"\x80\2}}}",
        "empty stack": b"\x80\2.",
        "nothing to append to": b"\x80\2a.",
        "marks without end": b"\x80\2" + b"(" * 500_000 + b".",
        "tuples in tuples as a key": b"\x80\2})" + b"\x85" * 500_000 + b"K\1s.",
        "lists in lists": b"\x80\2" + b"]" * 300_000 + b"a" * 299_999 + b".",
        "many instructions": b"\x80\2" + b"}0" * 2_000_000 + b"}.",
        "a number of a million digits": b"\x80\2L" + b"9" * 1_000_000 + b"L\n.",
        "a text of a petabyte": b"\x80\4\x8d" + struct.pack("<Q", 2**50) + b"x.",
        "itself": b"\x80\2}q\0X\1\0\0\0xh\0s.",
        "itself twice": b"\x80\2}q\0X\1\0\0\0xh\0sX\1\0\0\0yh\0s.",
        "a storage of a petabyte": entry(tensor((2**48, 1, 1, 1), (1, 1, 1, 1), n=2**48)),
        "negative size": entry(tensor((-1, 1, 1, 1), (1, 1, 1, 1))),
        "negative offset": entry(tensor((1, 1, 1, 1), (1, 1, 1, 1), -5)),
        "beyond its storage": entry(tensor((9, 1, 1, 1), (1, 1, 1, 1))),
        "no strides": entry(tensor((2, 2, 1, 1), ())),
        "a million dimensions": entry(tensor((1,) * 10_000, (1,) * 10_000)),
        "storage is missing": entry(tensor((2, 2, 1, 1), (2, 1, 1, 1))),
        "next buffer": b"\x80\5\x97.",
        "persistent text": b"Pabc\n.",
    }


PARTS = {"weights": Weights}


def report(part: str, only: str, work: Path) -> int:
    "Run a part's cases and print what came of them; the number of wrong ones."
    made, counts, wrong, t0 = PARTS[part](work), {}, [], time.time()
    for i, case in enumerate(made.cases()):
        if only not in case.name:
            continue
        for name, args, out, truth in made.commands(case, work / "out" / f"{i}.safetensors"):
            shutil.rmtree(work / "out", ignore_errors=True)
            code, said = run(args)
            truth = truth or out
            v = verdict(case, code, said, out, truth)
            if v == "refused" and case.ends == "right":
                v = "refused, but it should be read"
            key = (case.kind, v if v in ("right", "refused") else "WRONG")
            counts[key] = counts.get(key, 0) + 1
            if key[1] == "WRONG":
                last = said.strip().splitlines()[-1][:200] if said.strip() else ""
                what = f"{name}, {case.kind}, {case.name} ({case.path.name}): {v}"
                wrong.append(f"{what}\n    {last}")
                print(wrong[-1], flush=True)
    n, took = sum(counts.values()), time.time() - t0
    print(f"\n{part}: {n} combinations of a file and a command, {took:.0f} s")
    print("| kind | right | refused in one line | wrong |\n|---|---|---|---|")
    for kind in dict.fromkeys(k for k, _ in counts):
        cells = (str(counts.get((kind, v), 0)) for v in ("right", "refused", "WRONG"))
        print(f"| {kind} | {' | '.join(cells)} |")
    return len(wrong)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)} (default: all)")
    p.add_argument("--only", default="", help="cases whose name holds this")
    p.add_argument("--keep", help="folder for the files (default: thrown away)")
    given = p.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of torch about how it saves
    with tempfile.TemporaryDirectory() as d:
        work = Path(given.keep or d)
        work.mkdir(parents=True, exist_ok=True)
        sys.exit(bool(sum([report(part, given.only, work) for part in given.parts or PARTS])))
