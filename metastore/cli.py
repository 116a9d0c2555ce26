"""The commands: ``metastore info``, ``verify``, ``dump``, ``repair`` and ``demo``.

The first three only look: they take no lock and change nothing, so that they also work
on a read-only directory, and while a live store writes. Repair writes into a directory
of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import io
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from metastore import demo, repair
from metastore.errors import CorruptionError, MetastoreError
from metastore.format import FORMAT_VERSION
from metastore.look import (
    FileCheck,
    FileFacts,
    Overview,
    Verification,
    inspection,
    open_store,
    overview,
    until_steady,
    verification,
)
from metastore.parallel import default_threads
from metastore.progress import Progress
from metastore.report import printable

__all__ = ["main"]

EXIT_FINE = 0
EXIT_DAMAGE = 1
EXIT_ERROR = 2
#: What a shell reports for a process that SIGINT or SIGPIPE ended.
EXIT_INTERRUPTED = 130
EXIT_OUTPUT_CLOSED = 141

_EPILOG = """\
exit status:
  0    fine; if verify says on the standard error that a file is damaged which a
       snapshot contains, nothing is lost with it
  1    damage in the store, something lost or left out that repair could not save, or
       a difference found by the demo
  2    wrong usage, no store, or an error of the operating system
  130  interrupted
  141  nobody reads the output any more

info, verify and dump take no lock and change nothing: use them on a read-only
directory, or on a store that a process is writing to. repair reads DIR in the same way,
and writes only into DEST."""

_REPAIR = """\
Saves what is provably whole from a damaged store into a new one. DIR is only read.
DEST, which must be missing or empty, gets

  quarantine/original   a copy of every file in DIR and DIR/quarantine, made first
  snapshot_...          the new store; it opens as any other

By default every batch is saved whose frame is whole, also behind missing ones, and
every whole block of a damaged snapshot. That is the most that can be saved, but it may
be a state that the store never had: a record that a lost batch changed or deleted is as
it was before. What is missing is named by sequence, offset and range of keys.

With --prefix only the longest run of batches is saved of which none is missing: a state
that the store had. A torn tail, never acknowledged, is not saved either way."""


# ---- info ----


def _info(arguments: argparse.Namespace) -> int:
    with open_store(arguments.directory) as directory:
        found = until_steady(directory, overview)
    for line in _overview_lines(found):
        print(line)
    return _judge(found.damage)


def _overview_lines(found: Overview) -> Iterator[str]:
    store_id = found.store_id.hex() if found.store_id else "not given yet"
    yield f"store       {store_id}, format version {FORMAT_VERSION}"
    yield f"lock        {_holder(found.holder_pid)}"
    rows = [["file", "number", "bytes", "batches", "records", "state", "created"]]
    rows += map(_facts_row, found.files)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, widths, strict=True)
        yield "  ".join(cell.ljust(width) for cell, width in cells).rstrip()
    yield from _listing_lines(found.listing.temporaries, found.listing.unknown)
    yield from _quarantine_lines(found.quarantined_sizes)


def _facts_row(facts: FileFacts) -> list[str]:
    return [
        str(facts.name),
        str(facts.name.number),
        f"{facts.size:,}",
        _batches(facts.first_sequence, facts.last_sequence),
        "" if facts.n_records is None else f"{facts.n_records:,}",
        facts.state,
        "" if facts.created_ns is None else _time(facts.created_ns),
    ]


def _batches(first: int | None, last: int | None) -> str:
    if first is None:
        return "" if last is None else f"up to {last:,}"
    if last is None:
        return f"from {first:,}"
    if last < first:
        return f"none before {first:,}"
    return f"{first:,} to {last:,}"


def _time(nanoseconds: int) -> str:
    try:
        time = datetime.datetime.fromtimestamp(nanoseconds // 10**9, datetime.UTC)
    except (OverflowError, ValueError):  # a claim of the file, for people only
        return f"{nanoseconds} ns"
    return time.strftime("%Y-%m-%d %H:%M:%S UTC")


def _holder(pid: int | None) -> str:
    # Not every system tells, so that nobody known is not nobody.
    return "no known holder" if pid is None else f"held by process {pid}"


def _listing_lines(temporaries: Sequence[str], unknown: Sequence[str]) -> Iterator[str]:
    for name in temporaries:
        yield f"temporary   {name}"
    for name in unknown:
        yield f"unknown     {printable(name)}"


def _quarantine_lines(sizes: Sequence[int]) -> Iterator[str]:
    if sizes:
        yield f"quarantine  {demo.counted(len(sizes), 'file')}, {sum(sizes):,} bytes"


# ---- verify ----


def _verify(arguments: argparse.Namespace) -> int:
    with (
        open_store(arguments.directory) as directory,
        Progress("reading", 0, "bytes") as progress,
    ):
        found = verification(directory, default_threads(), progress.report)
    if arguments.json:
        print(json.dumps(_verification_json(found), indent=2))
    else:
        for line in _verification_lines(found):
            print(line)
    for check in found.damaged_contained:
        _complain(f"{check.damage}: no loss, {check.contained_in} contains this file")
    return _judge(found.damage)


def _verification_lines(found: Verification) -> Iterator[str]:
    for check in found.files:
        yield f"{check.name}  {check.size:,} bytes"
        yield f"  checked {check.checked}"
        if check.contained_in is not None:
            yield f"  not needed: {check.contained_in} contains this file"
        if check.damage is not None:
            yield f"  damaged at offset {check.damage.offset}: {check.damage.reason}"
        for gap in check.gaps:
            where = f"{gap.size:,} bytes at offset {gap.offset}"
            yield f"  not whole: {where}: {gap.reason}"
    yield from _listing_lines(found.temporaries, found.unknown)
    yield from _quarantine_lines(found.quarantined_sizes)
    if found.damage is not None:
        yield "damaged: recovery refuses this store"
        return
    yield (
        f"sound: {found.n_records:,} records with {found.user_data_size:,} bytes of "
        f"user data, up to batch {found.sequence:,}"
    )
    if found.torn is not None and found.holder_pid is not None:
        yield f"process {found.holder_pid} may be writing that torn tail right now"
    elif found.torn is not None:
        yield "the torn tail was never acknowledged; recovery drops it"


def _verification_json(found: Verification) -> dict[str, object]:
    return {
        "path": found.path,
        "sound": found.damage is None,
        "damage": _damage_json(found.damage),
        "n_records": found.n_records,
        "user_data_size": found.user_data_size,
        "sequence": found.sequence,
        "torn": found.torn
        and {
            "name": str(found.torn[0]),
            "offset": found.torn[1],
            "size": found.torn[2],
        },
        "files": [_check_json(check) for check in found.files],
        "temporaries": list(found.temporaries),
        "unknown": list(found.unknown),
        "n_quarantined": len(found.quarantined_sizes),
        "quarantined_size": sum(found.quarantined_sizes),
        "holder_pid": found.holder_pid,
    }


def _check_json(check: FileCheck) -> dict[str, object]:
    return {
        "name": str(check.name),
        "kind": check.name.kind,
        "number": check.name.number,
        "size": check.size,
        "checked": check.checked,
        "n_batches": check.n_batches,
        "n_records": check.n_records,
        "damage": _damage_json(check.damage),
        "gaps": [dataclasses.asdict(gap) for gap in check.gaps],
        "contained_in": check.contained_in and str(check.contained_in),
    }


def _damage_json(damage: CorruptionError | None) -> dict[str, object] | None:
    if damage is None:
        return None
    return {"path": damage.path, "offset": damage.offset, "reason": damage.reason}


# ---- dump ----


def _dump(arguments: argparse.Namespace) -> int:
    with (
        open_store(arguments.directory) as directory,
        Progress("reading", 0, "bytes") as progress,
    ):
        found = inspection(directory, default_threads(), progress.report)
    if found.recovered is None:
        return _judge(found.damage)
    line = (
        '{{"key": {}, "value": {}, "user_data": "{}"}}\n'
        if arguments.json
        else ("{} {} {}\n")
    )
    for key, value, user_data in itertools.islice(found.recovered, arguments.limit):
        sys.stdout.write(line.format(key, value, user_data.hex()))
    return EXIT_FINE


# ---- repair ----


def _repair(arguments: argparse.Namespace) -> int:
    with Progress("copying", 0, "bytes") as progress:
        report = repair.repair(
            arguments.directory,
            arguments.destination,
            prefix_only=arguments.prefix,
            progress=progress.report,
        )
    if arguments.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        print(report)
    return EXIT_FINE if report.is_complete else EXIT_DAMAGE


# ---- demo ----


def _demo(arguments: argparse.Namespace) -> int:
    return demo.run(
        arguments.tree,
        directory=arguments.directory,
        threads=arguments.threads,
        kills=arguments.kills,
        keep=arguments.keep,
        seed=arguments.seed,
    )


# ---- arguments ----


def _number(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        if value > sys.maxsize:  # more than Python can count to in a loop
            raise argparse.ArgumentTypeError(f"{value} is more than {sys.maxsize}")
        return value

    return number


class _Commands:
    """Adds commands to a parser, all of them in one shape."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(
        self,
        name: str,
        run: Callable[[argparse.Namespace], int],
        help_line: str,
        *examples: str,
    ) -> argparse.ArgumentParser:
        """Add a command and return it for its arguments."""
        listed = "\n".join(
            f"  metastore {name} {example}".rstrip() for example in examples
        )
        command = self._commands.add_parser(
            name,
            help=help_line,
            description=f"{help_line[0].upper()}{help_line[1:]}.",
            epilog=f"examples:\n{listed}\n\n{_EPILOG}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="metastore",
        description="A durable map for storage engines in Python: look into a store's\n"
        "directory, or watch one survive a killed process.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = _Commands(parser)
    _add_looks(commands)
    _add_repair(commands)
    _add_demo(commands)
    return parser


def _add_looks(commands: _Commands) -> None:
    info = commands.add(
        "info", _info, "list the files of a store, without reading its records", "db"
    )
    verify = commands.add(
        "verify",
        _verify,
        "read everything in a store and say of each file what was checked",
        "db",
        "--json db | jq .sound",
    )
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    dump = commands.add(
        "dump",
        _dump,
        "print the records, sorted by key: key, value and user data in hex",
        "db",
        "--json --limit 10 db",
    )
    dump.add_argument("--json", action="store_true", help="print a JSON object a line")
    dump.add_argument(
        "--limit", type=_number(0), metavar="N", help="stop after N records"
    )
    for command in (info, verify, dump):
        command.add_argument("directory", metavar="DIR", help="the store's directory")


def _add_repair(commands: _Commands) -> None:
    command = commands.add(
        "repair",
        _repair,
        "save what is whole in a damaged store into a new one",
        "db db-repaired",
        "--prefix --json db db-repaired | jq .missing",
    )
    command.description = _REPAIR
    command.add_argument(
        "--prefix",
        action="store_true",
        help="save nothing that lies behind a missing batch",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("directory", metavar="DIR", help="the damaged store")
    command.add_argument(
        "destination", metavar="DEST", help="a directory that is missing or empty"
    )


def _add_demo(commands: _Commands) -> None:
    command = commands.add(
        "demo",
        _demo,
        "store real files, kill the process that does it, and compare every byte",
        "",
        "--kills 5 --threads 16 /usr/share",
    )
    command.add_argument(
        "tree",
        metavar="TREE",
        nargs="?",
        help="directory whose files are stored (default: Python's standard library)",
    )
    command.add_argument(
        "--directory",
        metavar="DIR",
        help="a new or empty directory to work in, which is kept (default: a temporary "
        "one, which is removed)",
    )
    command.add_argument(
        "--threads",
        type=_number(1),
        default=8,
        metavar="N",
        help="threads that commit (default: %(default)s)",
    )
    command.add_argument(
        "--kills",
        type=_number(0),
        default=1,
        metavar="N",
        help="how often the process is killed (default: %(default)s)",
    )
    command.add_argument(
        "--keep", action="store_true", help="keep the temporary directory"
    )
    command.add_argument(
        "--seed",
        type=_number(0),
        metavar="N",
        help="kill where the run that printed this seed did",
    )


# ---- main ----


def _complain(text: str) -> None:
    # Where nobody reads it, the exit status still has to tell.
    try:
        print(f"metastore: {printable(text)}", file=sys.stderr, flush=True)
    except OSError:
        _give_up(sys.stderr)


def _judge(damage: MetastoreError | None) -> int:
    if damage is None:
        return EXIT_FINE
    _complain(str(damage))
    return EXIT_DAMAGE


def _text(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, OSError) and not isinstance(error, MetastoreError):
        name = error.filename  # a number where a descriptor was given
        where = f" ({os.fsdecode(name)})" if isinstance(name, str | bytes) else ""
        return f"{error.strerror or error}{where}"
    return str(error)


def _open_streams() -> None:
    """Put the null device in the place of the streams that the caller closed.

    Descriptors first: else a file of a store gets that to which a library in C, or
    Python as it ends, writes its errors.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest that is free
    if sys.stdout is None:
        sys.stdout = _stream(1)
    if sys.stderr is None:
        sys.stderr = _stream(2)


def _stream(descriptor: int) -> TextIO:
    return open(descriptor, "w", encoding="utf-8", closefd=False)


def _close_output() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        _give_up(sys.stdout)


def _give_up(stream: TextIO) -> None:
    """Forget output that cannot be written, or Python complains when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command line without the program's name; default is that of the process.
    """
    # What a recovery dropped is part of the output; an error is told once.
    logging.getLogger("metastore").addHandler(logging.NullHandler())
    _open_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files are bytes: not each is text, or text that this output can say.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        parsed = _parser().parse_args(arguments)
        status: int = parsed.run(parsed)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return EXIT_OUTPUT_CLOSED
    except CorruptionError as error:
        _complain(_text(error))
        return EXIT_DAMAGE
    except (MetastoreError, OSError, MemoryError) as error:
        _complain(_text(error))
        return EXIT_ERROR
    finally:
        _close_output()
