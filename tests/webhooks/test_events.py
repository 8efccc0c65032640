"""Types of events: schemas, examples, and the bytes that are sent."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, ValidationError

from webhooks.events import EXAMPLES, MUST_BE_NAMED, UNASKED, EventData, EventType, body_of, catalogue, wants

TYPES = {one.name: one for one in catalogue()}
NAMES = {
    *("chat.completed", "key.created", "key.rotated", "key.revoked", "key.expiring", "key.leaked"),
    *("budget.threshold_reached", "limit.threshold_reached", "subscription.updated"),
    *("invoice.paid", "invoice.payment_failed", "webhook.endpoint.failing", "webhook.endpoint.disabled", "ping"),
}
MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678_901, UTC)


def test_no_type_goes_away_or_changes_its_name() -> None:
    assert TYPES.keys() == EXAMPLES.keys() == NAMES


@pytest.mark.parametrize("kind", TYPES.values(), ids=TYPES)
class TestEveryType:
    def test_its_schema_is_one_and_its_example_fits_it(self, kind: EventType) -> None:
        Draft202012Validator.check_schema(kind.schema)
        Draft202012Validator(kind.schema).validate(kind.example["data"])

    def test_every_field_is_always_there(self, kind: EventType) -> None:
        """Guarantee: a receiver may rely on each field that the schema names."""
        data = kind.example["data"]
        assert set(kind.schema["required"]) == kind.schema["properties"].keys() == data.keys()
        for name in data:
            with pytest.raises(ValidationError):
                Draft202012Validator(kind.schema).validate({one: data[one] for one in data if one != name})

    def test_its_schema_refuses_a_value_of_another_kind(self, kind: EventType) -> None:
        for name in kind.example["data"]:
            with pytest.raises(ValidationError):
                Draft202012Validator(kind.schema).validate({**kind.example["data"], name: [{}]})

    def test_its_example_survives_being_written_and_read(self, kind: EventType) -> None:
        example: EventData = EXAMPLES[kind.name]
        assert msgspec.json.decode(msgspec.json.encode(example), type=type(example)) == example
        assert msgspec.to_builtins(example) == kind.example["data"]

    def test_its_example_is_a_whole_body(self, kind: EventType) -> None:
        assert list(kind.example) == ["id", "object", "type", "created_at", "timestamp", "data"]
        assert (kind.example["object"], kind.example["type"]) == ("event", kind.name)
        assert re.fullmatch(r"evt_[0-9a-z]{26}", kind.example["id"])

    def test_it_is_described_in_a_sentence(self, kind: EventType) -> None:
        assert re.fullmatch(r"[A-Z].+\.", kind.description)
        assert kind.must_be_named == (kind.name == "chat.completed")

    def test_ids_in_its_example_look_like_ids(self, kind: EventType) -> None:
        ours = re.compile(r"(req|key|proj|org|bud|whe|evt)_.*")
        for value in kind.example["data"].values():
            assert (
                not isinstance(value, str) or not ours.fullmatch(value) or re.fullmatch(r"[a-z]+_[0-9a-z]{26}", value)
            )


class TestABody:
    def test_its_head(self) -> None:
        body = body_of("evt_1", "ping", MOMENT, b'{"message":"hi"}')
        assert body == (
            b'{"id":"evt_1","object":"event","type":"ping","created_at":1767323045,'
            b'"timestamp":"2026-01-02T03:04:05.678Z","data":{"message":"hi"}}'
        )

    def test_another_time_zone_is_the_same_moment(self) -> None:
        there = MOMENT.astimezone(timezone(timedelta(hours=-7)))
        assert body_of("evt_1", "ping", there, b"{}") == body_of("evt_1", "ping", MOMENT, b"{}")

    def test_a_full_second_has_milliseconds_too(self) -> None:
        body = msgspec.json.decode(body_of("evt_1", "ping", MOMENT.replace(microsecond=0), b"{}"))
        assert body["timestamp"] == "2026-01-02T03:04:05.000Z"

    @given(
        st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda one: st.dictionaries(st.text(), one))
    )
    def test_data_is_in_it_byte_for_byte(self, value: Any) -> None:
        data = msgspec.json.encode(value)
        for written in (data, b" " + data + b"\n", msgspec.json.format(data, indent=2)):
            body = body_of("evt_1", "key.created", MOMENT, written)
            head, found, _ = body.partition(b'"data":')
            assert found
            assert body == head + found + written + b"}"
            assert msgspec.json.decode(body)["data"] == msgspec.json.decode(written)


class TestWants:
    @pytest.mark.parametrize("name", sorted(NAMES))
    def test_everything_is_all_but_what_must_be_named(self, name: str) -> None:
        assert wants(["*"], name) == (name != "chat.completed")

    @pytest.mark.parametrize("name", sorted(NAMES))
    def test_what_is_named_is_wanted(self, name: str) -> None:
        assert wants([name], name)
        assert wants(["*", name], name)
        assert wants(["key.created", name], name)

    @pytest.mark.parametrize("name", sorted(NAMES - {"ping"}))
    def test_what_is_not_named_is_not(self, name: str) -> None:
        assert not wants([other for other in NAMES if other != name], name)
        assert not wants([], name)

    def test_a_test_is_wanted_by_whom_it_is_for(self) -> None:
        assert wants(["key.created"], "ping")
        assert ({"chat.completed"}, {"ping"}) == (MUST_BE_NAMED, UNASKED)
