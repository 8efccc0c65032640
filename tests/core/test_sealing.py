from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis.strategies import binary, integers, text

from core.sealing import SealBroken, Sealer
from core.settings import SealingKey

OLD, NEW = SealingKey("k1", bytes(range(32))), SealingKey("k2", bytes(range(1, 33)))


@given(secret=binary(max_size=100), place=text(max_size=60))
def test_what_is_sealed_is_opened_in_its_place_alone(secret: bytes, place: str) -> None:
    sealer = Sealer((OLD,))
    sealed = sealer.seal(secret, place)
    assert sealer.open(sealed, place) == secret
    assert len(secret) < 4 or secret not in sealed
    with pytest.raises(SealBroken, match="moved"):
        sealer.open(sealed, place + "x")


@given(at=integers(0, 40), bit=integers(0, 7))
def test_a_changed_bit_is_noticed(at: int, bit: int) -> None:
    sealer = Sealer((OLD,))
    sealed = bytearray(sealer.seal(b"secret", "place"))
    sealed[at % len(sealed)] ^= 1 << bit
    with pytest.raises(SealBroken):
        sealer.open(bytes(sealed), "place")


@pytest.mark.parametrize("sealed", [b"", b"\x01", b"\x00\x00", b"\x01\xff", b"\x01\x02k1", b"\x01\x02k1" + bytes(11)])
def test_what_is_no_seal_is_broken(sealed: bytes) -> None:
    with pytest.raises(SealBroken):
        Sealer((OLD,)).open(sealed, "place")


def test_the_ring_opens_what_older_keys_sealed() -> None:
    sealed = Sealer((OLD,)).seal(b"secret", "place")
    ring = Sealer((NEW, OLD))
    assert ring.open(sealed, "place") == b"secret"
    assert (ring.is_newest(sealed), ring.is_newest(ring.seal(b"", ""))) == (False, True)
    with pytest.raises(SealBroken, match="'k1' is not among"):
        Sealer((NEW,)).open(sealed, "place")


def test_keys_are_not_shown() -> None:
    assert repr(OLD) == "SealingKey(id='k1')"
