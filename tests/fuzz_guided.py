"""Coverage-guided fuzzing: atheris rolls the dice of ``hostile``.

``python tests/fuzz_guided.py [options of libFuzzer] [CORPUS]``, by `make fuzz`. A store
of the engine's own making would die at the first checksum; so its bytes are the choices
from which ``hostile`` forges one, and ``fuzz`` judges what becomes of it. What guides
is the coverage of the Python layer.
"""

from __future__ import annotations

import logging
import random
import sys

import atheris

with atheris.instrument_imports(include=["metastore"]):
    from metastore import engine

from fuzz import THEN, check_store
from hostile import hostile_store


class Dice(random.Random):
    """Draws its bits from given bytes, and zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data = data
        self._at = 0

    def getrandbits(self, k: int) -> int:
        """Return `k` bits of as many whole bytes as they need."""
        size = (k + 7) // 8
        found = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(found, "little") & ((1 << k) - 1)

    def random(self) -> float:
        """Return a number from 0 to below 1; two bytes are enough for a choice."""
        return self.getrandbits(16) / (1 << 16)


def test_one_input(data: bytes) -> None:
    """Forge a store from `data` and see what recovery says of it."""
    dice = Dice(data)
    files, _ = hostile_store(dice)
    check_store(files, 1, dice.choice(THEN))


if __name__ == "__main__":
    logging.getLogger(engine.__name__).disabled = True  # it tells of every torn tail
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
