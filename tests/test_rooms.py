"""The rooms of the house, read off the sources: who imports whom, how long a file is, what an import does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "llava_deploy"
FILES = [
    Path("cli.py"),
    *(
        path.relative_to(ROOT)
        for room in ("engines", "exporter", "runtime")
        for path in sorted((ROOT / room).rglob("*.py"))
    ),
]

GROUND_FLOOR = (
    *("contract", "manifest", "names", "errors", "integrity", "engine_manifest", "staging", "nibbles"),
    *("tensorrt_recipe", "tensorrt_module", "decoder_parts", "processor", "plain", "goldens", "rewriting", "arrays"),
    *("onnxruntime_module", "onnxruntime_cuda", "host_memory", "fitting"),
)
EXPORT_ONLY = {
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "ml_dtypes",
    "safetensors",
    "polygraphy",
    "peft",
}
NETWORK = {"aiohttp", "ftplib", "http", "httpx", "huggingface_hub", "requests", "socket", "socketserver", "urllib3"}
THIRD_PARTY = {
    "cli.py": {"click"},
    "engines": {"numpy"},
    "engines/lowering": {"numpy", "onnx_ir"},
    "runtime": {"numpy", "tokenizers", "PIL", "jinja2", "click", "rich", "zstandard"},
    "exporter": {"numpy", "tokenizers", "PIL", "jinja2", "click", "rich", *EXPORT_ONLY} - {"peft"},
}
RUNTIME_MAY = {f"{PACKAGE}.engines.{name}" for name in GROUND_FLOOR if name not in ("rewriting", "nibbles")}
ALONE_MAY = {
    "engines/onnxruntime_module.py": {"onnxruntime"},
    **{
        path: {"matplotlib"} for path in ("runtime/bench/plot.py", "runtime/report/figures.py", "runtime/report/svg.py")
    },
}
"""Beside what its room may import: matplotlib, where a user asks for it; ONNX Runtime, told first to report nothing."""

LISTENS = {"runtime/serve/sockets.py": {"socket"}}
"""Of what reaches the network, and why: a Unix socket is a file, and the one kind that is opened there."""

MEETS_RUNTIME = {
    "exporter/command_record.py": "declares record the way that every command is declared, and says what it did",
    "exporter/command_source.py": "declares options the way that every command declares them",
    "exporter/command_demo.py": "is a command of the command line",
    "exporter/command_verify.py": "is a command of the command line",
    "exporter/command_swap.py": "is a command of the command line",
    "exporter/recipes/chat_recipe.py": "has the runtime's parser read the template that it will render",
    "exporter/quantization/awq/calibration.py": "makes prompts the way that the runtime makes them",
    "exporter/quantization/awq/embeddings.py": "has the runtime's splice put the pictures in",
    "exporter/goldens/prompts.py": "takes built-in conversation formats, whose original is not installed, as they are",
    "exporter/verify.py": "compares PyTorch with what the runtime does",
    "exporter/tables.py": "says things in the words of the runtime's terminal",
    "exporter/demo/evaluate.py": "takes for right what the runtime's evaluation does",
    "exporter/demo/questions.py": "gives the questions in the form that the runtime evaluates",
    "exporter/demo/showcase.py": "is the demo: the whole way",
}
TORCH_FREE = ["cli.py", "exporter/demo/scenes.py", "exporter/demo/drawing.py", "exporter/demo/questions.py"]
"""Beside engines/ and runtime/: what runs in the base install."""

LLAVAS_OWN = ("exporter/reference/meta.py", "runtime/splice.py")
"""Raise NotImplementedError where LLaVA does: ``tune_mm_mlp_adapter`` with ``mm_use_im_start_end``."""

LONGEST = 300
LONGER = {"cli.py": 500}
"""One declaration a command: splitting it would part the commands from the options that they share."""


def name_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join((PACKAGE, *parts[: -1 if parts[-1] == "__init__" else None]))


MODULES = {name_of(path): path for path in FILES}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(node: ast.AST, *, inside: bool) -> Iterator[ast.AST]:
    """Everything below a node; ``inside`` functions too; never what only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if typing_only(child) or (not inside and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))):
            continue
        yield child
        yield from statements(child, inside=inside)


@cache
def imports(path: Path, *, inside: bool = True) -> frozenset[str]:
    """Full names of the modules that a file imports, ours down to the module."""
    found: set[str] = set()
    for node in statements(tree(path), inside=inside):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the package in full"
            base = node.module or ""
            below = {f"{base}.{alias.name}" for alias in node.names}
            found |= (below & MODULES.keys()) or {base}
    return frozenset(found)


def top(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def room(path: Path) -> str:
    return path.parts[0]


def lowers(path: Path) -> bool:
    """Whether a file is of the passes over graphs, which need the export extra."""
    return path.parts[:2] == ("engines", "lowering")


def loads(module: str, seen: set[str]) -> set[str]:
    """Top-level packages that importing one of our modules imports, through all of ours."""
    if module in seen or module not in MODULES:
        return set()
    seen.add(module)
    names = imports(MODULES[module], inside=False)
    packages = {".".join(module.split(".")[:end]) for end in range(1, module.count(".") + 1)}
    ours = {name for name in names | packages if name.startswith(PACKAGE)}
    return top(names).union(*(loads(name, seen) for name in ours))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_third_party_packages_of_each_room(path: Path) -> None:
    foreign = top(imports(path)) - sys.stdlib_module_names - {PACKAGE}
    allowed = THIRD_PARTY["engines/lowering" if lowers(path) else room(path)]
    assert foreign <= allowed | ALONE_MAY.get(str(path), set())


@pytest.mark.parametrize("name", GROUND_FLOOR)
def test_the_ground_floor_stands_on_nothing(name: str) -> None:
    names = imports(Path("engines", f"{name}.py"))
    alone = ALONE_MAY.get(f"engines/{name}.py", set())
    assert top(names) - sys.stdlib_module_names <= {"numpy", PACKAGE} | alone
    assert {n for n in names if n.startswith(PACKAGE)} <= {f"{PACKAGE}.engines.{floor}" for floor in GROUND_FLOOR}


@pytest.mark.parametrize("path", [path for path in FILES if room(path) == "runtime"], ids=str)
def test_the_runtime_knows_the_ground_floor_and_itself(path: Path) -> None:
    ours = {name for name in imports(path) if name.startswith(PACKAGE)}
    assert {name for name in ours if not name.startswith(f"{PACKAGE}.runtime")} <= RUNTIME_MAY


@pytest.mark.parametrize("path", [path for path in FILES if room(path) == "engines"], ids=str)
def test_engines_know_only_engines(path: Path) -> None:
    assert not {n for n in imports(path) if n.startswith(PACKAGE)} - {n for n in MODULES if ".engines." in n}


@pytest.mark.parametrize("path", [path for path in FILES if room(path) == "exporter"], ids=str)
def test_the_exporter_meets_the_runtime_in_few_places(path: Path) -> None:
    meets = any(name.startswith((f"{PACKAGE}.runtime", f"{PACKAGE}.cli")) for name in imports(path))
    assert meets == (str(path) in MEETS_RUNTIME)


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if (room(p) in ("engines", "runtime") and not lowers(p)) or str(p) in TORCH_FREE],
    ids=str,
)
def test_the_base_install_is_enough_for(path: Path) -> None:
    assert not loads(name_of(path), set()) & EXPORT_ONLY


def test_the_walk_sees_what_a_module_loads_through_others() -> None:
    assert "torch" in loads(f"{PACKAGE}.exporter.verify", set())
    assert "onnxscript" in loads(f"{PACKAGE}.exporter.export", set())
    assert "torch" not in top(imports(Path("exporter/sources/tensors.py"), inside=False))


@pytest.mark.parametrize("path", [p for p in FILES if lowers(p)], ids=str)
def test_lowering_needs_no_torch(path: Path) -> None:
    assert loads(name_of(path), set()) - sys.stdlib_module_names <= {"numpy", "onnx_ir", PACKAGE}


def test_help_needs_click_alone() -> None:
    assert loads(f"{PACKAGE}.cli", set()) - sys.stdlib_module_names == {"click", PACKAGE}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_is_fetched(path: Path) -> None:
    names = imports(path)
    assert not (top(names) & NETWORK) - LISTENS.get(str(path), set())
    assert not {name for name in names if name.startswith("urllib.") and name != "urllib.parse"}
    docstrings = {
        id(node.value)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    addresses = [
        node.value
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        if "http://" in node.value or "https://" in node.value
    ]
    assert addresses == []


@pytest.mark.parametrize("path", LISTENS, ids=str)
def test_what_listens_knows_no_address_of_the_network(path: str) -> None:
    made = [
        ast.unparse(node)
        for node in ast.walk(tree(Path(path)))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("socket.")
    ]
    assert made
    assert all(re.fullmatch(r"socket\.socket\(socket\.AF_UNIX, socket\.SOCK_(STREAM|DGRAM)\)", call) for call in made)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_is_short(path: Path) -> None:
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) < LONGER.get(str(path), LONGEST)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_is_left_to_be_done(path: Path) -> None:
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.ExceptHandler) or node.type is not None, f"line {node.lineno}: bare except"
        if isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node):
            assert str(path) in LLAVAS_OWN, f"line {node.lineno}: a stub"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_module_only_defines(path: Path) -> None:
    """No call for its effect and nothing set on another object, so that an import changes nothing but itself."""
    for node in tree(path).body:
        line = f"line {node.lineno}"
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) or typing_only(node):
            continue
        if isinstance(node, ast.If):
            assert ast.unparse(node.test) == "__name__ == '__main__'", line
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            written = node.targets if isinstance(node, ast.Assign) else [node.target]
            targets = [name for place in written for name in (place.elts if isinstance(place, ast.Tuple) else [place])]
            assert all(isinstance(target, ast.Name) for target in targets), line
        else:
            assert isinstance(node, ast.Expr), line
            lists = path == Path("cli.py") and re.fullmatch(r"main\.add_command\(\w+\)", ast.unparse(node.value))
            assert lists or isinstance(node.value, ast.Constant), line


def test_importing_the_base_install_changes_nothing(child_environment: dict[str, str]) -> None:
    """In a process that has the third-party packages already: what changes then is our doing."""
    base = ("cli.py", "engines", "runtime")
    names = sorted(name for name, path in MODULES.items() if room(path) in base and not lowers(path))
    script = f"""
import importlib, logging, os, sys, threading, warnings
import click, jinja2.sandbox, numpy, onnxruntime, PIL.Image, rich.progress, tokenizers, zstandard
def state():
    root = logging.getLogger()
    return {{
        "process": (dict(os.environ), os.getcwd(), os.umask(0o22), threading.active_count()),
        "interpreter": (sys.path[:], sys.meta_path[:], sys.excepthook, sys.getrecursionlimit()),
        "logging": (root.level, root.handlers[:], root.manager.disable, logging.lastResort),
        "warnings": warnings.filters[:],
        "libraries": (PIL.Image.MAX_IMAGE_PIXELS, numpy.geterr(), numpy.random.get_state()[1].tolist()),
    }}
state()
before = state()
for name in {names!r}:
    importlib.import_module(name)
    after = state()
    assert before == after, (name, [key for key in before if before[key] != after[key]])
"""
    run = [sys.executable, "-c", script]
    result = subprocess.run(run, check=False, capture_output=True, text=True, timeout=120, env=child_environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
