"""A log that may only be read up to a bound keeps one (docs/design.md, section 5)."""

from pathlib import Path

from metastore import MetadataStore


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_damage_that_was_set_aside_is_not_met_again(tmp_path):
    """Damage behind an older log's end frame showed after a prefix recovery.

    While a newer log bounds it, nothing behind its end frame is read. That newer log
    was damaged too and was set aside; the new log, without batches, was removed at
    shutdown; then the older one was the newest, and what lies behind its end counted.
    """
    for key in (1, 2):
        store, _ = MetadataStore.recover(tmp_path)
        store.insert_batch([(key, (key, b"data"))])
        store.shutdown()
    first, second = sorted(tmp_path.glob("log_*"))
    flip(first, first.stat().st_size - 1)
    flip(second, 64 + 48)
    store, recovered = MetadataStore.recover(tmp_path, on_damage="prefix")
    store.shutdown()
    assert list(recovered) == [(1, 1, b"data")]
    for _ in range(2):
        store, recovered = MetadataStore.recover(tmp_path)
        store.shutdown()
        assert list(recovered) == [(1, 1, b"data")]


def test_a_torn_tail_is_dropped_once(tmp_path):
    """The bound of a torn log is kept, else its tail is torn again at every open."""
    store, _ = MetadataStore.recover(tmp_path)
    store.insert_batch([(1, (1, b""))])
    store._engine.abandon()
    (log,) = tmp_path.glob("log_*1")
    data = bytearray(log.read_bytes())
    data[64 + 72 : 64 + 80] = b"\xff" * 8
    log.write_bytes(data)
    dropped = []
    for _ in range(3):
        store, recovered = MetadataStore.recover(tmp_path)
        store.shutdown()
        assert list(recovered) == [(1, 1, b"")]
        dropped.append(recovered.report.bytes_dropped)
    assert dropped == [8, 0, 0]
    assert len(list((tmp_path / "quarantine").iterdir())) == 1
