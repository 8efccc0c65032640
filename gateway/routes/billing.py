"""Billing for an organization's administrators: plan, subscription, invoices, credit. Ours, in OpenAI's style.

What is read comes from our own rows, so that it can be read while Stripe is down; what is done asks Stripe first.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

from litestar import Request, get, post
from litestar.status_codes import HTTP_200_OK
from msgspec import Meta, Struct

from gateway.routes.billing_forms import (
    AllowanceObject,
    AutomaticTopUpForm,
    CancelForm,
    CheckoutForm,
    InvoicePage,
    OfferObject,
    PageObject,
    PlanForm,
    PlanObject,
    PortalForm,
    SubscriptionObject,
    TopUpForm,
    UsageObject,
    WalletObject,
    invoice_object,
    subscription_object,
    wallet_object,
)
from gateway.routes.query_string import described_by, read_query
from gateway.runtime import Runtime
from keys import tenants
from keys.errors import BILLING_PREFIX
from keys.plans import PlanLimits
from keys.principal import Principal
from metering import allowances
from metering.billing import agreement, views
from metering.billing.errors import BillingNotConfigured, SubscriptionNotFound
from metering.billing.plans import Plan
from metering.billing.returning import ReturnPages
from metering.billing.stripe_objects import Subscription

if TYPE_CHECKING:
    # Loaded where Stripe is configured, and nowhere else: see `gateway/billing_parts.py`.
    from metering.billing.customers import Customers

_SCOPE = "billing:manage"
_TRANSFERS_SHOWN = 20


class InvoicesQuery(Struct, frozen=True, kw_only=True):
    """A page of invoices."""

    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    after: Annotated[str, Meta(description="The last_id of the page before.")] | None = None


@get("/v1/billing/plan", summary="Get the plan", operation_id="get_billing_plan")
async def get_plan(principal: Principal, runtime: Runtime) -> PlanObject:
    """Return the organization's plan, its limits, and the plans that it could buy."""
    principal.require_scope(_SCOPE)
    async with runtime.reading.page(principal.organization_id) as session:
        organization = await tenants.get_organization(session, organization_id=principal.organization_id)
    plans = runtime.catalog_file.plans
    plan = plans.find(organization.plan)
    return PlanObject(
        name=organization.plan,
        title=plan.title if plan else None,
        price_cents_per_month=plan.price_cents_per_month if plan else 0,
        bills_usage=plan.bills_usage if plan else False,
        limits=plan.limits if plan else PlanLimits(),
        status=organization.status,
        status_reason=(organization.status_reason or "").removeprefix(BILLING_PREFIX) or None,
        available_plans=[_offer(one) for one in plans if one.is_sold],
    )


@get("/v1/billing/subscription", summary="Get the subscription", operation_id="get_billing_subscription")
async def get_subscription(principal: Principal, runtime: Runtime) -> SubscriptionObject:
    """Return the subscription that holds, or the last one that did."""
    principal.require_scope(_SCOPE)
    async with runtime.reading.page(principal.organization_id) as session:
        found = await views.current_subscription(session, organization_id=principal.organization_id)
    if found is None:
        raise SubscriptionNotFound
    return subscription_object(found)


@post(
    "/v1/billing/subscription",
    status_code=HTTP_200_OK,
    summary="Change the plan",
    operation_id="change_billing_subscription",
)
async def change_plan(data: PlanForm, principal: Principal, runtime: Runtime) -> SubscriptionObject:
    """Change the subscription to another plan, now. The rest of the period is settled to the day."""
    principal.require_scope(_SCOPE)
    customers = _customers(runtime)
    return _changed(await customers.change_plan(principal.organization_id, data.plan), runtime)


@post(
    "/v1/billing/subscription/cancel",
    status_code=HTTP_200_OK,
    summary="Cancel the subscription",
    operation_id="cancel_billing_subscription",
)
async def cancel_subscription(
    principal: Principal, runtime: Runtime, data: CancelForm | None = None
) -> SubscriptionObject:
    """End the subscription with its period, or at once with an invoice for what was used."""
    principal.require_scope(_SCOPE)
    customers = _customers(runtime)
    at_once = data is not None and data.at_once
    return _changed(await customers.cancel(principal.organization_id, at_once=at_once), runtime)


@post(
    "/v1/billing/subscription/resume",
    status_code=HTTP_200_OK,
    summary="Resume the subscription",
    operation_id="resume_billing_subscription",
)
async def resume_subscription(principal: Principal, runtime: Runtime) -> SubscriptionObject:
    """Take back a cancellation that has not happened yet."""
    principal.require_scope(_SCOPE)
    return _changed(await _customers(runtime).resume(principal.organization_id), runtime)


@post("/v1/billing/checkout", status_code=HTTP_200_OK, summary="Buy a plan", operation_id="create_billing_checkout")
async def create_checkout(data: CheckoutForm, principal: Principal, runtime: Runtime) -> PageObject:
    """Return the page of Stripe's where a plan is paid for. Nothing changes before that."""
    principal.require_scope(_SCOPE)
    pages = ReturnPages(success_url=data.success_url, cancel_url=data.cancel_url)
    checkout = await _customers(runtime).subscribe(principal.organization_id, data.plan, pages, email=data.email)
    return PageObject(url=checkout.url or "")


@post("/v1/billing/portal", status_code=HTTP_200_OK, summary="Open the portal", operation_id="create_billing_portal")
async def create_portal(data: PortalForm, principal: Principal, runtime: Runtime) -> PageObject:
    """Return the page of Stripe's where cards, plan and invoices are."""
    principal.require_scope(_SCOPE)
    return PageObject(url=await _customers(runtime).portal(principal.organization_id, data.return_url))


@get(
    "/v1/billing/invoices",
    summary="List invoices",
    operation_id="list_billing_invoices",
    operation_class=described_by(InvoicesQuery),
)
async def list_invoices(request: Request[Any, Any, Any], principal: Principal, runtime: Runtime) -> InvoicePage:
    """Return a page of invoices, newest first."""
    principal.require_scope(_SCOPE)
    asked = read_query(request, InvoicesQuery)
    async with runtime.reading.page(principal.organization_id) as session:
        found = await views.list_invoices(
            session, asked.limit + 1, organization_id=principal.organization_id, after=asked.after
        )
    shown = [invoice_object(one) for one in found[: asked.limit]]
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    return InvoicePage(shown, first, last, has_more=len(found) > asked.limit)


@get("/v1/billing/wallet", summary="Get the credit", operation_id="get_billing_wallet")
async def get_wallet(principal: Principal, runtime: Runtime) -> WalletObject:
    """Return the organization's prepaid credit and its last movements."""
    principal.require_scope(_SCOPE)
    return await _wallet(principal, runtime)


@post("/v1/billing/wallet/top_ups", status_code=HTTP_200_OK, summary="Buy credit", operation_id="create_billing_top_up")
async def create_top_up(data: TopUpForm, principal: Principal, runtime: Runtime) -> PageObject:
    """Return the page of Stripe's where credit is paid for."""
    principal.require_scope(_SCOPE)
    pages = ReturnPages(success_url=data.success_url, cancel_url=data.cancel_url)
    checkout = await _customers(runtime).top_up(principal.organization_id, data.amount_cents, pages)
    return PageObject(url=checkout.url or "")


@post(
    "/v1/billing/wallet/automatic_top_up",
    status_code=HTTP_200_OK,
    summary="Have credit bought by itself",
    operation_id="set_billing_automatic_top_up",
)
async def set_automatic_top_up(data: AutomaticTopUpForm, principal: Principal, runtime: Runtime) -> WalletObject:
    """Charge the card whenever credit runs low; null for both stops it."""
    principal.require_scope(_SCOPE)
    await _customers(runtime).set_automatic_top_up(
        principal.organization_id, below_cents=data.below_cents, cents=data.amount_cents
    )
    return await _wallet(principal, runtime)


@get("/v1/billing/usage", summary="Get the present period's usage", operation_id="get_billing_usage")
async def get_usage(principal: Principal, runtime: Runtime) -> UsageObject:
    """Return what was used in the present period, and what of the plan's allowances this month."""
    principal.require_scope(_SCOPE)
    now = runtime.clock.now()
    async with runtime.reading.page(principal.organization_id) as session:
        organization = await tenants.get_organization(session, organization_id=principal.organization_id)
        plan = runtime.catalog_file.plans.find(organization.plan)
        used = await allowances.list_allowances(
            session, plan.limits if plan else PlanLimits(), now, organization_id=principal.organization_id
        )
        present = await views.present_charge(session, now, organization_id=principal.organization_id)
    return UsageObject(
        charge_usd=present.charge_usd,
        start_time=_seconds(present.starts_at),
        end_time=_seconds(present.ends_at),
        allowances=[
            AllowanceObject(unit=one.unit, used=one.used, limit=one.limit, renews_at=_seconds(one.renews_at))
            for one in used
        ],
    )


@get("/v1/billing/reconciliation", summary="Compare with Stripe", operation_id="get_billing_reconciliation")
async def get_reconciliation(principal: Principal, runtime: Runtime) -> agreement.ReconciliationView:
    """Return whether Stripe agrees with the ledger, of all organizations: for the operator."""
    principal.require_scope("operator:read")
    async with runtime.reading.page(principal.organization_id) as session:
        return await agreement.reconciliation(session, runtime.clock.now())


async def _wallet(principal: Principal, runtime: Runtime) -> WalletObject:
    async with runtime.reading.page(principal.organization_id) as session:
        found = await views.wallet_of(
            session, _TRANSFERS_SHOWN, runtime.clock.now(), organization_id=principal.organization_id
        )
    return wallet_object(found)


def _changed(subscription: Subscription, runtime: Runtime) -> SubscriptionObject:
    return subscription_object(views.view_of(subscription, runtime.clock.now()))


def _customers(runtime: Runtime) -> Customers:
    """Return who acts at Stripe. Errors: BillingNotConfigured."""
    if runtime.billing is None or runtime.billing.customers is None:
        raise BillingNotConfigured
    return runtime.billing.customers


def _offer(plan: Plan) -> OfferObject:
    return OfferObject(
        name=plan.name,
        title=plan.title,
        price_cents_per_month=plan.price_cents_per_month,
        bills_usage=plan.bills_usage,
        trial_days=plan.trial_days,
        limits=plan.limits,
    )


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())


ROUTES = (
    get_plan,
    get_subscription,
    change_plan,
    cancel_subscription,
    resume_subscription,
    create_checkout,
    create_portal,
    list_invoices,
    get_wallet,
    create_top_up,
    set_automatic_top_up,
    get_usage,
    get_reconciliation,
)
