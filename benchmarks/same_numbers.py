"""Do two commits give the same numbers? Both do the same jobs, side by side on this machine.

    python benchmarks/same_numbers.py OLD NEW [--only main rivals] [--lab [main rivals]]
                                      [--rounds 1] [--alias]

Jobs: every experiment of the sweep all-tiny that both commits know (`lfpm run NAME --preset tiny`;
`--only` takes fewer), with `--lab` also the main run, or those named, at lab scale, and merge,
convert and purify on files that this script makes. Each commit has a checkout of its own, first on
the path, results and caches of its own, this interpreter and one thread; the two take turns.

Every number of metrics.parquet (all but seconds and memory) and of purify's card, and every written
weight, is compared bit for bit. A row that only one commit has is a difference; a column that only
one has is named. CPU seconds are those of the whole command; with `--rounds` above 1 everything is
done again from the start, and the ratio is the median. Jobs of one side share a cache, as all runs
do; the last line adds up the jobs at lab scale.

Exit code 1 if anything differs. If nothing does, `--alias` writes to data/results/aliases.yaml that
the shipped folders whose hash is OLD's stand for NEW's hash too (notebook 18b_runs says what that
means). Uncommitted changes take no part."""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import re
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from lfpm_nb.core import cpu_name, writing
from lfpm_nb.runs import Alias, aliases_file, experiments, latest, read_aliases, settings_of

ROOT = Path(__file__).resolve().parent.parent
TIMED = ("seconds", "cpu_seconds", "peak_mb")  # measured anew every time, never equal
COMMAND = "from lfpm_nb.cli import main; main()"
HASHES = """
import json
from lfpm_nb.runs import experiments, planned, presets
found = {}
for name, e in experiments().items():
    for preset in presets(e):
        try: found[f"{name} {preset}"] = planned(name, preset).config
        except (ValueError, OSError): pass             # it needs files that are not here
print(json.dumps(found))
"""


# --- two checkouts -----------------------------------------------------------------------------


def git(*args: str) -> str:
    "What git says in this repository; its error as the end."
    done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout.strip()


@dataclasses.dataclass
class Side:
    "One commit: its checkout, and the folder in which its commands run."

    name: str
    commit: str
    tree: Path
    home: Path

    @property
    def env(self) -> dict:
        folders = dict(LFPM_RUNS=str(self.home / "runs"), LFPM_CACHE=str(self.home / "cache"))
        plain = dict(LFPM_QUIET="1", OMP_NUM_THREADS="1", MPLBACKEND="agg")
        return os.environ | folders | plain | dict(PYTHONPATH=str(self.tree))

    def python(self, code: str, *args: str) -> str:
        "What code prints in this checkout; SystemExit with the end of its errors if it fails."
        self.home.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            env=self.env,
            cwd=self.home,
            capture_output=True,
            text=True,
        )
        # 3: purify has changed nothing, and its numbers are compared all the same
        if done.returncode not in (0, 3):
            end = "\n".join(done.stderr.strip().splitlines()[-15:])
            raise SystemExit(
                f"{self.name} ({self.commit[:8]}) failed: lfpm {' '.join(args)}\n{end}"
            )
        return done.stdout

    def lfpm(self, *args: str) -> float:
        "CPU seconds of a command and all its children."

        def used() -> float:
            u = resource.getrusage(resource.RUSAGE_CHILDREN)
            return u.ru_utime + u.ru_stime

        before = used()
        self.python(COMMAND, *args)
        return used() - before


@contextlib.contextmanager
def checkouts(old: str, new: str):
    "Both commits as worktrees in a temporary folder, gone afterwards."
    with tempfile.TemporaryDirectory() as d:
        sides = []
        try:
            for name, commit in (("old", old), ("new", new)):
                sha = git("rev-parse", f"{commit}^{{commit}}")
                side = Side(name, sha, Path(d, name, "tree"), Path(d, name, "home"))
                git("worktree", "add", "--detach", str(side.tree), side.commit)
                sides.append(side)
                prepare(side)
            yield Path(d), *sides
        finally:
            for side in sides:
                git("worktree", "remove", "--force", str(side.tree))


def prepare(side: Side) -> None:
    "Let a checkout know its own version, and see that it is its own code that runs."
    text = (side.tree / "lfpm_nb" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'__version__ = "(.*)"', text)[1]
    info = side.tree / f"lfpm_nb-{version}.dist-info"
    info.mkdir()
    about = f"Metadata-Version: 2.1\nName: lfpm_nb\nVersion: {version}\n"
    (info / "METADATA").write_text(about, encoding="utf-8")
    where = side.python("import lfpm_nb.core; print(lfpm_nb.core.__file__)").strip()
    if Path(where).resolve().parents[1] != side.tree.resolve():
        raise SystemExit(
            f"{side.name} runs the code in {where}; expected its own in {side.tree}. "
            "Install the package in the usual way (make install) and try again"
        )


# --- what is compared --------------------------------------------------------------------------


@dataclasses.dataclass
class Difference:
    """Numbers and weights compared, how many of them differ, by how much at most.
    `largest` is inf where one side has none; `notes`: what else is to say."""

    numbers: int = 0
    weights: int = 0
    different: int = 0
    largest: float = 0.0
    notes: set = dataclasses.field(default_factory=set)

    def __add__(self, other: "Difference") -> "Difference":
        sums = [getattr(self, k) + getattr(other, k) for k in ("numbers", "weights", "different")]
        return Difference(*sums, max(self.largest, other.largest), self.notes | other.notes)


def same(x: float, y: float) -> bool:
    "Whether two numbers are the same to the last bit; NaN is NaN."
    return struct.pack("d", x) == struct.pack("d", y) or (x != x and y != y)


def of_numbers(old: dict, new: dict) -> Difference:
    "Two {key: number} compared; a key that only one has is a difference."
    out = Difference(numbers=len(old.keys() | new.keys()))
    for k in old.keys() | new.keys():
        x, y = old.get(k), new.get(k)
        if x is not None and y is not None and same(x, y):
            continue
        out.different += 1
        comparable = x is not None and y is not None and x == x and y == y
        out.largest = max(out.largest, abs(x - y) if comparable else float("inf"))
    return out


def numbers_of(df: pd.DataFrame, columns: list[str]) -> dict:
    "{(what the row is about, the how manieth such row, column): number} of a table of metrics."
    df = df[~df.metric.isin(TIMED)]
    if "kind" in df:
        df = df[df.kind != "seconds"]
    text = [c for c in columns if not pd.api.types.is_numeric_dtype(df[c])]
    about = [*text, "seed"]
    seen, out = collections.Counter(), {}
    for row in df[columns].to_dict("records"):
        key = tuple(str(row[c]) for c in about)
        for c in columns:
            if c not in about and c not in TIMED:
                out[(key, seen[key], c)] = float(row[c])
        seen[key] += 1
    return out


def of_tables(old: Path, new: Path) -> Difference:
    "Two metrics.parquet compared."
    a, b = pd.read_parquet(old), pd.read_parquet(new)
    columns = [c for c in a.columns if c in b.columns]
    out = of_numbers(numbers_of(a, columns), numbers_of(b, columns))
    out.notes = {f"column {c} in one only" for c in set(a.columns) ^ set(b.columns)}
    return out


def of_weights(old: Path, new: Path) -> Difference:
    "Two safetensors files compared."
    a, b = load_file(old), load_file(new)
    out = Difference()
    for k in a.keys() | b.keys():
        x, y = a.get(k), b.get(k)
        n = max(v.numel() for v in (x, y) if v is not None)
        out.weights += n
        if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype:
            out.different += n
            out.largest = float("inf")
            continue
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        moved = x.view(bits) != y.view(bits)
        if not moved.any():
            continue
        gap = (x[moved].double() - y[moved].double()).abs().max().item()
        out.different += int(moved.sum())
        out.largest = max(out.largest, gap if gap == gap else float("inf"))
    return out


def leaves(x, at: tuple = ()) -> dict:
    "{path: number} of nested JSON, without what is measured anew every time."
    if isinstance(x, bool) or not isinstance(x, (dict, list, int, float)):
        return {}
    if isinstance(x, (int, float)):
        return {at: float(x)}
    out = {}
    for k, v in x.items() if isinstance(x, dict) else enumerate(x):
        if k not in TIMED:
            out |= leaves(v, (*at, k))
    return out


def of_cards(old: Path, new: Path) -> Difference:
    """Two cards of purify compared, in the fields that both have.

    A new parameter is no other number."""
    a, b = (leaves(json.loads(p.read_text(encoding="utf-8"))) for p in (old, new))
    out = of_numbers({k: v for k, v in a.items() if k in b}, {k: v for k, v in b.items() if k in a})
    fields = {".".join(part for part in k if isinstance(part, str)) for k in a.keys() ^ b.keys()}
    out.notes = {f"card's {field} in one only" for field in fields}
    return out


# --- jobs --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Job:
    "A command of lfpm, and where in a side's folder lies what it writes: one table, or files."

    name: str
    args: list
    tables: str = ""
    files: tuple = ()

    def compare(self, old: Side, new: Side) -> Difference:
        "What both sides wrote. SystemExit unless each wrote the one table that is expected."
        out = Difference()
        if self.tables:
            each = [sorted(s.home.glob(self.tables)) for s in (old, new)]
            for side, found in zip((old, new), each):
                if len(found) != 1:
                    raise SystemExit(
                        f"{self.name}: {side.name} wrote {len(found)} tables; expected one"
                    )
            out += of_tables(each[0][0], each[1][0])
        for f in self.files:
            out += (of_cards if f.endswith(".json") else of_weights)(old.home / f, new.home / f)
        return out


def run_job(name: str, preset: str = "tiny") -> Job:
    args = ["run", name, "--preset", preset]
    return Job(" ".join(args), args, f"runs/{name}/{preset}-s*/metrics.parquet")


def make_files(folder: Path) -> Path:
    "A pretrained CLIP, two towers near it, and 120 pictures, the same on every call."
    (folder / "pictures").mkdir(parents=True)
    base = load_file(ROOT / "data" / "lfpm-lab.safetensors")
    save_file(base, folder / "base.safetensors", {"format": "pt"})
    for i in range(2):
        g = torch.Generator().manual_seed(i)
        tower = {k: v.float() for k, v in base.items() if k.startswith("visual.")}
        tower = {k: v + 0.01 * torch.randn(v.shape, generator=g) for k, v in tower.items()}
        save_file(tower, folder / f"tower{i}.safetensors", {"format": "pt"})
    rng = np.random.default_rng(0)
    for i in range(120):
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
        Image.fromarray(picture).save(folder / "pictures" / f"{i:03d}.png")
    return folder


def file_jobs(folder: Path) -> list[Job]:
    "Merge, convert and purify on the files of `make_files`."
    base, one, two = (str(folder / f"{n}.safetensors") for n in ("base", "tower0", "tower1"))
    merge = ["merge", one, two, "--base", base, "--out", "merged.safetensors"]
    convert = ["convert", one, "converted.safetensors", "--to", "hf"]
    purify = [
        "purify",
        one,
        "--base",
        base,
        "--model",
        "lfpm-lab",
        "--shadow",
        str(folder / "pictures"),
        "--preset",
        "tiny",
        "--out",
        "purified.safetensors",
    ]
    written = ("purified.safetensors", "anti-backdoor.safetensors", "card.json")
    return [
        Job("merge", merge, files=("merged.safetensors",)),
        Job("convert", convert, files=("converted.safetensors",)),
        Job("purify --preset tiny", purify, files=written),
    ]


def in_sweep(side: Side) -> list[str]:
    "Names of the experiments in a checkout's own all-tiny."
    file = side.tree / "data" / "sweeps" / "all-tiny.yaml"
    if not file.is_file():
        raise SystemExit(
            f"{side.name} ({side.commit[:8]}) has no sweep all-tiny; name experiments: --only main"
        )
    runs = yaml.safe_load(file.read_text(encoding="utf-8"))["runs"]
    return [r if isinstance(r, str) else r["run"] for r in runs]


def do(jobs: list[Job], old: Side, new: Side, work: Path, rounds: int) -> list[dict]:
    """{job, found: its Difference over all rounds, took: CPU seconds of each} for every job.

    `took` holds pairs (old, new). Every round starts with empty folders."""
    rows = [dict(job=j, found=Difference(), took=[]) for j in jobs]
    for r in range(rounds):
        for side in (old, new):
            side.home = work / side.name / f"round{r}"
        for k, row in enumerate(rows):
            turns = (old, new) if (r + k) % 2 else (new, old)
            took = {side.name: side.lfpm(*row["job"].args) for side in turns}
            row["took"].append((took["old"], took["new"]))
            found = row["job"].compare(old, new)
            if r:
                found.numbers = found.weights = 0  # the same ones once more
            row["found"] += found
            say(row)
    return rows


def say(row: dict) -> None:
    "Print a job's line after a round."
    f, (a, b) = row["found"], row["took"][-1]
    ratio = statistics.median(y / x for x, y in row["took"])
    notes = f"  ({'; '.join(sorted(f.notes))})" if f.notes else ""
    print(
        f"| {row['job'].name:34s} | {f.numbers:8,} | {f.weights:10,} | {f.different:9,} "
        f"| {f.largest:9.3g} | {a:7.1f} | {b:7.1f} | {ratio:5.2f} |{notes}",
        flush=True,
    )


def say_sum(rows: list[dict]) -> None:
    "Print the CPU seconds of all these jobs together, old and new, and their ratio."
    if not rows:
        return
    rounds = list(zip(*(row["took"] for row in rows)))
    sums = [tuple(sum(side) for side in zip(*jobs)) for jobs in rounds]
    a, b = sums[-1]
    ratio = statistics.median(new / old for old, new in sums)
    names = " + ".join(row["job"].name for row in rows)
    print(f"{names}: CPU s {a:.1f} old, {b:.1f} new, new / old {ratio:.2f}")


HEAD = "| job | numbers | weights | different | largest | CPU s old | CPU s new | new / old |"


# --- aliases -----------------------------------------------------------------------------------


def shipped() -> list[tuple[str, str, str]]:
    "(experiment, preset, hash) of the folders that are shipped."
    folders = [f for f in aliases_file().parent.glob("*/*-s*-*") if f.is_dir()]
    parts = {(f.parent.name, *re.fullmatch(r"(.+)-s\d+-(\w+)", f.name).groups()) for f in folders}
    return sorted(parts)


def real(name: str, preset: str) -> bool:
    "Whether an experiment's preset is made of real pictures, which no job here sees."
    return getattr(settings_of(name, preset), "backbone", "lfpm-lab") != "lfpm-lab"


def new_aliases(
    old: dict, new: dict, numbers: dict, whole: bool, known: list[Alias], fixed: dict
) -> tuple[list[Alias], list[str]]:
    """(aliases of shipped folders, why others get none).

    `old`, `new`: {"main lab": hash}; `numbers`: {experiment: how many were compared}; `whole`: all
    experiments took part, so that one outside of the sweep is covered by those of its notebook;
    `known`: aliases there are; `fixed`: the fields that all new ones share."""
    out, why, every = {}, [], experiments()
    notebooks = {every[n].notebook for n, count in numbers.items() if count}
    for name, preset, config in shipped():
        own = f"{name} {preset}"
        was, now = old.get(own), new.get(own)
        covered = name in numbers or (whole and every[name].notebook in notebooks)
        if latest(name, preset, config, known) != was:
            why.append(f"{own} {config} is not OLD's ({was})")
        elif was == now:
            why.append(f"{own} {config}: the hash has not changed")
        elif now is None:
            why.append(f"{own}: NEW does not know it")
        elif not covered:
            why.append(f"{own} was not compared")
        elif real(name, preset):
            why.append(f"{own} is made of real pictures, and none took part")
        elif numbers.get(name) == 0:
            why.append(f"{own}: nothing but seconds to compare")
        else:
            out[own] = Alias(name, preset, was, now, **fixed)
    return list(out.values()), why


def write_aliases(aliases: list[Alias]) -> None:
    """Add aliases to the file of the shipped results; its first comment stays.
    ValueError, and the file as it was, if they do not fit together."""
    path = aliases_file()
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    head = "".join(line for line in before.splitlines(keepends=True) if line.startswith("#"))
    entries = [dataclasses.asdict(a) for a in (*read_aliases(), *aliases)]
    text = head + yaml.safe_dump(entries, sort_keys=False, width=120, allow_unicode=True)
    with writing(path) as tmp:
        tmp.write_text(text, encoding="utf-8")
        read_aliases(tmp)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", help="the commit whose numbers are known")
    parser.add_argument("new", help="the commit that shall give the same")
    parser.add_argument(
        "--only", nargs="+", help="these experiments instead of all of the sweep all-tiny"
    )
    parser.add_argument(
        "--lab",
        nargs="*",
        metavar="NAME",
        help="also these, alone the main run, at lab scale (minutes to hours)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        help="times everything is done, for the ratio of CPU seconds",
    )
    parser.add_argument(
        "--alias",
        action="store_true",
        help="write aliases for the shipped results if nothing differs",
    )
    args = parser.parse_args()
    with checkouts(args.old, args.new) as (work, old, new):
        names = args.only or [n for n in in_sweep(new) if n in in_sweep(old)]
        alone = set() if args.only else set(in_sweep(old)) ^ set(in_sweep(new))
        for n in sorted(alone):
            print(f"only one commit has {n}: not compared")
        jobs = [run_job(n) for n in names] + file_jobs(make_files(work / "files"))
        if args.lab is not None:
            jobs += [run_job(n, "lab") for n in args.lab or ["main"]]
        where = f"{cpu_name()}, torch {torch.__version__}, one thread"
        print(f"{old.commit[:8]} and {new.commit[:8]}, {where}\n{HEAD}\n{'|---' * 8}|", flush=True)
        rows = do(jobs, old, new, work, args.rounds)
        total = sum((row["found"] for row in rows), Difference())
        print(
            f"\ncompared: {total.numbers:,} numbers, {total.weights:,} weights; "
            f"different: {total.different:,}; largest difference: {total.largest:g}"
        )
        say_sum([row for row in rows if "lab" in row["job"].args])
        if total.different:
            return 1
        if not args.alias:
            return 0
        fixed = dict(
            old=old.commit,
            new=new.commit,
            compared=[row["job"].name for row in rows],
            numbers=total.numbers,
            largest=total.largest,
            machine=cpu_name(),
            date=time.strftime("%F"),
        )
        numbers = {n: row["found"].numbers for n, row in zip(names, rows)}
        hashes = [json.loads(side.python(HASHES)) for side in (old, new)]
        aliases, why = new_aliases(*hashes, numbers, not args.only, read_aliases(), fixed)
        write_aliases(aliases)
        for w in why:
            print(f"no alias: {w}")
        print(f"{len(aliases)} aliases written to {aliases_file()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
