"""The form of API keys: what is a key, what is not, and what may be shown of one."""

from __future__ import annotations

import re
import string
import zlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from core.settings import Pepper
from keys.secrets import KEY_LENGTH, KEY_PATTERN, PREFIX, fingerprint, hint, is_well_formed, mint, redact

ALNUM = string.ascii_letters + string.digits
BODY_LENGTH = KEY_LENGTH - len(PREFIX)
keys = st.builds(lambda: mint().text)
plain_text = st.text().filter(lambda text: PREFIX not in text)
# Text that comes near a key: prefixes, parts of prefixes and alphanumerics of the lengths that matter.
near = st.lists(
    st.sampled_from([PREFIX, "sk-", "aap-", "sk", "-", " ", '"'])
    | st.text(ALNUM, min_size=1, max_size=4)
    | st.integers(BODY_LENGTH - 3, BODY_LENGTH + 1).map("a".__mul__),
    max_size=6,
).map("".join)


def test_a_minted_key_has_the_published_form_and_its_own_hint() -> None:
    made = mint()
    assert re.fullmatch(r"sk-aap-[0-9A-Za-z]{59}", made.text)
    assert KEY_PATTERN.fullmatch(made.text)
    assert is_well_formed(made.text)
    assert made.text.startswith(PREFIX + made.public_id)
    assert made.hint == f"{made.text[:11]}...{made.text[-4:]}"
    assert made.text not in repr(made)


def test_keys_are_never_the_same_and_use_the_whole_alphabet() -> None:
    made = [mint().text for _ in range(500)]
    assert len(set(made)) == 500
    assert set("".join(key[len(PREFIX) :] for key in made)) == set(ALNUM)


def test_the_checksum_is_crc32_in_base62_so_that_scanners_can_verify_it() -> None:
    """Guarantee: what docs/keys.md publishes for secret scanners."""
    key = mint().text
    number = zlib.crc32(key[:-6].encode())
    alphabet = string.digits + string.ascii_uppercase + string.ascii_lowercase
    assert sum(alphabet.index(digit) * 62**at for at, digit in enumerate(reversed(key[-6:]))) == number


def test_every_single_typo_is_refused() -> None:
    """Guarantee: at every position, every other character of the alphabet, and some that are not in it."""
    key = mint().text
    for at, right in enumerate(key):
        for wrong in ALNUM + "-_ ./\x00\n":
            if wrong != right:
                assert not is_well_formed(key[:at] + wrong + key[at + 1 :])


@given(keys, st.integers(0, KEY_LENGTH - 2))
def test_two_neighbours_swapped_are_refused(key: str, at: int) -> None:
    swapped = key[:at] + key[at + 1] + key[at] + key[at + 2 :]
    assert is_well_formed(swapped) is (swapped == key)


@given(keys, st.integers(0, KEY_LENGTH), st.text(min_size=1, max_size=3))
def test_what_is_longer_or_shorter_is_refused(key: str, at: int, more: str) -> None:
    assert not is_well_formed(key[:at] + more + key[at:])
    assert not is_well_formed(key[:at] + key[at + 1 :] if at < KEY_LENGTH else key[:-1])


@given(st.text() | near | st.text(ALNUM, min_size=BODY_LENGTH, max_size=BODY_LENGTH).map(PREFIX.__add__))
def test_nothing_made_up_is_well_formed(text: str) -> None:
    assert not is_well_formed(text)


def test_a_fingerprint_depends_on_every_character_and_on_the_pepper() -> None:
    key, one, other = mint().text, Pepper("a", bytes(32)), Pepper("b", bytes(31) + b"\x01")
    made = fingerprint(key, one)
    assert made == fingerprint(key, one)
    assert (made.pepper_id, len(made.digest)) == ("a", 32)
    assert made.digest != fingerprint(key, other).digest
    # The public part too: a key with the same public id and another secret is another key (and so is the reverse).
    for at in range(KEY_LENGTH):
        assert fingerprint(key[:at] + "~" + key[at + 1 :], one).digest != made.digest
    assert key.encode() not in made.digest


@given(st.text())
def test_a_hint_of_what_is_no_key_shows_nothing(text: str) -> None:
    assert hint(text) == "*" * 8


@given(plain_text)
def test_text_without_a_key_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


@given(keys, plain_text, plain_text.filter(lambda text: not text[:1].isalnum() or not text.isascii()))
def test_a_key_becomes_its_hint_and_all_else_stays(key: str, before: str, after: str) -> None:
    assert redact(before + key + after) == before + hint(key) + after


@given(st.lists(st.tuples(near, keys), min_size=1, max_size=4), near)
@example([(PREFIX + "a" * (BODY_LENGTH - 2), mint().text)], "")
@example([(PREFIX + "a" * BODY_LENGTH, mint().text), (PREFIX, mint().text)], PREFIX)
def test_no_key_survives_whatever_stands_around_it(parts: list[tuple[str, str]], after: str) -> None:
    """Guarantee: neither the key nor its secret part is in the text afterwards."""
    scrubbed = redact("".join(before + key for before, key in parts) + after)
    for _, key in parts:
        assert key not in scrubbed
        assert key[20:50] not in scrubbed


@given(keys, st.integers(len(PREFIX), KEY_LENGTH - 1), st.sampled_from(ALNUM))
def test_a_key_with_a_typo_is_scrubbed_too(key: str, at: int, wrong: str) -> None:
    """Guarantee: a key that somebody mistyped is nearly a key, and is not logged either."""
    mistyped = key[:at] + wrong + key[at + 1 :]
    assert mistyped not in redact(f"got {mistyped}!")


@pytest.mark.parametrize("count", [1, 20_000])
def test_hostile_text_neither_breaks_nor_slows_the_scrubber(count: int) -> None:
    """Guarantee: linear, and no recursion: it runs on every line of the log."""
    key = mint().text
    assert redact(PREFIX * count + key) == PREFIX * count + hint(key)
    assert redact((PREFIX + "a" * 58) * count) == (PREFIX + "a" * 58) * count
