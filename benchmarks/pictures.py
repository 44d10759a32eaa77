"""What becomes of pictures and labels of many kinds: right, refused in one line, or wrong.

    .venv/bin/python benchmarks/pictures.py

Builds every input itself, in a folder that it removes. Each kind is read in a process of its own
with 20 seconds and 2 GB; a traceback, a hang and a number that is not the right one are wrong.
Exit code 1 if anything is. `tests/test_pictures.py` holds each kind to what stands here."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a child may not meet threads

import io
import multiprocessing
import resource
import struct
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lfpm_nb.purify import _table, read_pictures
from lfpm_nb.tasks import Folder, load_task, read_npz

SECONDS, MEMORY = 20, 2 * 2**30
KINDS = {}  # {name: f(folder) -> (a call, its right value or None)}


def kind(name: str, refused: str = ""):
    """Decorator: `f(folder)` builds an input and returns (call, right value).

    With `refused`, words of the refusal, it returns the call alone."""

    def add(f):
        KINDS[name] = (f, refused)
        return f

    return add


# --- single pictures -----------------------------------------------------------------------------


def colour(folder: Path):
    "A call that gives the mean colour of the first picture of class a, read as a task would."
    return lambda: (
        Folder.of(folder).open(torch.tensor([0]), 8).float().mean((0, 2, 3)).round().int().tolist()
    )


def place(folder: Path, name: str) -> Path:
    "Where class a's only picture goes; class b has a plain one."
    for c in "ab":
        (folder / c).mkdir()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "b" / "plain.png")
    return folder / "a" / name


def picture(name: str, file: str, img, want=None, refused: str = "", **options):
    "A kind: Pillow saves what `img()` makes as `file`."

    @kind(name, refused)
    def build(folder):
        img().save(place(folder, file), **options)
        return colour(folder), want


def raw(name: str, file: str, data, want=None, refused: str = ""):
    "A kind: the bytes `data()` as `file`."

    @kind(name, refused)
    def build(folder):
        place(folder, file).write_bytes(data())
        return colour(folder), want


def plain(mode: str = "RGB", value=(200, 100, 50)):
    return Image.new("RGB", (9, 8), value).convert(mode)


def grey(value, dtype):
    return Image.fromarray(np.full((8, 8), value, dtype))


def png(depth: int, colour_type: int, row: bytes, size: int = 8) -> bytes:
    "A PNG written by hand: Pillow writes no colours of 16 bits."

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", size, size, depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress((b"\0" + row) * min(size, 8)))
        + chunk(b"IEND", b"")
    )


def turned():
    img = Image.new("RGB", (8, 16), (0, 0, 0))
    img.paste((200, 100, 50), (0, 4, 8, 12))
    return img


def animated() -> bytes:
    data = io.BytesIO()
    plain().save(data, "gif", save_all=True, append_images=[Image.new("RGB", (9, 8))] * 2)
    return data.getvalue()


MANY, DARK = [200, 100, 50], "does not say which one is white"
for suffix in ("png", "bmp", "tga", "tif", "ppm", "jp2", "qoi", "pcx", "sgi"):
    picture(f"colour, .{suffix}", f"x.{suffix}", plain, MANY)
for suffix in ("jpg", "jfif", "webp", "avif"):
    picture(f"colour, .{suffix}", f"x.{suffix}", plain, MANY)
picture("capitals in the suffix", "X.JPEG", plain, MANY)
raw("several frames: the first", "x.gif", animated, MANY)
for mode in ("L", "1", "P", "CMYK", "LA"):
    picture(
        f"white, mode {mode}",
        "x.tif" if mode == "CMYK" else "x.png",
        lambda mode=mode: plain(mode, (255,) * 3),
        [255] * 3,
    )
picture(
    "transparent becomes white",
    "x.png",
    lambda: Image.new("RGBA", (8, 8), (255, 0, 0, 0)),
    [255] * 3,
)
picture(
    "turned by EXIF",
    "x.jpg",
    turned,
    MANY,
    exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
)
picture("16-bit grey PNG", "x.png", lambda: grey(257 * 90, np.uint16), [90] * 3)
picture("16-bit grey TIFF", "x.tif", lambda: grey(257 * 90, np.uint16), [90] * 3)
picture(
    "16-bit TIFF, zero is white",
    "x.tif",
    lambda: grey(65535 - 257 * 90, np.uint16),
    [90] * 3,
    tiffinfo={262: 0},
)
picture("black of 16 bits", "x.png", lambda: grey(0, np.uint16), [0] * 3)
raw(
    "16-bit colour PNG",
    "x.png",
    lambda: png(16, 2, struct.pack(">3H", *(257 * v for v in MANY)) * 8),
    MANY,
)
raw(
    "12 bits in a 16-bit colour PNG",
    "x.png",
    lambda: png(16, 2, struct.pack(">3H", 3000, 2000, 1000) * 8),
    refused="leaves 8 bits next to nothing",
)
raw(
    "PGM whose white is 4095",
    "x.pgm",
    lambda: b"P5 8 8 4095\n" + struct.pack(">64H", *[16 * 90] * 64),
    [89] * 3,
)
picture("12 bits in a 16-bit PNG", "x.png", lambda: grey(16 * 90, np.uint16), refused=DARK)
picture("12 bits in a 16-bit TIFF", "x.tif", lambda: grey(16 * 90, np.uint16), refused=DARK)
picture(
    "12 bits in a 16-bit TIFF that says so",
    "x.tif",
    lambda: grey(16 * 90, np.uint16),
    [89] * 3,
    tiffinfo={281: 4095},
)
picture(
    "a TIFF brighter than its white",
    "x.tif",
    lambda: grey(5000, np.uint16),
    refused="says that 4095 is white",
    tiffinfo={281: 4095},
)
picture("float TIFF", "x.tif", lambda: grey(0.35, np.float32), refused=DARK)
picture("float TIFF with NaN", "x.tif", lambda: grey(np.nan, np.float32), refused="nan")
picture("int32 TIFF", "x.tif", lambda: grey(90, np.int32), refused=DARK)
picture(
    "int32 TIFF that says 255", "x.tif", lambda: grey(90, np.int32), [90] * 3, tiffinfo={281: 255}
)
picture("EPS would start another program", "x.eps", plain, refused="x.eps is no readable image")
raw(
    "HEIC, which Pillow lacks",
    "x.heic",
    lambda: b"\0\0\0\x18ftypheic" + bytes(40),
    refused="x.heic is no readable image",
)
raw(
    "cut short",
    "x.png",
    lambda: png(8, 2, np.random.default_rng(0).bytes(24))[:60],
    refused="x.png is no readable image",
)
raw("text called .jpg", "x.jpg", lambda: b"no picture", refused="x.jpg is no readable image")
raw("empty file", "x.png", lambda: b"", refused="x.png is no readable image")
raw(
    "60,000 pixels square",
    "x.png",
    lambda: png(8, 2, bytes(24), 60_000),
    refused="x.png is no readable image",
)
raw("PNG without a suffix", "x", lambda: png(8, 2, bytes(MANY) * 8), MANY)
raw("PNG with a suffix nobody knows", "x.png_1", lambda: png(8, 2, bytes(MANY) * 8), MANY)


# --- folders of classes --------------------------------------------------------------------------


def folder_of(root: Path, counts: dict[str, int]) -> Path:
    for c, (name, n) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for k in range(n):
            Image.new("RGB", (8, 8), (40 * c + k,) * 3).save(root / name / f"{k}.png")
    return root


def classes(path: Path):
    "A call that gives a task's classes, and how often each is there."

    def call():
        t = load_task(str(path), n_train=100, n_test=100, size=8)
        return dict(
            zip(
                t.classes,
                torch.cat([t.train_y, t.test_y]).bincount(minlength=len(t.classes)).tolist(),
            )
        )

    return call


@kind("linked class folder")
def _(root):
    folder_of(root / "real", {"cat": 4})
    folder_of(root / "set", {"dog": 3})
    (root / "set" / "cat").symlink_to(root / "real" / "cat")
    return classes(root / "set"), {"cat": 4, "dog": 3}


@kind("link that leads back", "leads to the folder itself")
def _(root):
    (folder_of(root / "set", {"cat": 3, "dog": 3}) / "cat" / "all").symlink_to(root / "set")
    return classes(root / "set"), None


@kind("one folder under two names", "leads to cat")
def _(root):
    (folder_of(root / "set", {"cat": 3, "dog": 3}) / "fox").symlink_to(root / "set" / "cat")
    return classes(root / "set"), None


@kind("link to nothing", "is no readable image")
def _(root):
    (folder_of(root / "set", {"cat": 3, "dog": 3}) / "cat" / "gone.png").symlink_to(
        root / "nowhere.png"
    )
    return classes(root / "set"), None


@kind("class folder of text", "1 of 3 class folders hold no readable picture (fox)")
def _(root):
    (folder_of(root / "set", {"cat": 3, "dog": 3, "fox": 0}) / "fox" / "notes.txt").write_text(
        "x", encoding="utf-8"
    )
    return classes(root / "set"), None


@kind(
    "empty class folder of a test half", "1 of 4 class folders hold no readable picture (test/fox)"
)
def _(root):
    folder_of(root / "set", {"train/cat": 3, "train/fox": 3, "test/cat": 3, "test/fox": 0})
    return classes(root / "set"), None


@kind("class that test has not", "1 of 2 classes have no picture in test (fox)")
def _(root):
    folder_of(root / "set", {"train/cat": 3, "train/fox": 3, "test/cat": 3})
    return classes(root / "set"), None


@kind("one class", "holds one class, 'cat'")
def _(root):
    return classes(folder_of(root / "set", {"cat": 4})), None


@kind("a pipe among pictures")
def _(root):
    os.mkfifo(folder_of(root / "set", {"cat": 3, "dog": 3}) / "cat" / "x.png")
    return classes(root / "set"), {"cat": 3, "dog": 3}


@kind("a pipe called .npz", "is no file")
def _(root):
    os.mkfifo(root / "x.npz")
    return classes(root / "x.npz"), None


@kind("zip of class folders")
def _(root):
    folder_of(root / "set", {"cat": 3, "dog": 3})
    with zipfile.ZipFile(root / "x.zip", "w") as z:
        for p in (root / "set").rglob("*.png"):
            z.write(p, p.relative_to(root).as_posix())
        z.write(root / "set" / "cat" / "0.png", "__MACOSX/set/cat/._0.png")
    return classes(root / "x.zip"), {"cat": 3, "dog": 3}


@kind("zip with an empty class", "1 of 2 class folders hold no readable picture (set/fox)")
def _(root):
    folder_of(root / "set", {"cat": 3, "fox": 0})
    with zipfile.ZipFile(root / "x.zip", "w") as z:
        for p in sorted((root / "set").rglob("*")):
            z.write(p, p.relative_to(root).as_posix())
    return classes(root / "x.zip"), None


@kind("pictures of one colour are counted")
def _(root):
    folder_of(root / "set", {"cat": 3})
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(
        root / "set" / "cat" / "real.png"
    )
    return lambda: (len((p := read_pictures(root, 8, least=1)).x), p.flat), (4, 3)


# --- arrays --------------------------------------------------------------------------------------


def arrays(name: str, want=None, refused: str = "", **change):
    "A kind: an .npz of six pictures of cats and dogs, changed; its value is each picture's class."

    @kind(f".npz: {name}", refused)
    def build(root):
        parts = (
            dict(images=np.zeros((6, 8, 8, 3), np.uint8), labels=[0, 1] * 3, classes=["cat", "dog"])
            | change
        )
        np.savez(root / "x.npz", **{k: v for k, v in parts.items() if v is not None})

        def call():
            _, y, classes = read_npz(root / "x.npz")
            return [classes[i] for i in y.tolist()]

        return call, want


PAIRS = ["cat", "dog"] * 3
arrays("numbers", PAIRS)
arrays("numbers as a column", PAIRS, labels=np.array([[0], [1]] * 3))
arrays("labels that are names", PAIRS, labels=PAIRS)
arrays("labels that are bytes", PAIRS, labels=[p.encode() for p in PAIRS])
arrays("classes that are bytes", PAIRS, classes=[b"cat", b"dog"])
arrays("names without classes", PAIRS, labels=PAIRS, classes=None)
arrays("numbers as text", PAIRS, labels=["0", "1"] * 3)
arrays("digits named by digits", ["7", "3"] * 3, labels=["7", "3"] * 3, classes=["3", "7"])
arrays(
    "a label nobody named",
    refused="1 labels are none of the classes (fox)",
    labels=[*PAIRS[:5], "fox"],
)
arrays("bytes that are no text", refused="no UTF-8", labels=[b"\xff\xfe"] * 6)
arrays("a class twice", refused="name every class once", classes=["cat", "cat"])
arrays("fractions", refused="labels are float64", labels=[0.5] * 6)
arrays("yes and no", refused="labels are bool", labels=[True, False] * 3)
arrays("records", refused="labels are [('a'", labels=np.zeros(6, [("a", int)]))
arrays(
    "channels first", refused="expected uint8 (N, H, W, 3)", images=np.zeros((6, 3, 8, 8), np.uint8)
)
arrays("objects", refused="could run code", labels=np.array([None] * 6, object))


@kind(".npz: a header of a petabyte", "cannot be read")
def _(root):
    head = "{'descr': '|u1', 'fortran_order': False, 'shape': (1125899906842624,), }"
    with zipfile.ZipFile(root / "x.npz", "w") as z:
        z.writestr(
            "images.npy",
            b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head) + 1) + head.encode() + b"\n",
        )
    return lambda: read_npz(root / "x.npz"), None


# --- tables of labels ----------------------------------------------------------------------------

NAMES, WORDS = ["cat/1.png", "dog/2.png", "3.png"], ["red", "blue", "green"]


def table(name: str, text, want=None, refused: str = "", names=NAMES, words=WORDS):
    """A kind: the table `text` for pictures called `names`; `{}` stands for their folder.

    Its value is each picture's class or word."""

    @kind(f"labels: {name}", refused)
    def build(root):
        data = text if isinstance(text, bytes) else text.replace("{}", str(root / "pics")).encode()
        (root / "pics").mkdir()
        (root / "labels.csv").write_bytes(data)

        def call():
            y, classes = _table(root / "labels.csv", names, words, root / "pics")
            return [(classes or words)[i] for i in y]

        return call, want


THREE = ["cat", "dog", "cat"]
lines = lambda form, labels=THREE, names=NAMES: "".join(
    form.format(n, l) + "\n" for n, l in zip(names, labels)
)
table("commas", lines("{},{}"), THREE)
table("semicolons", lines("{};{}"), THREE)
table("tabs", lines("{}\t{}"), THREE)
table(
    "a mark at the start, a head, Windows' line ends",
    ("\ufefffile,label\n" + lines("{},{}")).replace("\n", "\r\n"),
    THREE,
)
table("UTF-16", lines("{}\t{}").encode("utf-16"), THREE)
table("./ before the names", lines("./{},{}"), THREE)
table("Windows' slashes", lines("{},{}").replace("/", "\\"), THREE)
table("whole paths", lines("{{}}/{},{}"), THREE)
table("whole paths of another computer", lines("D:\\photos\\{},{}").replace("/", "\\"), THREE)
table("the folder's own name before the names", lines("pics/{},{}"), THREE)
table(
    "another folder's name before the names",
    lines("test/{},{}"),
    refused="no label for 3 of 3 pictures",
)
table(
    "two computers' paths",
    lines("/a/{},{}") + lines("/b/{},{}", ["dog", "cat", "dog"]),
    refused="names pictures below /a and below /b",
)
table("spaces around", lines(" {} , {} "), THREE)
table("labels first", lines("{1},{0}"), THREE)
table("rows for other pictures too", lines("{},{}") + "9.png,fox\n", THREE)
table("a comma in a class", lines('{},"{}, small"'), [f"{t}, small" for t in THREE])
table(
    "three columns without a head",
    lines("{},train,{}"),
    refused="3 columns, and which one is the label is not said",
)
table("three columns with a head", "path,split,label\n" + lines("{},train,{}"), THREE)
table("an index before, as data frames write it", ",file,label\n" + lines("0,{},{}"), THREE)
table(
    "an empty label",
    lines("{},{}", ["cat", "", "dog"]),
    refused="1 pictures with an empty label (dog/2.png,)",
)
table("numbers", lines("{},{}", [2, 0, 1]), ["green", "red", "blue"])
table("numbers of a data frame", lines("{},{}", ["2.0", "0.0", "1.0"]), ["green", "red", "blue"])
table(
    "an empty label among numbers",
    lines("{},{}", [2, "", 1]),
    refused="1 pictures with an empty label",
)
table(
    "numbers among words",
    lines("{},{}", [2, "cat", 1]),
    refused="1 labels are no whole numbers (dog/2.png,cat)",
)
table("fractions", lines("{},{}", [0.5, 1.5, 2.5]), refused="the label 0.5 is no whole number")
table(
    "a number too large", lines("{},{}", [2, 3, 1]), refused="1 labels out of range (dog/2.png,3)"
)
table(
    "numbers that are words too",
    lines("{},{}", [2, 0, 1]),
    refused="may be the word '2' of the vocabulary",
    words=["0", "2", "1"],
)
table(
    "one label for all",
    lines("{},{}", ["train"] * 3),
    refused="all 3 pictures have the label 'train'",
)
table(
    "two labels for a picture",
    lines("{},{}") + "3.png,dog\n",
    refused="3.png the label 'cat' and the label 'dog'",
)
table(
    "capitals that differ", lines("{},{}", ["cat", "Cat", "dog"]), refused="differ in capitals only"
)
table("a picture without a line", lines("{},{}")[:20], refused="no label for")
table(
    "Latin letters of Windows",
    lines("{},{}", ["café", "thé", "café"]).encode("latin-1"),
    refused="save it as UTF-8",
)
table("no text at all", bytes(range(256)), refused="save it as UTF-8")
table("an empty file", "", refused="no label for 3 of 3 pictures")


# --- judging -------------------------------------------------------------------------------------


def close(value, want) -> bool:
    "Equal, or colours of a lossy format that are nearly so."
    numbers = isinstance(want, list) and all(isinstance(v, int) for v in want)
    return (
        len(value) == len(want) and all(abs(a - b) <= 4 for a, b in zip(value, want))
        if numbers
        else value == want
    )


def judged(name: str, folder: Path) -> tuple[str, str]:
    "('right', 'refused' or 'wrong', what came) of one kind, in this process."
    build, refused = KINDS[name]
    call, want = build(folder)
    try:
        value = call()
    except (ValueError, OSError) as e:
        fine = refused and refused in str(e) and "\n" not in str(e)
        return "refused" if fine else "wrong", f"{type(e).__name__}: {e}".replace(str(folder), "")
    except Exception as e:
        return "wrong", f"traceback: {type(e).__name__}: {e}"
    return "right" if not refused and close(value, want) else "wrong", f"{value}"


def _child(name: str, folder: Path, answers) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    answers.put(judged(name, folder))


def apart(name: str) -> tuple[str, str]:
    "`judged` in a process of its own, with limits."
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        p = fork.Process(target=_child, args=(name, Path(folder), answers))
        p.start()
        p.join(SECONDS)
        if p.is_alive():
            p.kill()
            p.join()
            return "wrong", f"hangs: nothing after {SECONDS} seconds"
    return answers.get() if not answers.empty() else ("wrong", f"ended with {p.exitcode}")


def main() -> int:
    torch.set_num_threads(1)
    count = dict(right=0, refused=0, wrong=0)
    for name in KINDS:
        verdict, came = apart(name)
        count[verdict] += 1
        print(f"{verdict:8s} {name:48s} {came[:150]}", flush=True)
    print(f"{len(KINDS)} kinds: " + ", ".join(f"{n} {v}" for v, n in count.items()))
    return count["wrong"] > 0


if __name__ == "__main__":
    sys.exit(main())
