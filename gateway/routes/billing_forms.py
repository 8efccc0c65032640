"""What billing's routes take and give, in the style of OpenAI's administration API."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from msgspec import Meta, Struct

from core.money import usd_text
from keys.plans import PlanLimits
from metering.billing.views import InvoiceView, SubscriptionView, WalletView

Url = Annotated[str, Meta(max_length=2_000, description="An http:// or https:// address.")]
PlanName = Annotated[str, Meta(min_length=1, max_length=40, description="The name of a plan.")]


class CheckoutForm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Buy a plan."""

    plan: PlanName
    success_url: Url
    cancel_url: Url
    email: Annotated[str, Meta(pattern=r"^[^@\s]{1,64}@[^@\s]{1,190}$")] | None = None


class PortalForm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Go to the page where cards, plan and invoices are."""

    return_url: Url


class PlanForm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Change the plan."""

    plan: PlanName


class CancelForm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cancel: with the period, or at once."""

    at_once: bool = False


class TopUpForm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Buy credit."""

    amount_cents: int
    success_url: Url
    cancel_url: Url


class AutomaticTopUpForm(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Have credit bought by itself; null for both: not any more."""

    below_cents: Annotated[int, Meta(ge=0, le=99_999_999)] | None
    amount_cents: int | None


class PageObject(Struct, frozen=True, kw_only=True):
    """A page of Stripe's to send a browser to."""

    url: str
    object: Literal["billing.page"] = "billing.page"


class PlanObject(Struct, frozen=True, kw_only=True):
    """The organization's plan. *limits* of null are none; *status_reason* says why calls are refused."""

    name: str | None
    title: str | None
    price_cents_per_month: int
    bills_usage: bool
    limits: PlanLimits
    status: str
    status_reason: str | None
    available_plans: list[OfferObject]
    object: Literal["billing.plan"] = "billing.plan"


class OfferObject(Struct, frozen=True, kw_only=True):
    """A plan that can be bought."""

    name: str
    title: str
    price_cents_per_month: int
    bills_usage: bool
    trial_days: int
    limits: PlanLimits


class SubscriptionObject(Struct, frozen=True, kw_only=True):
    """The organization's subscription; times in Unix seconds."""

    id: str
    plan: str | None
    status: str
    price_cents_per_month: int
    bills_usage: bool
    current_period_start: int
    current_period_end: int
    trial_end: int | None
    cancel_at: int | None
    ended_at: int | None
    object: Literal["billing.subscription"] = "billing.subscription"


class InvoiceObject(Struct, frozen=True, kw_only=True):
    """An invoice. *usage_micro_usd* is what it bills of the ledger, in millionths of a US dollar."""

    id: str
    number: str | None
    status: str
    currency: str
    total_cents: int
    paid_cents: int
    due_cents: int
    usage_micro_usd: int | None
    usage_start: int | None
    usage_end: int | None
    page_url: str | None
    pdf_url: str | None
    created: int
    as_of: int
    """When Stripe was last asked."""
    object: Literal["billing.invoice"] = "billing.invoice"


class InvoicePage(Struct, frozen=True):
    """Invoices, newest first."""

    data: list[InvoiceObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class TransferObject(Struct, frozen=True, kw_only=True):
    """A movement of credit, in US dollars; below zero it was used."""

    id: str
    kind: str
    amount_usd: str
    note: str | None
    created: int


class WalletObject(Struct, frozen=True, kw_only=True):
    """Credit in US dollars, exactly: what is booked, and what is left after usage that is not booked yet."""

    balance_usd: str
    available_usd: str
    is_prepaid: bool
    top_up_below_cents: int | None
    top_up_cents: int | None
    transfers: list[TransferObject]
    object: Literal["billing.wallet"] = "billing.wallet"


class AllowanceObject(Struct, frozen=True, kw_only=True):
    """What a plan includes of something in a month, and what was used of it."""

    unit: str
    used: int
    limit: int | None
    renews_at: int


class UsageObject(Struct, frozen=True, kw_only=True):
    """What is used and not invoiced yet, and what of the plan's allowances."""

    charge_usd: str
    start_time: int
    end_time: int
    allowances: list[AllowanceObject]
    object: Literal["billing.usage"] = "billing.usage"


def subscription_object(view: SubscriptionView) -> SubscriptionObject:
    """Return a subscription as it is answered."""
    return SubscriptionObject(
        id=view.id,
        plan=view.plan,
        status=view.status,
        price_cents_per_month=view.price_cents_per_month,
        bills_usage=view.bills_usage,
        current_period_start=_seconds(view.current_period_start),
        current_period_end=_seconds(view.current_period_end),
        trial_end=_seconds_or_none(view.trial_end),
        cancel_at=_seconds_or_none(view.cancel_at),
        ended_at=_seconds_or_none(view.ended_at),
    )


def invoice_object(view: InvoiceView) -> InvoiceObject:
    """Return an invoice as it is answered."""
    return InvoiceObject(
        id=view.id,
        number=view.number,
        status=view.status,
        currency=view.currency,
        total_cents=view.total_cents,
        paid_cents=view.paid_cents,
        due_cents=view.due_cents,
        usage_micro_usd=view.usage_micro_usd,
        usage_start=_seconds_or_none(view.usage_start),
        usage_end=_seconds_or_none(view.usage_end),
        page_url=view.page_url,
        pdf_url=view.pdf_url,
        created=_seconds(view.created),
        as_of=_seconds(view.read_at),
    )


def wallet_object(view: WalletView) -> WalletObject:
    """Return credit as it is answered."""
    return WalletObject(
        balance_usd=usd_text(view.balance_nano_usd),
        available_usd=usd_text(view.available_nano_usd),
        is_prepaid=view.is_prepaid,
        top_up_below_cents=view.top_up_below_cents,
        top_up_cents=view.top_up_cents,
        transfers=[
            TransferObject(
                id=one.id,
                kind=one.kind,
                amount_usd=usd_text(one.nano_usd),
                note=one.note,
                created=_seconds(one.created),
            )
            for one in view.transfers
        ],
    )


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())


def _seconds_or_none(moment: datetime | None) -> int | None:
    return None if moment is None else _seconds(moment)
