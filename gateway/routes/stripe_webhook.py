"""Where Stripe tells us what happened. There is no such route without a signing secret."""

from __future__ import annotations

from typing import Any, Final

from litestar import Request, post
from litestar.status_codes import HTTP_200_OK

from core.database import DOWN
from core.errors import Unavailable
from gateway.errors import BodyTooLarge
from gateway.runtime import Runtime
from metering.billing.inbox import BODY_BYTES_MAX

PATH: Final = "/v1/stripe/webhook"


class EventNotStored(Unavailable):
    """PostgreSQL is down: Stripe sends the event again, for three days."""

    code = "event_not_stored"

    def __init__(self) -> None:
        super().__init__("The event was not stored. Please send it again.", retry_after_seconds=5)


@post("/v1/stripe/webhook", status_code=HTTP_200_OK, include_in_schema=False)
async def receive_event(request: Request[Any, Any, Any], runtime: Runtime) -> dict[str, bool]:
    """Store an event that Stripe signed, once; what follows from it, follows later.

    No principal: the signature over the body says who calls. Forged, stale or unreadable: 400, and nothing is stored.
    """
    body = await request.body()
    if len(body) > BODY_BYTES_MAX:
        raise BodyTooLarge(BODY_BYTES_MAX)
    assert runtime.billing is not None
    try:
        await runtime.billing.receive(body, request.headers.get("stripe-signature", ""))
    except DOWN as error:
        raise EventNotStored from error
    return {"received": True}


ROUTES = (receive_event,)
