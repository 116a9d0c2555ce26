"""The Python blocks of README.md run, in order, as a reader would type them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(?:python|py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(text: str) -> list[str]:
    return BLOCK.findall(text)


def test_the_blocks_of_the_readme_run(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = python_blocks(text)
    assert blocks, "README.md shows no Python"
    # One program: later blocks go on with the names of earlier ones. Each block stands
    # at its own line, so that a traceback points into README.md.
    program = [""] * (text.count("\n") + 1)
    for found in BLOCK.finditer(text):
        first = text.count("\n", 0, found.start(1))
        lines = found[1].splitlines()
        program[first : first + len(lines)] = lines
    script = tmp_path / "readme.py"
    script.write_text("\n".join(program), encoding="utf-8")
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=work,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def test_every_fence_is_closed():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n```") % 2 == 0


def test_the_block_finder():
    text = "a\n```python\nx = 1\n```\n```sh\nls\n```\n```python\ny = 2\n```\n"
    assert python_blocks(text) == ["x = 1\n", "y = 2\n"]
