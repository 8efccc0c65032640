"""Pages of lists: newest first, by cursor, at most a hundred."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from metering.billing.twin.errors import Object, invalid
from metering.billing.twin.fields import Fields

_LIMIT = 10
_LIMIT_MAX = 100


def page(found: Iterable[Object], fields: Fields, url: str, *, newest_first: bool = True) -> Object:
    """One page of *found*, which is in order of creation. Reads `limit`, `starting_after`, `ending_before`."""
    ordered = list(found)
    if newest_first:
        ordered.reverse()
    limit = _limit_of(fields)
    after, before = fields.string("starting_after"), fields.string("ending_before")
    if before is not None:
        earlier = ordered[: _place(ordered, before, "ending_before")]
        chosen, has_more = earlier[-limit:], len(earlier) > limit
    else:
        later = ordered[_place(ordered, after, "starting_after") + 1 :] if after is not None else ordered
        chosen, has_more = later[:limit], len(later) > limit
    return {"object": "list", "url": url, "has_more": has_more, "data": chosen}


def _limit_of(fields: Fields) -> int:
    limit = fields.whole("limit")
    if limit is None:
        return _LIMIT
    if not 1 <= limit <= _LIMIT_MAX:
        raise invalid("limit", f"This value must be between 1 and {_LIMIT_MAX}.", "parameter_invalid_integer")
    return limit


def _place(ordered: list[Object], cursor: str, param: str) -> int:
    for index, one in enumerate(ordered):
        if one["id"] == cursor:
            return index
    raise invalid(param, f"No such object: '{cursor}'", "resource_missing")


def is_created_within(one: Object, fields: Fields) -> bool:
    """Whether `created` (a time, or gt, gte, lt, lte) lets *one* through."""
    created = int(one["created"])
    if not isinstance(fields.values.get("created"), dict):
        exact = fields.whole("created")
        return exact is None or created == exact
    bounds = fields.inner("created")
    checks = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
    return all((bound := bounds.whole(name)) is None or check(created, bound) for name, check in checks.items())


def only(found: Iterable[Object], fields: Fields, *names: str) -> list[Object]:
    """Those of *found* whose fields *names* equal the parameters that were sent; `created` is looked at too."""
    wanted = {name: text for name in names if (text := fields.string(name)) is not None}
    return [
        one
        for one in found
        if not one.get("_is_deleted")
        and all(_as_text(one.get(name)) == text for name, text in wanted.items())
        and ("created" not in one or is_created_within(one, fields))
    ]


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
