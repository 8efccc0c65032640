"""What was used, by time: whole buckets, every filter and grouping, pages that neither miss nor repeat."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncSession

from core.errors import Invalid
from core.ids import OrganizationId, new_id
from metering.summaries import (
    COSTS_LIMITS,
    USAGE_LIMITS,
    WIDTHS,
    Bucket,
    PageRequest,
    Usage,
    Width,
    next_page,
    page_range,
    usage,
)
from metering.summary_queries import SUM_NAMES, Buckets, GroupField, UsageQuery
from metering.usage import UNIT_NAMES, Units
from tests.harness.usage_rows import add_window

DAY = datetime(2026, 3, 29, tzinfo=UTC)  # summer time begins in half of Europe
DAYS = Buckets(DAY, timedelta(days=1), 3)
GROUPS: tuple[GroupField, ...] = ("project_id", "key_id", "model", "service_tier", "is_batch")
EVERY_GROUPING = [chosen for size in range(len(GROUPS) + 1) for chosen in combinations(GROUPS, size)]


def hours(count: float) -> timedelta:
    return timedelta(hours=count)


@pytest.fixture
def organization_id() -> OrganizationId:
    return OrganizationId(new_id("org"))


async def requests_of(session: AsyncSession, organization_id: OrganizationId, **query: object) -> list[int]:
    """The calls of each bucket, all groups together."""
    buckets = await usage(session, UsageQuery(**{"buckets": DAYS, **query}), organization_id=organization_id)  # type: ignore[arg-type]
    return [sum(used.requests for used in bucket.groups) for bucket in buckets]


class TestBuckets:
    async def test_days_begin_at_midnight_in_utc_whatever_the_servers_time_zone(
        self, session: AsyncSession, organization_id: OrganizationId
    ) -> None:
        await (await session.connection()).exec_driver_sql("SET LOCAL TIME ZONE 'Europe/Berlin'")
        for at, requests in ((-hours(1), 1), (hours(0), 10), (hours(23), 100), (hours(24), 1000), (hours(72), 10_000)):
            await add_window(session, organization_id, DAY + at, requests=requests)
        assert await requests_of(session, organization_id) == [110, 1000, 0]

    async def test_buckets_without_usage_are_there_and_empty(
        self, session: AsyncSession, organization_id: OrganizationId
    ) -> None:
        await add_window(session, organization_id, DAY + hours(30))
        buckets = await usage(session, UsageQuery(buckets=DAYS), organization_id=organization_id)
        assert [(one.starts_at, one.ends_at, len(one.groups)) for one in buckets] == [
            (DAY, DAY + hours(24), 0),
            (DAY + hours(24), DAY + hours(48), 1),
            (DAY + hours(48), DAY + hours(72), 0),
        ]

    async def test_nothing_is_counted_twice(self, session: AsyncSession, organization_id: OrganizationId) -> None:
        """Guarantee: whole hours come from sums of hours, anything finer from sums of minutes, never from both."""
        await add_window(session, organization_id, DAY, requests=3)
        for minute in range(3):
            await add_window(session, organization_id, DAY + timedelta(minutes=minute * 20), seconds=60)
        for width, expected in ((hours(24), [3, 0]), (hours(1), [3, 0]), (timedelta(minutes=1), [1, 0])):
            assert await requests_of(session, organization_id, buckets=Buckets(DAY, width, 2)) == expected
        half_hours = Buckets(DAY + timedelta(minutes=10), timedelta(minutes=30), 2)
        assert await requests_of(session, organization_id, buckets=half_hours) == [1, 1]

    async def test_calls_that_were_refused_are_no_usage_and_corrections_are(
        self, session: AsyncSession, organization_id: OrganizationId
    ) -> None:
        await add_window(session, organization_id, DAY, requests=0)
        await add_window(session, organization_id, DAY + hours(24), requests=0, output_tokens=-5, charge_nano_usd=-7)
        buckets = await usage(session, UsageQuery(buckets=DAYS), organization_id=organization_id)
        assert [bucket.groups for bucket in buckets] == [
            [],
            [Usage(charge_nano_usd=-7, units=Units(output_tokens=-5))],
            [],
        ]

    async def test_every_unit_and_amount_is_summed_on_its_own(
        self, session: AsyncSession, organization_id: OrganizationId
    ) -> None:
        sums = {name: 10**place for place, name in enumerate(SUM_NAMES)}
        for key in ("key_1", "key_2"):
            await add_window(session, organization_id, DAY, key_id=key, **sums)
        [bucket, *_] = await usage(session, UsageQuery(buckets=DAYS), organization_id=organization_id)
        [used] = bucket.groups
        found = {name: getattr(used.units if name in UNIT_NAMES else used, name) for name in SUM_NAMES}
        assert found == {name: 2 * value for name, value in sums.items()}


class TestGroupsAndFilters:
    @pytest.fixture
    async def organization_id(self, session: AsyncSession) -> OrganizationId:
        """One call for the first combination, two for the second, four for the third …: a sum tells which are in it."""
        organization_id = OrganizationId(new_id("org"))
        await add_window(session, organization_id, DAY, requests=1)
        await add_window(session, organization_id, DAY, requests=2, project_id="proj_2", key_id="key_2")
        await add_window(session, organization_id, DAY, requests=4, key_id="key_3")
        await add_window(session, organization_id, DAY, requests=8, model="other")
        await add_window(session, organization_id, DAY, requests=16, service_tier="batch")
        await add_window(session, organization_id, DAY, requests=32, service_tier="flex")
        await add_window(session, organization_id, DAY, requests=64, operation="embeddings", model="small")
        return organization_id

    @pytest.mark.parametrize("group_by", EVERY_GROUPING, ids=",".join)
    async def test_groups_are_disjoint_and_whole(
        self, session: AsyncSession, organization_id: OrganizationId, group_by: tuple[GroupField, ...]
    ) -> None:
        query = UsageQuery(buckets=DAYS, group_by=group_by)
        [bucket, *rest] = await usage(session, query, organization_id=organization_id)
        names = [tuple(getattr(used, name) for name in group_by) for used in bucket.groups]
        assert len(set(names)) == len(names)
        assert sum(used.requests for used in bucket.groups) == 127
        for used in bucket.groups:
            assert all((getattr(used, name) is not None) == (name in group_by) for name in GROUPS)
        assert not any(other.groups for other in rest)

    async def test_a_group_has_the_calls_of_its_name(
        self, session: AsyncSession, organization_id: OrganizationId
    ) -> None:
        async def by(name: GroupField) -> dict[object, int]:
            query = UsageQuery(buckets=DAYS, group_by=(name,))
            [bucket, *_] = await usage(session, query, organization_id=organization_id)
            return {getattr(used, name): used.requests for used in bucket.groups}

        assert await by("project_id") == {"proj_1": 125, "proj_2": 2}
        assert await by("key_id") == {"key_1": 121, "key_2": 2, "key_3": 4}
        assert await by("model") == {"fake": 55, "other": 8, "small": 64}
        assert await by("service_tier") == {"default": 79, "batch": 16, "flex": 32}
        assert await by("is_batch") == {False: 111, True: 16}

    @pytest.mark.parametrize(
        ("filters", "expected"),
        [
            ({}, 127),
            ({"operations": ("chat", "text_completion")}, 63),
            ({"operations": ("embeddings",)}, 64),
            ({"operations": ()}, 0),
            ({"project_ids": ("proj_2", "proj_9")}, 2),
            ({"key_ids": ("key_3", "key_2")}, 6),
            ({"models": ("other",)}, 8),
            ({"is_batch": True}, 16),
            ({"is_batch": False}, 111),
            ({"models": ("fake",), "key_ids": ("key_1",), "is_batch": False, "operations": ("chat",)}, 33),
            ({"models": ("fa%", "*", "' OR true --")}, 0),
        ],
    )
    async def test_all_filters_hold_at_once(
        self, session: AsyncSession, organization_id: OrganizationId, filters: dict[str, object], expected: int
    ) -> None:
        assert (await requests_of(session, organization_id, **filters))[0] == expected

    async def test_other_organizations_are_never_counted(
        self, session: AsyncSession, organization_id: OrganizationId
    ) -> None:
        """Guarantee: not even by naming their projects and keys."""
        stranger = OrganizationId(new_id("org"))
        assert await requests_of(session, stranger) == [0, 0, 0]
        assert await requests_of(session, stranger, project_ids=("proj_1",), key_ids=("key_1",)) == [0, 0, 0]


def asked(**changes: object) -> PageRequest:
    return PageRequest(**{"start_time": int(DAY.timestamp()), **changes})  # type: ignore[arg-type]


class TestRanges:
    @pytest.mark.parametrize("width", WIDTHS)
    def test_the_default_and_the_largest_page_are_openais(self, width: Width) -> None:
        limits = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}[width]
        for limit, count in ((None, limits[0]), (1, 1), (limits[1], limits[1])):
            page = page_range(asked(width=width, limit=limit), USAGE_LIMITS, now=DAY + timedelta(days=400))
            assert page.buckets == Buckets(DAY, WIDTHS[width], count)
        for limit in (0, -1, limits[1] + 1):
            with pytest.raises(Invalid) as caught:
                page_range(asked(width=width, limit=limit), USAGE_LIMITS, now=DAY)
            assert caught.value.param == "limit"

    def test_costs_have_pages_of_up_to_180_days(self) -> None:
        assert page_range(asked(limit=180), COSTS_LIMITS, now=DAY + timedelta(days=400)).buckets.count == 180
        with pytest.raises(Invalid):
            page_range(asked(limit=181), COSTS_LIMITS, now=DAY)

    @given(st.integers(0, 9_999_999_999), st.integers(1, 10**8), st.sampled_from(list(WIDTHS)))
    def test_buckets_are_aligned_and_hold_the_first_and_the_last_second_and_no_bucket_more(
        self, start: int, length: int, width: Width
    ) -> None:
        page = page_range(PageRequest(start_time=start, end_time=start + length, width=width), USAGE_LIMITS, now=DAY)
        seconds = WIDTHS[width].total_seconds()
        first, last = page.buckets.starts_at.timestamp(), page.ends_at.timestamp()
        assert first % seconds == last % seconds == 0
        assert first <= start < first + seconds
        assert last - seconds <= start + length - 1 < last

    def test_without_an_end_the_last_bucket_is_the_present_one(self) -> None:
        for now, count in ((DAY, 1), (DAY + hours(23.99), 1), (DAY + hours(24), 2)):
            assert page_range(asked(), USAGE_LIMITS, now=now).buckets.count == count
        assert page_range(asked(), USAGE_LIMITS, now=DAY - timedelta(days=2)).buckets.count == 0

    @pytest.mark.parametrize("length", [0, -1, -(10**9)])
    def test_an_end_that_is_no_end_is_refused(self, length: int) -> None:
        with pytest.raises(Invalid) as caught:
            page_range(asked(end_time=int(DAY.timestamp()) + length), USAGE_LIMITS, now=DAY)
        assert caught.value.param == "end_time"


class TestPages:
    async def walk(
        self, session: AsyncSession, organization_id: OrganizationId, *, groups_max: int = 1000, **changes: object
    ) -> tuple[list[Bucket], int]:
        """All buckets, and how many pages they came in."""
        found: list[Bucket] = []
        page, count = None, 0
        while True:
            wanted = asked(end_time=int(DAY.timestamp()) + 10 * 86_400, page=page, **changes)
            chosen = page_range(wanted, USAGE_LIMITS, now=DAY)
            query = UsageQuery(buckets=chosen.buckets, group_by=("model",))
            buckets = await usage(session, query, organization_id=organization_id, groups_max=groups_max)
            found += buckets
            page, count = next_page(chosen, buckets), count + 1
            if page is None:
                return found, count

    @pytest.fixture
    async def whole(self, session: AsyncSession, organization_id: OrganizationId) -> list[Bucket]:
        for day, models in ((1, "ab"), (2, "abcd"), (3, "a"), (7, "abc"), (9, "ab")):
            for model in models:
                await add_window(session, organization_id, DAY + timedelta(days=day), model=model)
        return (await self.walk(session, organization_id, limit=31))[0]

    @pytest.mark.parametrize("limit", [1, 2, 3, 7, 9, 10, 11])
    async def test_pages_together_are_the_whole(
        self, session: AsyncSession, organization_id: OrganizationId, whole: list[Bucket], limit: int
    ) -> None:
        assert len(whole) == 10
        assert await self.walk(session, organization_id, limit=limit) == (whole, -(-10 // limit))

    @pytest.mark.parametrize("groups_max", [4, 5, 6, 7, 11])
    async def test_a_page_that_would_be_too_large_ends_earlier_and_loses_nothing(
        self, session: AsyncSession, organization_id: OrganizationId, whole: list[Bucket], groups_max: int
    ) -> None:
        found, pages = await self.walk(session, organization_id, limit=31, groups_max=groups_max)
        assert found == whole
        assert pages > 1

    async def test_a_bucket_that_no_page_can_hold_is_refused_with_a_word(
        self, session: AsyncSession, organization_id: OrganizationId, whole: list[Bucket]
    ) -> None:
        with pytest.raises(Invalid) as caught:
            await self.walk(session, organization_id, limit=31, groups_max=3)
        assert caught.value.param == "group_by"

    @pytest.mark.parametrize(
        "page",
        ["", "page_", "page_0", "page_000000000", "page_zzzzzzzzz", "PAGE_069c8bd00", "page_069C8BD00", "page_ffffffffff",
         "page_fffffffff", "page_-69c8bd00", "0", "' OR 1=1 --", "page_069c8bd00 ", "page_\u066069c8bd00", "x" * 100_000,
         *(f"page_{int((DAY + timedelta(seconds=seconds)).timestamp()):09x}" for seconds in (-86_400, 0, 1, 864_000, 950_400))],
    )  # fmt: skip
    def test_a_page_that_nobody_gave_out_is_refused(self, page: str) -> None:
        with pytest.raises(Invalid) as caught:
            page_range(asked(end_time=int(DAY.timestamp()) + 864_000, page=page), USAGE_LIMITS, now=DAY)
        assert caught.value.param == "page"
