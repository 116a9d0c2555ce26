"""The count of instructions, judged on what callgrind_annotate once said."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

if importlib.util.find_spec("benchmarks") is None:
    pytest.skip("only the repository has the benchmarks", allow_module_level=True)

from benchmarks import instructions

#: Compares recorded instructions with a baseline and its environment.
Compared = Callable[[dict[str, int], dict[str, str]], int]

ANNOTATED = """\
--------------------------------------------------------------------------------
Ir                   file:function
--------------------------------------------------------------------------------
962,054,674 (100.0%)  PROGRAM TOTALS
  1,078,399 ( 0.11%)  build/_merge.c:__pyx_pw_9metastore_6_merge_23merge_into [a.so]
    150,774 ( 0.02%)  build/_merge.c:__pyx_pw_9metastore_6_merge_7scatter [a.so]
    159,014 ( 0.02%)  _commit.c:__pyx_pw_9metastore_7_commit_11GroupCommit_11exclusively
     92,100 ( 0.01%)  include/object.h:__pyx_pw_9metastore_6_merge_23merge_into
     86,307 ( 0.01%)  build/_codec.c:__pyx_pw_9metastore_6_codec_21check_payload [a.so]
     82,193 ( 0.01%)  build/_commit.c:__pyx_pw_9metastore_7_commit_11GroupCommit_9commit
      1,727 ( 0.00%)  build/_codec.c:__pyx_pw_9metastore_6_codec_1crc32c [a.so]
     12,004 ( 0.00%)  Python/ceval.c:_PyEval_EvalFrameDefault [libpython.so]
"""
ENVIRONMENT = {"architecture": "x86_64", "compiler": "a compiler", "cython": "3.3.1"}
RECORDED = {
    "_codec.check_payload": 86_307,
    "_codec.crc32c": 1_727,
    "_commit.commit": 82_193,
    "_merge.merge_into": 1_078_399,
    "_merge.scatter": 150_774,
}


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compared:
    """Compare the recorded text with a baseline; the exit status."""
    baseline = tmp_path / "instructions.json"
    monkeypatch.setattr(instructions, "_BASELINE", baseline)
    monkeypatch.setattr(instructions, "_environment", lambda: ENVIRONMENT)
    monkeypatch.setattr(instructions, "count", lambda: instructions._kernels(ANNOTATED))

    def compare(counts: dict[str, int], environment: dict[str, str]) -> int:
        content = {"environment": environment, "instructions": counts}
        baseline.write_text(json.dumps(content))
        return instructions.main([])

    return compare


def test_equal_instructions_are_no_regression(compared, capsys):
    assert compared(RECORDED, ENVIRONMENT) == 0
    said = capsys.readouterr().out
    assert "dearer" not in said
    assert said.count("(+0.0%)") == len(RECORDED)


@pytest.mark.parametrize(
    ("factor", "status"), [(1.03, 1), (1.01, 0), (0.99, 0), (0.5, 0)]
)
def test_a_dearer_kernel_is_a_regression(compared, capsys, factor, status):
    """By more than the tolerance of 2%; the baseline is what moves here."""
    before = {
        **RECORDED,
        "_merge.merge_into": round(RECORDED["_merge.merge_into"] / factor),
    }
    assert compared(before, ENVIRONMENT) == status
    assert ("  dearer" in capsys.readouterr().out) == (status == 1)


@pytest.mark.parametrize(("before", "status"), [(1_685, 0), (1_600, 1)])
def test_a_few_instructions_are_no_regression(compared, before, status):
    """The guard failed by 42 of 1,685 instructions that depend on the addresses."""
    assert compared({**RECORDED, "_codec.crc32c": before}, ENVIRONMENT) == status


def test_a_kernel_that_is_new_or_gone_is_told(compared, capsys):
    assert compared({"_codec.gone": 1, **RECORDED}, ENVIRONMENT) == 1
    assert "_codec.gone: gone" in capsys.readouterr().out


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_another_compiler_is_not_comparable(compared, capsys, name):
    assert compared(RECORDED, {**ENVIRONMENT, name: "another"}) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "the baseline is not comparable" in said.err
    assert f"{name} another there, {ENVIRONMENT[name]} here" in said.err


def test_without_valgrind_nothing_is_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(instructions, "_BASELINE", tmp_path / "instructions.json")
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    assert instructions.main(["--record"]) == 2
    assert "valgrind is not installed" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
