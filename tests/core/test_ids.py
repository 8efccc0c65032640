"""Ids: sortable by time, unique across processes, UUIDv7 underneath."""

from __future__ import annotations

import multiprocessing
import re
import time
import uuid
from concurrent.futures import ProcessPoolExecutor

import pytest

from core.ids import new_id

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"


def decoded(text: str) -> uuid.UUID:
    number = 0
    for character in text.partition("_")[2]:
        number = number * 32 + ALPHABET.index(character)
    return uuid.UUID(int=number)


def many(count: int) -> list[str]:
    return [new_id("req") for _ in range(count)]


@pytest.mark.parametrize("prefix", ["key", "org", "req"])
def test_an_id_is_a_prefixed_uuid_of_version_7_of_this_moment(prefix: str) -> None:
    for _ in range(500):
        before = time.time_ns() // 1_000_000
        made = new_id(prefix)
        after = time.time_ns() // 1_000_000
        assert re.fullmatch(rf"{prefix}_[0-7][{ALPHABET}]{{25}}", made)
        found = decoded(made)
        assert (found.version, found.variant) == (7, uuid.RFC_4122)
        assert before <= found.int >> 80 <= after


def test_the_random_bits_all_vary() -> None:
    seen_zero = seen_one = 0
    for made in many(2_000):
        bits = decoded(made).int
        seen_one |= bits
        seen_zero |= ~bits
    random = (1 << 80) - 1 & ~(0xF << 76) & ~(0x3 << 62)
    assert seen_one & random == random
    assert seen_zero & random == random


def test_ids_sort_by_their_time_as_text() -> None:
    batches = []
    for _ in range(3):
        batches.append(many(50))
        started = time.time_ns() // 1_000_000
        while time.time_ns() // 1_000_000 == started:
            pass
    for earlier, later in zip(batches, batches[1:], strict=False):
        assert max(earlier) < min(later)


def test_ids_are_unique_within_and_between_processes_also_forked_ones() -> None:
    """Guarantee: a child does not repeat the random bytes that its parent had bought."""
    many(3)
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("forkserver")) as pool:
        found = [one for part in pool.map(many, [5_000] * 4) for one in part]
    found += many(5_000)
    assert len(set(found)) == len(found)
    assert len({one[-16:] for one in found}) == len(found)
