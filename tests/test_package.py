"""What is packaged, and that what is said twice is said the same."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import metastore
from metastore import _codec, _commit, _merge, format

ROOT = Path(__file__).resolve().parent.parent
EXTENSIONS = {"_codec": _codec, "_commit": _commit, "_merge": _merge}


def constants(module: object) -> dict[str, object]:
    """Return the public constants of a module."""
    return {
        name: value
        for name, value in vars(module).items()
        if re.fullmatch(r"[A-Z][A-Z0-9_]*", name)
    }


def run(*arguments: str) -> str:
    """Run a Python command in the root of the project and return what it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_constants_of_format_and_codec_agree() -> None:
    ours, theirs = constants(format), constants(_codec)
    shared = set(ours) & set(theirs)
    assert shared, "no constant stands in both: does the extension export any?"
    assert {name: ours[name] for name in shared} == {
        name: theirs[name] for name in shared
    }


@pytest.mark.parametrize("name", EXTENSIONS)
def test_the_extension_was_built_from_this_tree(name: str) -> None:
    file = EXTENSIONS[name].__file__
    assert file is not None
    assert Path(file).resolve().parent == ROOT / "metastore"
    # `make setup` rebuilds; a stale extension would make every other test lie.
    newest = max(
        path.stat().st_mtime
        for path in (ROOT / "metastore").iterdir()
        if path.name == f"{name}.pyx"
    )
    assert os.stat(file).st_mtime >= newest, "older than its source: run `make setup`"


def test_the_package_has_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert importlib.metadata.version("metastore") == project["version"]
    assert getattr(metastore, "__version__", project["version"]) == project["version"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^##.*\b{re.escape(project['version'])}\b", changes, re.M)


def test_the_script_is_installed() -> None:
    (script,) = importlib.metadata.entry_points(
        group="console_scripts", name="metastore"
    )
    assert script.value == "metastore.cli:main"
    assert callable(script.load())


def test_every_public_name_exists() -> None:
    assert sorted(set(metastore.__all__)) == sorted(metastore.__all__)
    for name in metastore.__all__:
        assert hasattr(metastore, name)


def test_the_import_is_light_and_silent() -> None:
    # A storage engine pays for what it uses: no progress bar, no command line.
    code = "import sys, metastore; print(*sys.modules)"
    loaded = set(run("-W", "error", "-c", code).split())
    assert loaded & {"metastore.cli", "metastore.demo", "tqdm"} == set()


def test_the_wheel_has_types_and_no_sources(tmp_path: Path) -> None:
    # `build_py` collects what a wheel holds beside the extensions.
    run("setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path))
    names = {
        path.relative_to(tmp_path).as_posix()
        for path in tmp_path.rglob("*")
        if path.is_file()
    }
    modules = {f"metastore/{path.name}" for path in (ROOT / "metastore").glob("*.py*")}
    modules = {name for name in modules if not name.endswith(".pyx")}
    assert "metastore/py.typed" in names
    assert {f"metastore/{name}.pyi" for name in EXTENSIONS} <= names
    assert names == modules | {"metastore/py.typed"}


def test_the_sdist_has_sources_and_no_c(tmp_path: Path) -> None:
    run("-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as members:
        names = {name.partition("/")[2] for name in members.getnames()}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("metastore/*.py*", "metastore/*.h", "tests/*.py", "docs/*.md")
        for path in ROOT.glob(pattern)
    }
    root = ("LICENSE", "Makefile", "README.md", "CHANGELOG.md", "pyproject.toml")
    assert wanted | {*root, ".ci/run", "setup.py", "noxfile.py"} <= names
    built = re.compile(r".*\.(?:c|cpp|o|so|py[co])|build/.*|.*__pycache__.*")
    assert {name for name in names if built.fullmatch(name)} == set()
