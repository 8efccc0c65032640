"""Webhooks for an organization's administrators: endpoints, what was sent to them, and sending again."""

from __future__ import annotations

from typing import Annotated, Any, Final

from litestar import Request, delete, get, post
from litestar.status_codes import HTTP_200_OK
from msgspec import Meta, Struct

from gateway.routes import webhook_forms as forms
from gateway.routes.query_string import described_by, read_query
from gateway.runtime import Runtime
from keys.principal import Principal
from webhooks import deliveries, endpoints, resend, rotation
from webhooks.deliveries import DeliveryFilter, State
from webhooks.events import catalogue
from webhooks.signing import secret_text

_SCOPE: Final = "webhooks:manage"


class EndpointsQuery(Struct, frozen=True, kw_only=True):
    """A page of endpoints."""

    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    after: Annotated[str, Meta(description="The last_id of the page before.")] | None = None


class DeliveriesQuery(Struct, frozen=True, kw_only=True):
    """A page of deliveries."""

    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    after: Annotated[str, Meta(description="The last_id of the page before.")] | None = None
    endpoint_id: str | None = None
    event_type: str | None = None
    state: State | None = None


@post(
    "/v1/webhook_endpoints",
    status_code=HTTP_200_OK,
    summary="Create a webhook endpoint",
    operation_id="create_webhook_endpoint",
)
async def create_endpoint(data: forms.EndpointForm, principal: Principal, runtime: Runtime) -> forms.NewEndpointObject:
    """Have events sent to an address. The signing secret is in the answer."""
    principal.require_scope(_SCOPE)
    sealer, policy = runtime.webhooks.sealer, runtime.catalog_file.egress
    async with runtime.webhooks.acting(principal.organization_id) as session:
        view, secret = await endpoints.create_endpoint(
            session, data.wanted(), policy, sealer, organization_id=principal.organization_id
        )
    return forms.new_endpoint_object(view, secret_text(secret))


@get(
    "/v1/webhook_endpoints",
    summary="List webhook endpoints",
    operation_id="list_webhook_endpoints",
    operation_class=described_by(EndpointsQuery),
)
async def list_endpoints(request: Request[Any, Any, Any], principal: Principal, runtime: Runtime) -> forms.EndpointPage:
    """Return a page of endpoints, newest first."""
    principal.require_scope(_SCOPE)
    asked, sealer = read_query(request, EndpointsQuery), runtime.webhooks.sealer
    async with runtime.webhooks.acting(principal.organization_id) as session:
        found = await endpoints.list_endpoints(
            session, asked.limit + 1, sealer, organization_id=principal.organization_id, after=asked.after
        )
    shown = [forms.endpoint_object(one) for one in found[: asked.limit]]
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    return forms.EndpointPage(shown, first, last, has_more=len(found) > asked.limit)


@get("/v1/webhook_endpoints/{endpoint_id:str}", summary="Get a webhook endpoint", operation_id="get_webhook_endpoint")
async def get_endpoint(endpoint_id: str, principal: Principal, runtime: Runtime) -> forms.EndpointObject:
    """Return an endpoint, and how it is doing."""
    principal.require_scope(_SCOPE)
    sealer = runtime.webhooks.sealer
    async with runtime.webhooks.acting(principal.organization_id) as session:
        view = await endpoints.get_endpoint(session, endpoint_id, sealer, organization_id=principal.organization_id)
    return forms.endpoint_object(view)


@post(
    "/v1/webhook_endpoints/{endpoint_id:str}",
    status_code=HTTP_200_OK,
    summary="Change a webhook endpoint",
    operation_id="update_webhook_endpoint",
)
async def update_endpoint(
    endpoint_id: str, data: forms.EndpointChangeForm, principal: Principal, runtime: Runtime
) -> forms.EndpointObject:
    """Change what is given. What is not sent yet is sent as the endpoint is from now on."""
    principal.require_scope(_SCOPE)
    sealer, policy = runtime.webhooks.sealer, runtime.catalog_file.egress
    async with runtime.webhooks.acting(principal.organization_id) as session:
        view = await endpoints.update_endpoint(
            session, endpoint_id, data.wanted(), policy, sealer, organization_id=principal.organization_id
        )
    return forms.endpoint_object(view)


@delete(
    "/v1/webhook_endpoints/{endpoint_id:str}",
    status_code=HTTP_200_OK,
    summary="Delete a webhook endpoint",
    operation_id="delete_webhook_endpoint",
)
async def delete_endpoint(endpoint_id: str, principal: Principal, runtime: Runtime) -> forms.DeletedObject:
    """Send nothing more to an endpoint, and forget it with what was sent."""
    principal.require_scope(_SCOPE)
    async with runtime.webhooks.acting(principal.organization_id) as session:
        await endpoints.delete_endpoint(session, endpoint_id, organization_id=principal.organization_id)
    return forms.DeletedObject(id=endpoint_id)


@post(
    "/v1/webhook_endpoints/{endpoint_id:str}/rotate_secret",
    status_code=HTTP_200_OK,
    summary="Rotate the signing secret",
    operation_id="rotate_webhook_secret",
)
async def rotate_secret(
    endpoint_id: str, principal: Principal, runtime: Runtime, data: forms.SecretForm | None = None
) -> forms.SecretObject:
    """Give the endpoint another secret. For 24 hours the older one signs, too."""
    principal.require_scope(_SCOPE)
    sealer = runtime.webhooks.sealer
    brought = forms.secret_of(data.secret if data is not None else None)
    async with runtime.webhooks.acting(principal.organization_id) as session:
        secret, ends_at = await rotation.rotate_secret(
            session, endpoint_id, sealer, secret=brought, organization_id=principal.organization_id
        )
    return forms.SecretObject(secret=secret_text(secret), older_secret_ends_at=int(ends_at.timestamp()))


@post(
    "/v1/webhook_endpoints/{endpoint_id:str}/end_overlap",
    status_code=HTTP_200_OK,
    summary="End the older signing secret",
    operation_id="end_webhook_secret_overlap",
)
async def end_overlap(endpoint_id: str, principal: Principal, runtime: Runtime) -> forms.OverlapObject:
    """End the secret before the present one now."""
    principal.require_scope(_SCOPE)
    async with runtime.webhooks.acting(principal.organization_id) as session:
        ended = await rotation.end_overlap(session, endpoint_id, organization_id=principal.organization_id)
    return forms.OverlapObject(ended=ended)


@get(
    "/v1/webhook_endpoints/{endpoint_id:str}/secret",
    summary="Reveal the signing secret",
    operation_id="get_webhook_secret",
)
async def get_secret(endpoint_id: str, principal: Principal, runtime: Runtime) -> forms.SecretObject:
    """Return the endpoint's secret, unless it was made not to be shown again."""
    principal.require_scope(_SCOPE)
    sealer = runtime.webhooks.sealer
    async with runtime.webhooks.acting(principal.organization_id) as session:
        secret = await rotation.reveal_secret(session, endpoint_id, sealer, organization_id=principal.organization_id)
    return forms.SecretObject(secret=secret_text(secret))


@post(
    "/v1/webhook_endpoints/{endpoint_id:str}/test",
    status_code=HTTP_200_OK,
    summary="Send a test event",
    operation_id="test_webhook_endpoint",
)
async def test_endpoint(endpoint_id: str, principal: Principal, runtime: Runtime) -> forms.TestObject:
    """Have a `ping` sent to the endpoint."""
    principal.require_scope(_SCOPE)
    async with runtime.webhooks.acting(principal.organization_id) as session:
        event_id = await endpoints.send_test(session, endpoint_id, organization_id=principal.organization_id)
    return forms.TestObject(event_id=event_id)


@post(
    "/v1/webhook_endpoints/{endpoint_id:str}/disable",
    status_code=HTTP_200_OK,
    summary="Disable a webhook endpoint",
    operation_id="disable_webhook_endpoint",
)
async def disable_endpoint(endpoint_id: str, principal: Principal, runtime: Runtime) -> forms.EndpointObject:
    """Send nothing more to the endpoint. What it misses can be recovered when it is enabled again."""
    principal.require_scope(_SCOPE)
    sealer = runtime.webhooks.sealer
    async with runtime.webhooks.acting(principal.organization_id) as session:
        view = await endpoints.disable_endpoint(session, endpoint_id, sealer, organization_id=principal.organization_id)
    return forms.endpoint_object(view)


@post(
    "/v1/webhook_endpoints/{endpoint_id:str}/enable",
    status_code=HTTP_200_OK,
    summary="Enable a webhook endpoint",
    operation_id="enable_webhook_endpoint",
)
async def enable_endpoint(endpoint_id: str, principal: Principal, runtime: Runtime) -> forms.EndpointObject:
    """Send to the endpoint again, from now on. One that rests because it failed is tried at once."""
    principal.require_scope(_SCOPE)
    sealer = runtime.webhooks.sealer
    async with runtime.webhooks.acting(principal.organization_id) as session:
        view = await endpoints.enable_endpoint(session, endpoint_id, sealer, organization_id=principal.organization_id)
    return forms.endpoint_object(view)


@post(
    "/v1/webhook_endpoints/{endpoint_id:str}/recover",
    status_code=HTTP_200_OK,
    summary="Recover what was missed",
    operation_id="recover_webhook_endpoint",
)
async def recover(
    endpoint_id: str, data: forms.RecoverForm, principal: Principal, runtime: Runtime
) -> forms.CountObject:
    """Send what the endpoint has not taken since a moment, or missed while it was disabled."""
    principal.require_scope(_SCOPE)
    since = forms.moment_of(data.since)
    async with runtime.webhooks.acting(principal.organization_id) as session:
        count = await resend.recover(
            session, endpoint_id, since, organization_id=principal.organization_id, is_dry_run=data.dry_run
        )
    return forms.CountObject(count=count, dry_run=data.dry_run)


@post(
    "/v1/webhook_endpoints/{endpoint_id:str}/replay",
    status_code=HTTP_200_OK,
    summary="Replay deliveries",
    operation_id="replay_webhook_endpoint",
)
async def replay(endpoint_id: str, data: forms.ReplayForm, principal: Principal, runtime: Runtime) -> forms.CountObject:
    """Send again what was sent, whatever came of it. With `dry_run`, count first."""
    principal.require_scope(_SCOPE)
    async with runtime.webhooks.acting(principal.organization_id) as session:
        count = await resend.replay(
            session, endpoint_id, data.wanted(), organization_id=principal.organization_id, is_dry_run=data.dry_run
        )
    return forms.CountObject(count=count, dry_run=data.dry_run)


@get(
    "/v1/webhook_deliveries",
    summary="List webhook deliveries",
    operation_id="list_webhook_deliveries",
    operation_class=described_by(DeliveriesQuery),
)
async def list_deliveries(
    request: Request[Any, Any, Any], principal: Principal, runtime: Runtime
) -> forms.DeliveryPage:
    """Return a page of deliveries, newest event first."""
    principal.require_scope(_SCOPE)
    asked = read_query(request, DeliveriesQuery)
    chosen = DeliveryFilter(endpoint_id=asked.endpoint_id, event_type=asked.event_type, state=asked.state)
    async with runtime.webhooks.acting(principal.organization_id) as session:
        found = await deliveries.list_deliveries(
            session, chosen, asked.limit + 1, organization_id=principal.organization_id, after=asked.after
        )
    shown = [forms.delivery_object(one) for one in found[: asked.limit]]
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    return forms.DeliveryPage(shown, first, last, has_more=len(found) > asked.limit)


@get("/v1/webhook_deliveries/{delivery_id:str}", summary="Get a webhook delivery", operation_id="get_webhook_delivery")
async def get_delivery(delivery_id: str, principal: Principal, runtime: Runtime) -> forms.DeliveryDetailsObject:
    """Return a delivery with its event and every attempt."""
    principal.require_scope(_SCOPE)
    async with runtime.webhooks.acting(principal.organization_id) as session:
        found = await deliveries.get_delivery(session, delivery_id, organization_id=principal.organization_id)
    return forms.details_object(found)


@post(
    "/v1/webhook_deliveries/{delivery_id:str}/resend",
    status_code=HTTP_200_OK,
    summary="Send a delivery again",
    operation_id="resend_webhook_delivery",
)
async def resend_delivery(delivery_id: str, principal: Principal, runtime: Runtime) -> forms.DeliveryDetailsObject:
    """Send a delivery again, whatever came of it."""
    principal.require_scope(_SCOPE)
    async with runtime.webhooks.acting(principal.organization_id) as session:
        await resend.resend(session, delivery_id, organization_id=principal.organization_id)
        found = await deliveries.get_delivery(session, delivery_id, organization_id=principal.organization_id)
    return forms.details_object(found)


@get("/v1/webhook_event_types", summary="List types of events", operation_id="list_webhook_event_types")
async def list_event_types(principal: Principal) -> forms.EventTypeList:
    """Return every type of event, with the schema of its data and an example."""
    principal.require_scope(_SCOPE)
    return forms.EventTypeList(
        [
            forms.EventTypeObject(
                name=one.name,
                description=one.description,
                must_be_named=one.must_be_named,
                schema=one.schema,
                example=one.example,
            )
            for one in catalogue()
        ]
    )


@get(
    "/.well-known/webhook-keys.json",
    summary="Get the public keys of webhooks",
    operation_id="get_webhook_keys",
    security=[],
)
async def get_keys(runtime: Runtime) -> forms.PublishedKeys:
    """Return the keys by which `v1a` signatures are verified. Anybody may ask."""
    return forms.PublishedKeys(runtime.webhooks.published_keys())


ROUTES = (
    create_endpoint,
    list_endpoints,
    get_endpoint,
    update_endpoint,
    delete_endpoint,
    rotate_secret,
    end_overlap,
    get_secret,
    test_endpoint,
    disable_endpoint,
    enable_endpoint,
    recover,
    replay,
    list_deliveries,
    get_delivery,
    resend_delivery,
    list_event_types,
    get_keys,
)
