"""Stores that somebody forged: hostile claims under checksums that agree.

Everything is built with ``oracle`` from one random generator, so that a seed gives the
same bytes again. A forged part is put in before the checksums around it are made; what
comes last, raw noise, leaves them wrong.
"""

from __future__ import annotations

import bisect
import dataclasses
import random
import struct
from collections.abc import Callable, Sequence

import oracle
from oracle import (
    BATCH,
    BLOCK,
    CONSTANT,
    DELTA,
    END,
    FILE_HEADER,
    FRAME_HEADER,
    NO_FILTER,
    RAW,
    ZSTD,
    ColumnChoice,
    PackedColumn,
    Payload,
    Record,
    Section,
)

Files = dict[str, bytes]

#: Where sizes, counts and sequences break: at the edges of what holds them.
EDGES = sorted(
    {
        max(0, 2**bits + step)
        for bits in (0, 3, 6, 15, 16, 26, 31, 32, 33, 60, 61, 62, 63, 64)
        for step in (-48, -8, -1, 0, 1)
    }
    | {48, 64, 2**64 // 20, 2**64 // 20 + 1, 2**64 // 40 + 1, 2**32 // 20 + 1}
)
#: Biggest blocks of a zstd frame, and how many bytes a run of one byte may have.
ZSTD_RUN_MAX = 1 << 17


def edge(rng: random.Random, bits: int, near: int | None = None) -> int:
    """Return a number below 2**bits at an edge, or next to `near`."""
    if near is not None and rng.random() < 0.4:
        return (near + rng.choice([-8, -1, 1, 8])) % 2**bits
    return EDGES[rng.randrange(bisect.bisect_left(EDGES, 2**bits))]


# ---- zstd ----


def zstd_frame(
    claimed: int | None,
    blocks: Sequence[tuple[int, int, bytes]],
    *,
    window: int | None = None,
    dictionary: int = 0,
    checksum: bytes = b"",
) -> bytes:
    """Return a zstd frame as its parts say, true or not.

    `claimed` is the content size; blocks are type (0 raw, 1 run, 2 compressed, 3 none),
    size and bytes; `window` is the byte that describes it, without which the frame is a
    single segment.
    """
    single = window is None
    code = 0 if claimed is None else 3
    descriptor = (
        code << 6 | single << 5 | bool(checksum) << 2 | (3 if dictionary else 0)
    )
    frame = oracle.ZSTD_MAGIC + bytes([descriptor])
    frame += b"" if window is None else bytes([window])
    frame += struct.pack("<I", dictionary) if dictionary else b""
    if claimed is not None:
        frame += struct.pack("<Q", claimed)
    elif single:
        frame += b"\xff"  # a single segment has at least one byte of content size
    for i, (kind, size, data) in enumerate(blocks):
        last = i + 1 == len(blocks)
        frame += (last | kind << 1 | size << 3).to_bytes(3, "little") + data
    return frame + checksum


def runs(size: int) -> list[tuple[int, int, bytes]]:
    """Return the blocks of `size` bytes that are all the same."""
    whole, rest = divmod(size, ZSTD_RUN_MAX)
    return [(1, ZSTD_RUN_MAX, b"\x01")] * whole + [(1, rest, b"\x01")]


def hostile_zstd(rng: random.Random, data: bytes) -> bytes:
    """Return what stands in the place of the zstd frame of `data`."""
    size = len(data)
    valid = oracle.pack_zstd(data)
    skippable = struct.pack("<II", 0x184D2A50 + rng.randrange(16), 3) + b"skp"
    makers: list[Callable[[], bytes]] = [
        lambda: valid,
        lambda: zstd_frame(size, runs(size)),
        lambda: zstd_frame(size, runs(size * rng.choice([2, 100, 10_000]))),
        lambda: zstd_frame(size, runs(size // 2)),
        lambda: zstd_frame(edge(rng, 64, size), runs(size)),
        lambda: zstd_frame(size, [(1, size + 1, b"a"), (1, max(0, size - 1), b"b")]),
        lambda: zstd_frame(size, [(rng.randrange(4), edge(rng, 21, size), data[:9])]),
        lambda: zstd_frame(size, runs(size), window=rng.randrange(256)),
        lambda: zstd_frame(None, runs(size), window=rng.choice([None, 0, 0x58, 255])),
        lambda: zstd_frame(size, runs(size), dictionary=rng.choice([1, 2**32 - 1])),
        lambda: zstd_frame(size, runs(size), checksum=rng.randbytes(4)),
        lambda: valid[: rng.randrange(len(valid))],
        lambda: valid + valid,
        lambda: skippable + valid,
        lambda: valid + skippable,
        lambda: valid + bytes(rng.randrange(1, 9)),
        lambda: noise(rng, valid),
        lambda: b"",
    ]
    return rng.choice(makers)()


# ---- records and payloads ----


def records(rng: random.Random, *, block: bool) -> list[Record]:
    """Return a few records; those of a block are sorted and without deletions."""
    n = rng.choice([1, 1, 2, 3, 5, 9, 24, 120] + ([] if block else [0]))
    near = rng.choice([0, 0, 2**32, 2**63, 2**64 - 4 * n - 8])
    keys = [near + rng.randrange(4 * n + 1) for _ in range(n)]
    if block:
        keys = sorted(set(keys))
    width = rng.choice([None, 0, 1, 2, 8, 64, 65])
    made = []
    for key in keys:
        value = edge(rng, 64) if rng.random() < 0.2 else rng.randrange(1, 100)
        value = max(value, 1)
        size = rng.randrange(20) if width is None else width
        if not block and rng.random() < 0.2:
            value, size = 0, 0
        fill = rng.choice([bytes([rng.randrange(4)]) * size, rng.randbytes(size)])
        made.append((key, value, fill))
    return made


def choice(rng: random.Random, which: int) -> ColumnChoice:
    """Choose how one column is packed."""
    filters = [NO_FILTER] if which >= oracle.LENGTHS else [NO_FILTER, DELTA]
    encodings = [rng.choice([CONSTANT, RAW, ZSTD]) for _ in range(rng.randrange(1, 5))]
    return ColumnChoice(rng.choice(filters), rng.random() < 0.5, encodings)


def payload(rng: random.Random, hostility: float, *, block: bool) -> Payload:
    """Return a payload that is valid, or forged with the probability `hostility`."""
    made = records(rng, block=block)
    forged = rng.random() < hostility
    if rng.random() < 0.5 or not made:
        plain = oracle.pack_plain(made)
        return forged_plain(rng, plain) if forged else plain
    columns = oracle.packed_columns(made, [choice(rng, which) for which in range(4)])
    size = sum(len(user_data) for _, _, user_data in made)
    packed = Payload(oracle.PACKED, len(made), size, oracle.join_packed(columns))
    return forged_packed(rng, packed, columns) if forged else packed


def forged_counts(rng: random.Random, payload: Payload) -> Payload:
    """Let the frame header claim other records or user data."""
    what = rng.randrange(4)
    if what == 0:
        return dataclasses.replace(payload, n_records=edge(rng, 32, payload.n_records))
    if what == 1:
        size = edge(rng, 64, payload.user_data_size)
        return dataclasses.replace(payload, user_data_size=size)
    if what == 2:  # both, so that their sum wraps to what is there
        n = rng.choice([2**31, 2**32 - 1, rng.randrange(2**32)])
        size = (len(payload.data) - 20 * n) % 2**64
        return dataclasses.replace(payload, n_records=n, user_data_size=size)
    return dataclasses.replace(payload, layout=rng.choice([0, 1, 2, 255]))


def forged_plain(rng: random.Random, payload: Payload) -> Payload:
    """Forge lengths, deletions, or the claims of the frame header."""
    data, n = payload.data, payload.n_records
    if n and rng.random() < 0.6:
        at = 16 * n + 4 * rng.randrange(n)
        if rng.random() < 0.6:
            data = oracle.put(data, at, struct.pack("<I", edge(rng, 32)))
        else:
            data = oracle.put(data, 8 * n + 8 * rng.randrange(n), bytes(8))
        return dataclasses.replace(payload, data=data)
    if rng.random() < 0.5:
        return dataclasses.replace(payload, data=noise(rng, data))
    return forged_counts(rng, payload)


def forged_packed(
    rng: random.Random, payload: Payload, columns: list[PackedColumn]
) -> Payload:
    """Forge columns, sections and what is stored in them."""
    for _ in range(rng.choice([1, 1, 2])):
        which = rng.randrange(4)
        columns[which] = forged_column(rng, columns[which], payload, which)
    data = oracle.join_packed(columns)
    if rng.random() < 0.15:
        data = noise(rng, data)
    if rng.random() < 0.1:
        data += bytes(rng.randrange(1, 20))
    payload = dataclasses.replace(payload, data=data)
    return forged_counts(rng, payload) if rng.random() < 0.25 else payload


def forged_column(
    rng: random.Random, column: PackedColumn, payload: Payload, which: int
) -> PackedColumn:
    """Forge one column or one of its sections."""
    what = rng.randrange(6)
    if what == 0:
        return dataclasses.replace(column, filter=rng.choice([1, 2, 255]))
    if what == 1:
        claimed = rng.choice([0, 1, 2, 4, 8, 63, 64, 65, 255])
        return dataclasses.replace(column, claimed_sections=claimed)
    if what == 2:
        return dataclasses.replace(column, zero=rng.choice([1, 256]))
    sections = list(column.sections) or [Section(RAW)]
    at = rng.randrange(len(sections))
    if what == 3:
        n = payload.n_records
        whole = [8 * n, 8 * n, 4 * n, payload.user_data_size][which]
        size = whole // len(sections)
        sections[at] = Section(ZSTD, hostile_zstd(rng, bytes([1]) * size))
    else:
        sections[at] = forged_section(rng, sections[at])
    if rng.random() < 0.2:
        sections = rng.choice([sections[:1], sections + sections, sections[:-1]])
    return dataclasses.replace(column, sections=sections)


def forged_section(rng: random.Random, section: Section) -> Section:
    """Forge a row of the section table, or the bytes that it is about."""
    what = rng.randrange(5)
    if what == 0:
        size = edge(rng, 32, len(section.stored))
        return dataclasses.replace(section, claimed_size=size)
    if what == 1:
        return dataclasses.replace(section, encoding=rng.choice([0, 1, 2, 3, 255]))
    if what == 2:
        return dataclasses.replace(section, constant=rng.choice([1, 127, 255]))
    if what == 3:
        return dataclasses.replace(section, zero=rng.choice([1, 256]))
    return dataclasses.replace(section, stored=noise(rng, section.stored))


# ---- files ----


def log(
    rng: random.Random, store_id: bytes, number: int, first: int, hostility: float
) -> tuple[bytes, int]:
    """Return a log and the sequence that its next batch would have."""
    header = oracle.FileHeader("log", store_id, number, first)
    data = header.pack()
    sequence = first
    for _ in range(min(rng.choice([0, 1, 1, 2, 3, 6]), 2**64 - first)):
        durable = sequence - 1 if rng.random() < 0.7 else rng.randrange(sequence)
        made = payload(rng, hostility, block=False)
        data += oracle.pack_frame(
            header.seed, BATCH, made, sequence=sequence, durable=durable
        )
        sequence += 1
    if rng.random() < 0.5:
        last = sequence - 1
        empty = oracle.pack_plain([])
        data += oracle.pack_frame(header.seed, END, empty, sequence=last, durable=last)
    return data + bytes(rng.choice([0, 0, 8, 48, 512])), sequence


def snapshot(
    rng: random.Random, store_id: bytes, number: int, sequence: int, hostility: float
) -> bytes:
    """Return a snapshot whose index agrees with its blocks, or is forged."""
    header = oracle.FileHeader("snapshot", store_id, number, sequence)
    data = header.pack()
    rows: list[list[int]] = []
    all_keys = 0
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        if rng.random() < 0.8:
            made = shifted(rng, records(rng, block=True), all_keys)
            if not made:
                break
            all_keys = made[-1][0] + 1
            first, last = made[0][0], made[-1][0]
            block = repacked(rng, made, hostility)
        else:
            block = payload(rng, hostility, block=True)
            first, last = struct.unpack("<QQ", (block.data + bytes(16))[:16])
        frame = oracle.pack_frame(header.seed, BLOCK, block)
        own = struct.unpack_from("<I", frame)[0]
        sizes = [block.user_data_size % 2**64, block.n_records, own]
        rows.append([len(data), first, last, *sizes])
        data += frame
    return data + index_and_trailer(rng, header, rows, len(data), hostility)


def shifted(rng: random.Random, made: list[Record], least: int) -> list[Record]:
    """Move the keys of records up to where the block before ended, or leave them."""
    shift = max(0, least - made[0][0] + rng.randrange(3)) if rng.random() < 0.95 else 0
    return [
        (key + shift, value, user_data)
        for key, value, user_data in made
        if key + shift < 2**64
    ]


def repacked(rng: random.Random, made: list[Record], hostility: float) -> Payload:
    """Return records as a block, packed in one of the many ways."""
    if rng.random() < 0.3:
        plain = oracle.pack_plain(made)
        return forged_plain(rng, plain) if rng.random() < hostility else plain
    columns = oracle.packed_columns(made, [choice(rng, which) for which in range(4)])
    size = sum(len(user_data) for _, _, user_data in made)
    packed = Payload(oracle.PACKED, len(made), size, oracle.join_packed(columns))
    return forged_packed(rng, packed, columns) if rng.random() < hostility else packed


def index_and_trailer(
    rng: random.Random,
    header: oracle.FileHeader,
    rows: list[list[int]],
    end_offset: int,
    hostility: float,
) -> bytes:
    """Return the end frame and the trailer of a snapshot, forged or not."""
    sums = [sum(row[4] for row in rows) % 2**64, sum(row[3] for row in rows) % 2**64]
    if rng.random() < hostility / 2 and rows:
        which = rng.randrange(6)
        row = rng.choice(rows)
        row[which] = edge(rng, 32 if which >= 4 else 64, row[which])
    if rng.random() < hostility / 4:
        sums[rng.randrange(2)] = edge(rng, 64, sums[0])
    if rng.random() < hostility / 4 and rows:
        rng.choice([rows.pop, rows.reverse, lambda: rows.append(rows[0])])()
    data = oracle.INDEX_HEAD.pack(*sums)
    data += b"".join(oracle.INDEX_BLOCK.pack(*row) for row in rows)
    count = edge(rng, 32, len(rows)) if rng.random() < hostility / 4 else len(rows)
    if rng.random() < hostility / 8:
        data = noise(rng, data)
    end = oracle.pack_frame(
        header.seed, END, Payload(0, count, 0, data), sequence=header.sequence
    )
    claims = [end_offset, len(end)]
    if rng.random() < hostility / 3:
        claims[0] = edge(rng, 64, end_offset)
        claims[1] = rng.choice([len(end), (end_offset + len(end) - claims[0]) % 2**64])
    return end + oracle.pack_trailer(header.seed, *claims)


def store(rng: random.Random) -> tuple[Files, float]:
    """Return the files of a store, and how hostile they are."""
    hostility = rng.choice([0.0, 0.0, 0.1, 0.3, 0.6])
    store_id = rng.randbytes(16)
    number, sequence = 1, 0
    if rng.random() < 0.1:
        number = rng.choice([2**31, 2**32, 2**63 - 4, 2**63 - 1])
    files: Files = {}
    if rng.random() < 0.5:
        sequence = rng.choice([0, 3, 1000])
        if rng.random() < 0.1:
            sequence = edge(rng, 64)
        data = snapshot(rng, store_id, number, sequence, hostility)
        files[oracle.file_name("snapshot", number)] = data
        number += 1
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        if number >= 2**63 or sequence + 1 >= 2**64:
            break
        data, after = log(rng, store_id, number, sequence + 1, hostility)
        files[oracle.file_name("log", number)] = data
        sequence = after - 1
        number += rng.choice([1, 1, 2])
    return files, hostility


# ---- what comes last ----


def noise(rng: random.Random, data: bytes) -> bytes:
    """Flip, overwrite, cut, insert or repeat something somewhere."""
    start = rng.randrange(len(data) + 1)
    stop = min(len(data), start + rng.choice([1, 2, 4, 8, 64]))
    new = rng.choice(
        [
            rng.randbytes(stop - start),
            bytes(stop - start),
            b"\xff" * (stop - start),
            b"",
            data[start:stop] * 2,
            bytes(byte ^ (1 << rng.randrange(8)) for byte in data[start:stop]),
        ]
    )
    return data[:start] + new + data[stop:]


def whole_frames(data: bytes) -> list[int]:
    """Return where frames stand whose headers are whole."""
    return [
        offset
        for offset in oracle.frame_offsets(data)
        if offset + FRAME_HEADER.size <= len(data)
    ]


def forge_frame(rng: random.Random, data: bytes) -> bytes:
    """Set a field of a frame's header, and make its checksum agree."""
    places = whole_frames(data)
    if not places:
        return data
    offset = rng.choice(places)
    field = rng.choice(sorted(oracle.FRAME_FIELDS))
    bits = 8 * struct.calcsize(oracle.FRAME_FIELDS[field][1])
    value = edge(rng, bits, oracle.get_field(data, offset, field))
    return oracle.forge(data, offset, field, value)


def forge_header(rng: random.Random, data: bytes) -> bytes:
    """Set a field of the file header, and make its checksum agree."""
    field = rng.choice(sorted(set(oracle.FILE_FIELDS) - {"checksum"}))
    _, form = oracle.FILE_FIELDS[field]
    size = struct.calcsize(form)
    value = rng.randbytes(size) if form.endswith("s") else edge(rng, 8 * size)
    return oracle.fix_file_header(oracle.set_file_field(data, field, value))


def rearrange_frames(rng: random.Random, data: bytes) -> bytes:
    """Remove, repeat or swap frames; all checksums still agree."""
    places = [*whole_frames(data), len(data)]
    if len(places) < 2:
        return data
    a = rng.randrange(len(places) - 1)
    frame = data[places[a] : places[a + 1]]
    rest = data[: places[a]] + data[places[a + 1] :]
    to = rng.choice(places[:-1])
    made: list[bytes] = [
        rest,
        data[:to] + frame + data[to:],
        rest[:to] + frame + rest[to:],
    ]
    return rng.choice(made)


def extra_frame(rng: random.Random, data: bytes) -> bytes:
    """Put a forged frame, or a part of one, behind everything."""
    seed = oracle.file_seed(data)
    made = payload(rng, 0.5, block=False)
    sequence = edge(rng, 64, len(whole_frames(data)))
    kind = rng.choice([BATCH, BATCH, BLOCK, END, 0, 255])
    durable = edge(rng, 64, sequence)
    frame = oracle.pack_frame(seed, kind, made, sequence=sequence, durable=durable)
    data += bytes(-len(data) % rng.choice([1, 8]))
    return data + frame[: rng.choice([len(frame), rng.randrange(len(frame))])]


def fix_everything(rng: random.Random, data: bytes) -> bytes:
    """Make noise in a payload, and its checksums agree again."""
    places = whole_frames(data)
    if not places:
        return data
    offset = rng.choice(places)
    start = offset + FRAME_HEADER.size
    size = oracle.get_field(data, offset, "payload_size")
    inside = data[start : start + size]
    if not inside:
        return data
    changed = (noise(rng, inside) + bytes(size))[:size] if size < 2**20 else inside
    data = oracle.put(data, start, changed[: len(data) - start])
    return oracle.fix_payload_checksum(data, offset)


def bomb(rng: random.Random, data: bytes) -> bytes:
    """Append batches that unpack to as much as they may, or to more."""
    if data[:8] != oracle.MAGICS["log"]:
        return data
    header = oracle.FileHeader("log", data[16:32], *struct.unpack_from("<QQ", data, 32))
    sequence = (header.sequence + len(whole_frames(data))) % 2**64
    size = rng.choice([2**26 - 20, 2**26 - 19, 2**25, 2**20])
    stored = zstd_frame(size, runs(rng.choice([size, size, 2**27, 5])))
    lengths = Section(RAW, struct.pack("<I", size % 2**32))
    columns = [
        PackedColumn(NO_FILTER, [Section(CONSTANT, constant=7)]),
        PackedColumn(NO_FILTER, [Section(CONSTANT, constant=9)]),
        PackedColumn(NO_FILTER, [lengths]),
        PackedColumn(NO_FILTER, [Section(ZSTD, stored)]),
    ]
    if rng.random() < 0.3:
        columns[3] = PackedColumn(NO_FILTER, [Section(CONSTANT, constant=1)])
    packed = Payload(oracle.PACKED, 1, size, oracle.join_packed(columns))
    durable = max(0, sequence - 1)
    frame = oracle.pack_frame(
        header.seed, BATCH, packed, sequence=sequence, durable=durable
    )
    return data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 8) + frame


MUTATIONS: list[tuple[Callable[[random.Random, bytes], bytes], int]] = [
    (forge_frame, 5),
    (forge_header, 2),
    (rearrange_frames, 2),
    (extra_frame, 2),
    (fix_everything, 3),
    (noise, 3),
    (bomb, 1),
]


def mutate(rng: random.Random, files: Files) -> str:
    """Change one file in place; return what was done."""
    name = rng.choice(sorted(files))
    data = files[name]
    if rng.random() < 0.08:
        new = oracle.file_name(rng.choice(["log", "snapshot"]), edge(rng, 63, 1) or 1)
        kept = files.pop(name) if rng.random() < 0.5 else data
        files[new] = kept
        return f"{name} as {new}"
    functions, weights = zip(*MUTATIONS, strict=True)
    function = rng.choices(functions, weights)[0]
    if len(data) >= FILE_HEADER.size or function is noise:
        if function is bomb and rng.random() < 0.8:
            return "nothing"  # they take long
        files[name] = function(rng, data)
        return f"{function.__name__} in {name}"
    return "nothing"


def hostile_store(rng: random.Random) -> tuple[Files, list[str]]:
    """Return the files of one case, and what was done to them."""
    files, hostility = store(rng)
    told = [f"hostility {hostility}"]
    if files:
        told += [mutate(rng, files) for _ in range(rng.choice([0, 0, 1, 1, 2]))]
    return files, told
