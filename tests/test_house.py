"""House rules that a linter does not know."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "metastore"

FUNCTION_LINES_MAX = 69

#: One word per concept; each of these is another project's word for one of ours. Words
#: that also have a right use (flush, item, merge, payload, row) are left to the reader.
WORDS = {
    "blob": "user_data",
    "blobs": "user_data",
    "checkpoint": "snapshot",
    "checkpoints": "snapshots",
    "entries": "records",
    "entry": "record",
    "journal": "log",
    "segment": "log",
    "segments": "logs",
    "tombstones": "deletes",
    "wal": "log",
}

#: Each of these must say which rule it silences, and why.
SILENCER = re.compile(r"#\s*(?:noqa|type:\s*ignore|no-cython-lint|pragma: no cover)")
SILENCER_WITH_REASON = re.compile(
    r"#\s*(?:noqa:\s*[A-Z]+\d+(?:,\s*[A-Z]+\d+)*|type:\s*ignore\[[\w,\s-]+\]"
    r"|no-cython-lint|pragma: no cover)\s*(?:#|-|:|\()\s*\w.{5,}"
)


def files(*patterns: str, top: tuple[str, ...] = ()) -> list[Path]:
    """Return the files of our own folders, and of the root, that match."""
    found: list[Path] = []
    for folder in top or ("metastore", "tests", "benchmarks", "docs"):
        for pattern in patterns:
            found.extend((ROOT / folder).rglob(pattern))
    if not top:
        for pattern in patterns:
            found.extend(ROOT.glob(pattern))
    return sorted(path for path in found if "_build" not in path.parts)


def relative(path: Path) -> str:
    """Return the name of a test case."""
    return path.relative_to(ROOT).as_posix()


PYTHON = files("*.py", "*.pyi")
CODE = files("*.py", "*.pyi", "*.pyx", "*.h")
TEXT = [*CODE, *files("*.md", "*.toml", "*.in", "Makefile")]


def python_functions(text: str) -> Iterator[tuple[str, int]]:
    """Yield the name and the number of lines of each function.

    A docstring does not count: it tells about parameters, not of a second idea.
    """
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            n_lines = node.end_lineno - node.lineno + 1
            first = node.body[0]
            if ast.get_docstring(node, clean=False) is not None:
                assert first.end_lineno is not None
                n_lines -= first.end_lineno - first.lineno + 1
            yield node.name, n_lines


def cython_functions(text: str) -> Iterator[tuple[str, int]]:
    """Yield the same of a Cython source, where indentation tells a function's end."""
    lines = re.sub(r'"""[\s\S]*?"""', '"""', text).splitlines()
    head = re.compile(r"^(\s*)(?:def|cdef|cpdef)\s[^=]*?(\w+)\s*\(")
    for start, line in enumerate(lines):
        match = head.match(line)
        if match is None:
            continue
        indent = len(match[1])
        last = start
        for at in range(start + 1, len(lines)):
            text_at = lines[at].strip()
            if not text_at or text_at.startswith("#"):
                continue
            # A closing bracket of the signature stands as far left as its def.
            if len(lines[at]) - len(lines[at].lstrip()) <= indent and text_at[0] != ")":
                break
            last = at
        yield match[2], last - start + 1


def c_functions(text: str) -> Iterator[tuple[str, int]]:
    """Yield the same of C, where a function ends at the next brace in column 0."""
    start, name = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        match = re.match(r"^\w.*?(\w+)\(", line)
        if match is not None:
            start, name = number, match[1]
        elif line.startswith("}") and name:
            yield name, number - start + 1
            name = ""


def functions(path: Path) -> list[tuple[str, int]]:
    """Return the name and the number of lines of each function of a file."""
    parse = {".pyx": cython_functions, ".h": c_functions}
    return list(parse.get(path.suffix, python_functions)(path.read_text()))


def defined_names(tree: ast.AST) -> Iterator[str]:
    """Yield the identifiers that a module gives, not those that it only uses."""
    for node in ast.walk(tree):
        match node:
            case (
                ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.arg(arg=name)
                | ast.Name(id=name, ctx=ast.Store())
                | ast.Attribute(attr=name, ctx=ast.Store())
            ):
                yield name


def words(name: str) -> set[str]:
    """Split an identifier, of either case, into its words."""
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))


def identifiers(path: Path) -> set[str]:
    """Return the identifiers that a source of the package defines."""
    text = path.read_text()
    if path.suffix in (".py", ".pyi"):
        return set(defined_names(ast.parse(text)))
    # Cython and C have no parser here: every word outside comments and strings.
    bare = re.sub(
        r'"""[\s\S]*?"""|/\*[\s\S]*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'',
        " ",
        text,
    )
    bare = re.sub(r"(?:#(?!\s*(?:define|undef))|//).*", " ", bare)
    return set(re.findall(r"[A-Za-z_]\w*", bare))


@pytest.mark.parametrize("path", TEXT, ids=relative)
def test_ascii(path: Path) -> None:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        assert line.isascii(), f"{relative(path)}:{number}: {line!r}"


@pytest.mark.parametrize("path", TEXT, ids=relative)
def test_lines_end_plainly(path: Path) -> None:
    data = path.read_bytes()
    assert b"\r" not in data
    assert data.endswith(b"\n") or not data
    for number, line in enumerate(data.split(b"\n"), 1):
        assert line == line.rstrip(), f"{relative(path)}:{number}: space at the end"
        if path.name != "Makefile":
            assert b"\t" not in line, f"{relative(path)}:{number}: a tab"


@pytest.mark.parametrize("path", CODE, ids=relative)
def test_functions_are_short(path: Path) -> None:
    long = [
        f"{name}: {n_lines} lines"
        for name, n_lines in functions(path)
        if n_lines > FUNCTION_LINES_MAX
    ]
    assert long == []


@pytest.mark.parametrize(
    "path", files("*.py", "*.pyi", "*.pyx", "*.h", top=("metastore",)), ids=relative
)
def test_words(path: Path) -> None:
    wrong = {
        name: WORDS[word]
        for name in identifiers(path)
        for word in words(name) & set(WORDS)
    }
    assert wrong == {}, "one word per concept; the value is ours"


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_silenced_rules_have_a_reason(path: Path) -> None:
    with path.open("rb") as source:
        for token in tokenize.tokenize(source.readline):
            if token.type == tokenize.COMMENT and SILENCER.search(token.string):
                assert SILENCER_WITH_REASON.search(token.string), (
                    f"{relative(path)}:{token.start[0]}: {token.string}"
                )


@pytest.mark.parametrize("path", TEXT, ids=relative)
def test_nothing_is_put_off(path: Path) -> None:
    marks = "|".join(["TO" + "DO", "FIX" + "ME", "HA" + "CK", "X" + "XX"])
    assert re.findall(rf"\b(?:{marks})\b", path.read_text()) == []


@pytest.mark.parametrize("path", files("*.py", top=("tests",)), ids=relative)
def test_no_test_sleeps(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Attribute(attr="sleep") | ast.Name(id="sleep")):
                pytest.fail(
                    f"{relative(path)}:{node.lineno}: wait for an event instead"
                )


def test_no_generated_c_in_the_package() -> None:
    assert sorted(PACKAGE.rglob("*.c")) == []


def test_the_design_names_every_module() -> None:
    design = (ROOT / "docs" / "design.md").read_text()
    modules = {
        path.name
        for path in files("*.py", "*.pyx", "*.h", top=("metastore",))
        if path.name != "__init__.py"
    }
    assert {name for name in modules if name not in design} == set()


def test_relative_links_lead_somewhere() -> None:
    for path in files("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            if not re.match(r"\w+:", target):
                assert (path.parent / target).exists(), f"{relative(path)}: {target}"


def test_the_function_parsers() -> None:
    python = 'def f(\n    a,\n):\n    """One.\n\n    Two.\n    """\n    return a\n'
    cython = (
        'cdef inline int f(\n    int a,\n) noexcept nogil:\n    """Say."""\n'
        "    return a\n\n\ndef g():\n    pass\n\ncdef int x = h(3)\n"
    )
    c = "static int f(int a,\n             int b)\n{\n    return a + b;\n}\n\nint x;\n"
    assert list(python_functions(python)) == [("f", 4)]
    assert list(cython_functions(cython)) == [("f", 5), ("g", 2)]
    assert list(c_functions(c)) == [("f", 5)]


@pytest.mark.parametrize(
    ("comment", "enough"),
    [
        ("# noqa", False),
        ("# noqa: E501", False),
        ("# noqa: E501 - a table reads better whole", True),
        ("# type: ignore", False),
        ("# type: ignore[arg-type]", False),
        ("# type: ignore[arg-type]  # wrong on purpose", True),
    ],
)
def test_the_silencer_pattern(comment: str, enough: bool) -> None:
    assert SILENCER.search(comment)
    assert bool(SILENCER_WITH_REASON.search(comment)) is enough


def test_the_word_splitter() -> None:
    assert words("LogFile_size") == {"log", "file", "size"}
    assert words("n_entries") & set(WORDS)


def test_comments_are_read_as_comments() -> None:
    # Guards the guard above: tokenize gives comments, never strings that look alike.
    source = io.BytesIO(b'x = "# noqa"  # said\n')
    comments = [
        token.string
        for token in tokenize.tokenize(source.readline)
        if token.type == tokenize.COMMENT
    ]
    assert comments == ["# said"]
