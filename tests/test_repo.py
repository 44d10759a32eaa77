"""Promises about the files themselves: notebooks, generated modules, README.

And what must never be committed."""

import ast
import io
import json
import re
import subprocess
import tokenize
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)
RUNS = [p for p in NOTEBOOKS if p.parent.name == "runs"]
GENERATED = {"__init__", "_modidx"}
MODULES = sorted(p for p in (ROOT / "lfpm_nb").glob("*.py") if p.stem not in GENERATED)
PLAIN = {"int", "float", "str", "bool", "list", "dict"}  # what papermill shows as types


def rel(p):
    return str(p.relative_to(ROOT))


def cells(p):
    return json.loads(p.read_text(encoding="utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


# --- output policy: readable on GitHub, small in git --------------------------------------------


def output_problems(nb: dict, nbytes: int) -> list[str]:
    "What a committed notebook may not hold; [] when it is fine. Sizes are bytes of UTF-8."
    size = lambda x: len(json.dumps(x, ensure_ascii=False).encode())
    bad = [f"file is {nbytes:,} bytes, more than 300 KB"] * (nbytes > 300_000)
    bad += ["metadata.widgets is set: save without widget state"] * ("widgets" in nb["metadata"])
    for i, cell in enumerate(nb["cells"]):
        for o in cell.get("outputs", []):
            if o["output_type"] == "error":
                bad.append(f"cell {i} holds an error: {o.get('ename')}")
            if o["output_type"] == "stream" and size(o["text"]) > 4_000:
                bad.append(f"cell {i} prints more than 4 KB")
            if size(o) > 150_000:
                bad.append(f"cell {i} has an output over 150 KB")
    return bad


@pytest.mark.parametrize("path", NOTEBOOKS, ids=rel)
def test_outputs(path):
    assert output_problems(json.loads(path.read_text(encoding="utf-8")), path.stat().st_size) == []


def test_output_policy_catches_each_kind():
    out = lambda **o: dict(metadata={}, cells=[dict(cell_type="code", source=[], outputs=[o])])
    assert output_problems(out(output_type="stream", name="stdout", text=["fine"]), 100) == []
    assert (
        "error: ValueError" in output_problems(out(output_type="error", ename="ValueError"), 100)[0]
    )
    assert (
        "4 KB"
        in output_problems(out(output_type="stream", name="stdout", text=["x" * 4001]), 100)[0]
    )
    assert (
        "150 KB"
        in output_problems(out(output_type="display_data", data={"image/png": "x" * 150_001}), 100)[
            0
        ]
    )
    assert "300 KB" in output_problems(dict(metadata={}, cells=[]), 300_001)[0]
    assert "widgets" in output_problems(dict(metadata={"widgets": {}}, cells=[]), 100)[0]


# --- run notebooks: one parameters cell that papermill, the CLI and a reader all understand -----


def parameter_problems(text: str) -> list[str]:
    """What is wrong with a parameters cell.

    Every statement is `name: type = literal  # help` on one line."""
    helped = {
        t.start[0]
        for t in tokenize.generate_tokens(io.StringIO(text).readline)
        if t.type == tokenize.COMMENT
    }
    bad = []
    for node in ast.parse(text).body:
        line = f"line {node.lineno}"
        if not (
            isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
        ):
            bad.append(f"{line}: expected `name: type = literal  # help`")
            continue
        if not (isinstance(node.annotation, ast.Name) and node.annotation.id in PLAIN):
            bad.append(f"{line}: annotate with one of {sorted(PLAIN)}")
        try:
            ast.literal_eval(node.value)
        except ValueError:
            bad.append(
                f"{line}: {node.target.id} is computed; "
                "literals only, as papermill injects after this cell"
            )
        if node.end_lineno != node.lineno:
            bad.append(f"{line}: {node.target.id} takes more than one line")
        if node.end_lineno not in helped:
            bad.append(f"{line}: {node.target.id} has no help comment")
    return bad


@pytest.mark.parametrize("path", RUNS, ids=rel)
def test_one_parameters_cell(path):
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "exactly one cell carries the tag `parameters`"
    assert tagged[0]["cell_type"] == "code" and parameter_problems(source(tagged[0])) == []


def test_parameter_rules():
    assert (
        parameter_problems(
            '# parameters\nseed: int = 0   # data and order\nname: str = "#1"  # any text'
        )
        == []
    )
    for text, why in [
        ("a = 1  # x", "expected"),
        ("a: int = 1", "no help"),
        ('a: str = "#"', "no help"),
        ("a: int = 2*n  # x", "literals only"),
        ("a: int | None = 1  # x", "annotate"),
        ("a: list = [1,\n 2]  # x", "more than one line"),
    ]:
        assert why in parameter_problems(text)[0], text


# --- modules: generated in the story's order, light to import -----------------------------------


def default_exp(path):
    return next(
        (
            m[1]
            for c in cells(path)
            if (m := re.search(r"^#\|\s*default_exp (\w+)", source(c), re.M))
        ),
        None,
    )


def imported(path) -> set[str]:
    "Dotted names a module imports anywhere in its body; relative ones are spelt from `lfpm_nb`."
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["lfpm_nb" if node.level else "", node.module]))
            names |= {base} | (
                {f"{base}.{a.name}" for a in node.names} if base == "lfpm_nb" else set()
            )
    return names


ORDER = [m for p in sorted((ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb")) if (m := default_exp(p))]


def test_modules_and_notebooks_match():
    numbers = [p.name.split("_")[0] for p in (ROOT / "nbs").glob("[0-9][0-9]*_*.ipynb")]
    assert len(set(numbers)) == len(numbers), "two library notebooks share a number"
    assert sorted(ORDER) == sorted(p.stem for p in MODULES), (
        "each notebook exports one module; "
        "run nbdev_export, remove modules that lost their notebook"
    )


@pytest.mark.parametrize("path", MODULES, ids=rel)
def test_module_imports(path):
    names = imported(path)
    assert not {n for n in names if n.split(".")[0] in ("nbdev", "fastcore", "execnb")}, (
        "development tools stay out of the library"
    )
    siblings = {n.split(".")[1] for n in names if n.startswith("lfpm_nb.")} & set(ORDER)
    assert {n for n in siblings if ORDER.index(n) >= ORDER.index(path.stem)} == set(), (
        "imports a later notebook's module"
    )


@pytest.mark.parametrize("path", MODULES, ids=rel)
def test_a_module_imports_its_neighbours_relatively(path):
    "nbdev leaves an import absolute that has a line break inside (findings/)."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [n.module for n in tree.body if isinstance(n, ast.ImportFrom) and not n.level]
    assert not [m for m in found if m.split(".")[0] == "lfpm_nb"]


def top_names(tree: ast.Module):
    "Names that a module gives at its top: functions but for added methods, classes, constants."
    for n in tree.body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            if not any("method" in ast.unparse(d) for d in n.decorator_list):
                yield n.name
        elif isinstance(n, ast.Assign):
            plain = [t.elts if isinstance(t, ast.Tuple) else [t] for t in n.targets]
            yield from (x.id for some in plain for x in some if isinstance(x, ast.Name))


@pytest.mark.parametrize("path", MODULES, ids=rel)
def test_a_module_gives_no_name_twice(path):
    "The second meaning would win, in cells far above it too."
    names = [n for n in top_names(ast.parse(path.read_text(encoding="utf-8"))) if n != "_"]
    assert not {n for n in names if names.count(n) > 1}


# --- text is UTF-8 whatever the locale ----------------------------------------------------------


def leaves_it_to_the_locale(call: ast.Call) -> bool:
    "Whether a call reads or writes text without saying in which encoding."
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    if name not in ("open", "read_text", "write_text") or any(
        k.arg == "encoding" for k in call.keywords
    ):
        return False
    if name != "open":
        return len(call.args) < (1 if name == "read_text" else 2)
    modes = [*call.args, *(k.value for k in call.keywords if k.arg == "mode")]
    text = [m.value for m in modes if isinstance(m, ast.Constant) and isinstance(m.value, str)]
    if isinstance(call.func, ast.Name):
        return not any(re.fullmatch(r"[rwxa+]*b[rwxa+b]*", m) for m in text)
    return any(
        re.fullmatch(r"[rwxat+]+", m) for m in text
    )  # of a path; what images and zips open has no such mode


def python_sources(path) -> list[str]:
    if path.suffix == ".py":
        return [path.read_text(encoding="utf-8")]
    return [
        TransformerManager().transform_cell(source(c))
        for c in cells(path)
        if c["cell_type"] == "code"
    ]


PYTHON = [
    *MODULES,
    *NOTEBOOKS,
    *(ROOT / "tests").rglob("*.py"),
    *(ROOT / "benchmarks").glob("*.py"),
]


@pytest.mark.parametrize("path", PYTHON, ids=rel)
def test_text_is_utf8(path):
    found = [
        n
        for text in python_sources(path)
        for n in ast.walk(ast.parse(text))
        if isinstance(n, ast.Call)
    ]
    assert [ast.unparse(n) for n in found if leaves_it_to_the_locale(n)] == [], (
        'add encoding="utf-8"'
    )


def test_what_leaves_it_to_the_locale():
    for text in (
        "p.read_text()",
        "p.write_text(x)",
        "open(p)",
        "open(p, 'a')",
        "open(p, mode='w')",
        "p.open('w')",
        "Path('x').open(mode='r')",
    ):
        assert leaves_it_to_the_locale(ast.parse(text).body[0].value), text
    for text in (
        "p.read_text('utf-8')",
        "p.write_text(x, encoding='utf-8')",
        "open(p, 'rb')",
        "open(p, mode='wb')",
        "open(p, encoding='utf-8')",
        "Image.open(p)",
        "read()",
    ):
        assert not leaves_it_to_the_locale(ast.parse(text).body[0].value), text


# --- README and tracked text --------------------------------------------------------------------


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_commands_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", readme(), re.S))
    used = set(re.findall(r"\bmake ([a-z]+)", code))
    assert {"lab", "test", "install"} <= used and used <= targets


def test_readme_and_index_know_every_notebook():
    index = "\n".join(source(c) for c in cells(ROOT / "nbs" / "index.ipynb"))
    for p in NOTEBOOKS:
        if p.stem == "index":
            continue
        assert rel(p) in readme(), f"README's table lacks {rel(p)}"
        assert p.relative_to(ROOT / "nbs").as_posix() in index, f"nbs/index.ipynb lacks {rel(p)}"


def test_links_to_files():
    for doc in [
        ROOT / n for n in ("README.md", "CONTRIBUTING.md", "SAFETY.md", "data/results/README.md")
    ]:
        for target in re.findall(r"\]\(([^)#\s]+)", doc.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (doc.parent / target).exists(), (
                    f"{doc.name} links to {target}, which is not there"
                )


def test_contributing_example_works():
    import torch
    from lfpm_nb.merge import merge, merges

    (code,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S
    )
    try:
        exec(code, {})
        models = [{"w": torch.tensor([v])} for v in (1.0, 2.0, 9.0)]
        assert merge("median", {"w": torch.zeros(1)}, models)["w"].item() == 2
    finally:
        merges.pop("median", None)


# --- shipped results ----------------------------------------------------------------------------

SHIPPED = sorted(f.parent for f in (ROOT / "data" / "results").glob("*/*/status.json"))


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_a_shipped_run_is_whole(folder):
    from lfpm_nb.runs import Finished, experiments, look, presets

    run = look(folder)
    assert isinstance(run, Finished), run
    assert folder.name == "{preset}-s{seed}-{config}".format(**run.status) and run.status[
        "preset"
    ] in presets(experiments()[folder.parent.name])


def test_the_recorded_table_is_the_recorded_one():
    from lfpm_nb.core import file_sha

    for card in (ROOT / "data" / "recorded").glob("*/card.json"):
        assert json.loads(card.read_text(encoding="utf-8"))["metrics"] == file_sha(
            card.with_name("metrics.parquet")
        ), card


def test_aliases_of_shipped_results_are_sound():
    """Known experiments, all fields, no circle.

    And each stands for a folder that is there, by itself or through others."""
    from lfpm_nb.runs import latest, read_aliases

    known = read_aliases()
    names = {(f.parent.name, *re.fullmatch(r"(.+)-s\d+-(\w+)", f.name).groups()) for f in SHIPPED}
    for a in known:
        end = latest(a.experiment, a.preset, a.was, known)
        assert any(
            (e, p) == (a.experiment, a.preset) and latest(e, p, c, known) == end
            for e, p, c in names
        ), f"{a.was} stands for no folder"


# Written so that they do not match themselves.
LEAKS = {
    "a package index": r"(?:\bpypi|pythonhosted|npmjs)\.(?:org|com|io)\b"
    r"|https?://[^\s\"')]+/simple\b|-{2}(?:extra-)?index-url",
    "a path of one machine": r"(?<![\w.~}\])])/(?:tmp|work|root|home|Users)/[\w.]",
}


def test_no_leaks_in_tracked_text():
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, git.stdout.split("\0")):
        p = ROOT / name
        try:
            text = p.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
        for what, pattern in LEAKS.items():
            hit = re.search(pattern, text)
            assert hit is None, (
                f"{name} names {what}: {text[max(0, hit.start() - 30) : hit.end() + 30]!r}"
            )


def test_leak_patterns():
    index, path = LEAKS.values()
    for s in (
        "https://files.python" + "hosted.org/x",
        "https://mirror.example/root/" + "simple/",
        "--index" + "-url x",
    ):
        assert re.search(index, s), s
    for s in ('"/ho' + 'me/me/x"', "open('/tm" + "p/x')", "/wo" + "rk/main"):
        assert re.search(path, s), s
    for s in ("runs/home/x", "a simple index", "https://example.org/work/x", "${HOME}/work/x"):
        assert not re.search(path, s) and not re.search(index, s), s
