"""The layer rule of docs/design.md: imports point downward, durability has one home.

A function that is imported inside another, or only for type checkers, counts like any
other: what matters is who knows of whom.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "metastore"

#: From top to bottom. Modules that stand side by side do not know each other.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("demo",),
    ("demo_worker",),
    ("demo_files",),
    ("__init__",),
    ("store", "repair"),
    ("engine", "look", "repair_copy", "repair_report"),
    ("compaction", "salvage"),
    ("recovery",),
    ("snapshot", "log"),
    ("arguments", "frames"),
    ("columns",),
    ("quarantine", "report", "read_ahead"),
    ("directory",),
    ("format",),
    ("_codec", "_commit", "_merge"),
    ("errors", "pace", "parallel", "progress"),
    ("gate",),
)
HEIGHT = {
    module: len(LAYERS) - depth
    for depth, layer in enumerate(LAYERS)
    for module in layer
}

#: The demo writes a heap file of its own, as a program that uses metastore would, and
#: the commands write what they print: neither is a file of a store.
DURABILITY_EXEMPT = ("directory", "demo", "demo_files", "demo_worker", "cli")

#: Functions of ``os`` that create, change, sync, name or remove what is on a disk.
OS_DURABILITY = frozenset(
    [
        *("fdatasync", "fdopen", "fsync", "ftruncate", "link", "makedirs", "mkdir"),
        *("open", "posix_fadvise", "posix_fallocate", "pwrite", "pwritev", "remove"),
        *("removedirs", "rename", "renames", "replace", "rmdir", "symlink", "sync"),
        *("truncate", "unlink", "write", "writev"),
    ]
)
#: Modules whose every use is a durability call, or hides some.
DURABILITY_MODULES = frozenset(["fcntl", "mmap", "shutil", "tempfile"])
#: Methods of ``pathlib.Path`` that do the same.
PATH_DURABILITY = frozenset(["touch", "write_bytes", "write_text", "unlink", "rmdir"])


def sources(*suffixes: str) -> list[Path]:
    """Return the sources of the package, all or those of some suffixes."""
    wanted = suffixes or (".py", ".pyx")
    return sorted(path for path in PACKAGE.iterdir() if path.suffix in wanted)


def imported_by_python(tree: ast.AST) -> set[str]:
    """Return the modules of metastore that a syntax tree imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                origin = ".".join(["metastore", origin]).rstrip(".")
            names = [origin]
            if origin == "metastore":
                names = [f"metastore.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head == "metastore":
                found.add(rest.partition(".")[0] or "__init__")
    # `from metastore import MetadataStore` is an import of the package itself.
    return {name if name in HEIGHT else "__init__" for name in found}


def imported_by_cython(text: str) -> set[str]:
    """Return the modules of metastore that a Cython source imports or cimports."""
    pattern = r"^[ \t]*(?:from|import|cimport)[ \t]+(metastore[.\w]*|\.[.\w]*)"
    found = set()
    for name in re.findall(pattern, text, re.MULTILINE):
        module = name.removeprefix("metastore").lstrip(".").partition(".")[0]
        found.add(module or "__init__")
    return found


def imports(source: Path) -> set[str]:
    """Return the modules of metastore that a source imports."""
    text = source.read_text()
    if source.suffix == ".pyx":
        return imported_by_cython(text)
    return imported_by_python(ast.parse(text))


def durability_calls(tree: ast.AST) -> list[str]:
    """Return where a syntax tree touches the disk, as ``line: what``."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=name):
                if name in OS_DURABILITY:
                    found.append(f"{node.lineno}: os.{name}")
            case ast.Attribute(attr=name) if name in PATH_DURABILITY:
                found.append(f"{node.lineno}: .{name}")
            case ast.Call(func=ast.Name(id="open")):
                found.append(f"{node.lineno}: open()")
            case ast.Import(names=aliases):
                for alias in aliases:
                    if alias.name in DURABILITY_MODULES or (
                        alias.name == "os" and alias.asname
                    ):
                        found.append(f"{node.lineno}: import {alias.name}")
            case ast.ImportFrom(module=module, names=aliases):
                hidden = module == "os" and any(
                    alias.name in OS_DURABILITY or alias.name == "*"
                    for alias in aliases
                )
                if hidden or module in DURABILITY_MODULES:
                    found.append(f"{node.lineno}: from {module} import")
    return found


def private_names(tree: ast.AST) -> list[str]:
    """Return the private names that a syntax tree takes from other modules."""
    found = []
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
            "metastore"
        ):
            for alias in node.names:
                if alias.name in HEIGHT:
                    modules.add(alias.asname or alias.name)
                elif re.match(r"_(?!_)", alias.name):
                    found.append(f"{node.lineno}: {node.module}.{alias.name}")
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name):
                if module in modules and re.match(r"_(?!_)", name):
                    found.append(f"{node.lineno}: {module}.{name}")
    return found


def test_every_module_has_a_layer() -> None:
    # A new module must be given its place before anything can import it.
    assert {source.stem for source in sources()} <= set(HEIGHT)


def test_every_layer_has_its_modules() -> None:
    assert set(HEIGHT) <= {source.stem for source in sources()}


@pytest.mark.parametrize("source", sources(), ids=lambda path: path.name)
def test_imports_point_downward(source: Path) -> None:
    own = HEIGHT[source.stem]
    upward = {name for name in imports(source) if HEIGHT[name] >= own}
    assert not upward, f"{source.name} imports {sorted(upward)}: not below it"


@pytest.mark.parametrize("source", sources(".py"), ids=lambda path: path.name)
def test_no_private_names_of_a_neighbour(source: Path) -> None:
    assert private_names(ast.parse(source.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [path for path in sources(".py") if path.stem not in DURABILITY_EXEMPT],
    ids=lambda path: path.name,
)
def test_durability_calls_stand_in_directory(source: Path) -> None:
    assert durability_calls(ast.parse(source.read_text())) == []


#: What can create, change, sync, name or remove something on a disk, in C.
C_DURABILITY = re.compile(
    r"\b(close|creat|f?truncate|fallocate|fcntl|fdatasync|fopen|fsync|fwrite|link|mkdir"
    r"|mmap|msync|open|openat|pwrite|pwritev|remove|rename|renameat|rmdir|sendfile"
    r"|splice|sync|sync_file_range|unlink|unlinkat|write|writev) *\("
)


@pytest.mark.parametrize("source", sources(".pyx", ".h"), ids=lambda path: path.name)
def test_durability_calls_in_c(source: Path) -> None:
    # A group is written and synced without the GIL, to a file that directory.py opened
    # and will close: those two calls, and the one that has the system begin between
    # them, have this second home.
    allowed = {"pwritev", "fdatasync", "fcntl", "sync_file_range"}
    if source.stem != "_commit":
        allowed = set()
    text = re.sub(r"\b(def|cdef \w+) |\w\.", "#", source.read_text())
    called = {found for found in C_DURABILITY.findall(text) if f"#{found}" not in text}
    assert called == allowed


@pytest.mark.parametrize("source", sources(".pyx"), ids=lambda path: path.name)
def test_an_extension_is_a_leaf(source: Path) -> None:
    # Bytes and arrays in, bytes and arrays out: no files, no policy, no logging.
    text = source.read_text()
    forbidden = r"^[ \t]*(?:from|import|cimport)[ \t]+(os|io|logging|mmap|posix)\b"
    assert re.findall(forbidden, text, re.MULTILINE) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import metastore", {"__init__"}),
        ("import metastore.store as s", {"store"}),
        ("from metastore import MetadataStore", {"__init__"}),
        ("from metastore import _codec, format", {"_codec", "format"}),
        ("from metastore.log import x", {"log"}),
        ("from . import frames", {"frames"}),
        ("from .columns import Columns", {"columns"}),
        ("def f():\n    from metastore.cli import main", {"cli"}),
        ("import os, numpy", set()),
    ],
)
def test_the_import_parser(text: str, expected: set[str]) -> None:
    assert imported_by_python(ast.parse(text)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "import os\nos.open('a', 0)",
        "import os\nsync = os.fsync",
        "from os import rename",
        "from os import *",
        "import os as system",
        "import fcntl",
        "from shutil import move",
        "with open('a') as f: pass",
        "path.write_bytes(b'')",
    ],
)
def test_the_durability_parser_finds(text: str) -> None:
    assert len(durability_calls(ast.parse(text))) == 1


@pytest.mark.parametrize(
    "text",
    ["import os\nos.getpid()", "directory.open('a')", "import os\nos.path.join('a')"],
)
def test_the_durability_parser_passes(text: str) -> None:
    assert durability_calls(ast.parse(text)) == []


@pytest.mark.parametrize(
    ("text", "n_found"),
    [
        ("from metastore.log import _read", 1),
        ("from metastore import log\nlog._read()", 1),
        ("from metastore import _codec\n_codec.scan()", 0),
        ("from metastore import __version__", 0),
    ],
)
def test_the_private_name_parser(text: str, n_found: int) -> None:
    assert len(private_names(ast.parse(text))) == n_found
