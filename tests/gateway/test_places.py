"""Places for requests that read: bounded for one organization and in all, shared out fairly, never lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.ids import OrganizationId
from gateway.routes.places import Bounds, Places, PlacesTaken, ShareTaken

A, B, C = (OrganizationId(f"org_{name}") for name in "abc")
FOREVER_SECONDS = 60.0
STEPS = st.lists(st.tuples(st.sampled_from(["come", "leave", "hang up"]), st.integers(0, 30)), max_size=60)


def places(of_one: int, in_all: int, *, queued_of_one: int = 16, wait_seconds_max: float = FOREVER_SECONDS) -> Places:
    bounds = Bounds(
        of_one=of_one, in_all=in_all, queued_of_one=queued_of_one, queued_in_all=20, wait_seconds_max=wait_seconds_max
    )
    return Places(bounds)


class Caller:
    """A request that comes at once, and stays until it is told to leave."""

    def __init__(self, places: Places, organization_id: OrganizationId) -> None:
        self.organization_id = organization_id
        self.is_in = False
        self._left = asyncio.Event()
        self.task = asyncio.create_task(self._stay(places))

    async def _stay(self, places: Places) -> None:
        async with places.taken(self.organization_id):
            self.is_in = True
            try:
                await self._left.wait()
            finally:
                self.is_in = False

    def begin_to_leave(self) -> None:
        self._left.set()

    async def leave(self) -> None:
        self.begin_to_leave()
        await self.task

    async def hang_up(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def settled() -> None:
    """Let everything that can go on do so."""
    for _ in range(5):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def callers(places: Places, *organization_ids: OrganizationId) -> AsyncIterator[list[Caller]]:
    made = []
    for organization_id in organization_ids:
        made.append(Caller(places, organization_id))
        await settled()
    yield made
    for one in made:
        await one.hang_up()


async def let_in(places: Places, organization_id: OrganizationId) -> None:
    async with places.taken(organization_id):
        return


class TestRefused:
    async def test_by_its_own_share_an_organization_is_told_that_it_is_too_much(self) -> None:
        made = places(1, 3, wait_seconds_max=0.01)
        async with callers(made, A):
            with pytest.raises(ShareTaken):
                await let_in(made, A)
            await let_in(made, B)

    async def test_by_the_others_it_is_told_that_it_is_not_to_blame(self) -> None:
        made = places(2, 2, wait_seconds_max=0.01)
        async with callers(made, A, B):
            with pytest.raises(PlacesTaken):
                await let_in(made, A)
            with pytest.raises(PlacesTaken):
                await let_in(made, C)

    async def test_at_once_when_enough_of_its_own_wait(self) -> None:
        """Guarantee: and that many of one organization leave room in the queue for another's."""
        made = places(1, 2, queued_of_one=3)
        async with callers(made, A, A, A, A, B, B) as waiting:
            with pytest.raises(ShareTaken):
                await asyncio.wait_for(let_in(made, A), 1)
            assert [one.is_in for one in waiting] == [True, False, False, False, True, False]

    async def test_at_once_when_enough_of_all_wait(self) -> None:
        made = places(1, 1, queued_of_one=10)
        async with callers(made, A, *[B] * 10, *[C] * 10):
            with pytest.raises(PlacesTaken):
                await asyncio.wait_for(let_in(made, OrganizationId("org_d")), 1)

    async def test_who_was_refused_leaves_no_trace(self) -> None:
        made = places(1, 1, wait_seconds_max=0.01)
        async with callers(made, A) as [first]:
            with pytest.raises(ShareTaken):
                await let_in(made, A)
            await first.leave()
            await let_in(made, A)
            await let_in(made, B)


class TestOrder:
    async def test_of_one_organization_who_came_first_is_first(self) -> None:
        made = places(1, 2)
        async with callers(made, A, A, A) as [first, second, third]:
            await first.leave()
            await settled()
            assert (second.is_in, third.is_in) == (True, False)

    async def test_a_free_place_goes_to_the_organization_that_has_the_fewest(self) -> None:
        """Guarantee: who has sent ten before holds another up for no longer than one of them takes."""
        made = places(2, 2)
        async with callers(made, A, A, *[A] * 10, B) as [first, *_, another]:
            assert not another.is_in
            await first.leave()
            await settled()
            assert another.is_in

    async def test_who_has_no_room_holds_up_nobody_behind(self) -> None:
        made = places(1, 2)
        async with callers(made, A, A, B) as [_, waiting, another]:
            assert (waiting.is_in, another.is_in) == (False, True)


class TestNeverLost:
    async def test_a_place_that_came_in_the_moment_of_hanging_up_is_passed_on(self) -> None:
        made = places(1, 1)
        async with callers(made, A, A, A) as [first, second, third]:
            first.begin_to_leave()
            await asyncio.sleep(0)
            # The place is on its way to the second, which does not know yet.
            assert (first.is_in, second.is_in) == (False, False)
            await second.hang_up()
            await settled()
            assert third.is_in

    async def test_an_error_gives_the_place_back(self) -> None:
        made = places(1, 1, wait_seconds_max=0.01)
        with pytest.raises(ZeroDivisionError):
            async with made.taken(A):
                _ = 1 / 0
        await let_in(made, B)

    @given(steps=STEPS)
    async def test_whatever_comes_and_goes_the_bounds_hold_and_no_place_stays_empty(
        self, steps: list[tuple[str, int]]
    ) -> None:
        """Guarantee: nobody waits while there is room for them, and in the end every place is free."""
        made = places(2, 3)
        present: list[Caller] = []
        for act, number in steps:
            if act == "come":
                present.append(Caller(made, (A, B, C)[number % 3]))
            elif present:
                one = present[number % len(present)]
                await (one.leave() if act == "leave" and one.is_in else one.hang_up())
            await settled()
            present = [one for one in present if not one.task.done()]
            running = {name: sum(one.is_in for one in present if one.organization_id == name) for name in (A, B, C)}
            assert max(running.values()) <= 2
            assert sum(running.values()) <= 3
            waiting = {one.organization_id for one in present if not one.is_in}
            assert sum(running.values()) == 3 or all(running[name] == 2 for name in waiting)
        for one in present:
            await one.hang_up()
        async with callers(made, A, A, B) as all_in:
            assert all(one.is_in for one in all_in)
