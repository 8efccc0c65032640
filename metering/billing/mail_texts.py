"""What mails say. Each kind has the facts it is filled in with, as `metering/billing/emails.py` writes them down."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import msgspec

from core.mail import one_line

_UNITS: Final = {
    "chat_requests": "chat requests",
    "tokens": "tokens",
    "workflow_executions": "workflow executions",
}
_PERIODS: Final = {"day": "daily", "week": "weekly", "month": "monthly", "total": "total"}
_SIGNED: Final = "\n\nThis message was sent automatically, because you look after the billing of {organization}.\n"


class FactsUnreadable(Exception):
    """What was written down is not what a text of that kind needs, such as a later release's."""


class Text(NamedTuple):
    """A mail's subject and body."""

    subject: str
    body: str


class InvoiceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Of a payment that failed or came: the amount is in the smallest unit of *currency*."""

    invoice: str
    due_cents: int
    currency: str
    page_url: str | None = None


class TopUpFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Of credit that could not be bought, in cents of US dollars."""

    cents: int


class TrialFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Of a trial that ends."""

    plan: str
    ends_at: datetime


class AllowanceFacts(msgspec.Struct, frozen=True, kw_only=True, tag_field="what", tag="allowance"):
    """Of a plan's allowance that is used up, or nearly."""

    unit: str
    percent: int
    used: int
    limit: int
    renews_at: datetime


class BudgetFacts(msgspec.Struct, frozen=True, kw_only=True, tag_field="what", tag="budget"):
    """Of an organization's budget that is spent, or nearly. Amounts are US dollars as text."""

    period: str
    percent: int
    spent_usd: str
    limit_usd: str
    is_hard: bool


class FailingFacts(msgspec.Struct, frozen=True, kw_only=True, tag_field="what", tag="failing"):
    """Of a webhook endpoint that takes nothing; times are Unix seconds."""

    endpoint_id: str
    host: str
    description: str
    failing_since: int
    disabled_after: int
    problem: str


class DisabledFacts(msgspec.Struct, frozen=True, kw_only=True, tag_field="what", tag="disabled"):
    """Of a webhook endpoint that was disabled because it took nothing, or said that it is gone."""

    endpoint_id: str
    host: str
    description: str
    reason: str


def text_of(kind: str, facts: object, organization: str) -> Text:
    """Return what a mail says to *organization*, by its name. Errors: FactsUnreadable."""
    known = _TEXTS.get(kind)
    if known is None:
        raise FactsUnreadable(f"there is no text for {kind}")
    form, write = known
    try:
        found = msgspec.convert(facts, form)
    except msgspec.ValidationError as error:
        raise FactsUnreadable(str(error)) from error
    name = one_line(organization)
    subject, body = write(found, name)
    return Text(subject, f"Hello,\n\n{body}{_SIGNED.format(organization=name)}")


def _payment_failed(facts: InvoiceFacts, organization: str) -> Text:
    return Text(
        f"Payment failed: invoice {facts.invoice} of {organization}",
        f"the payment of {_money(facts.due_cents, facts.currency)} for invoice {facts.invoice} did not go through.\n"
        "It will be tried again in the next days. Please see to it that the payment method is in order: after some\n"
        f"days without a payment, requests of {organization} are refused.{_link(facts.page_url)}",
    )


def _payment_recovered(facts: InvoiceFacts, organization: str) -> Text:
    return Text(
        f"Payment received: invoice {facts.invoice} of {organization}",
        f"invoice {facts.invoice}, whose payment had failed, is paid. Nothing is left to do."
        f"{_link(facts.page_url, 'The invoice')}",
    )


def _top_up_failed(facts: TopUpFacts, organization: str) -> Text:
    return Text(
        f"Credit for {organization} could not be bought",
        f"credit is low, and the automatic payment of {_money(facts.cents, 'usd')} did not go through. It is tried\n"
        "again in a day. Please see to it that the payment method is in order, or buy credit yourself: without any,\n"
        f"requests of {organization} are refused.",
    )


def _trial_ending(facts: TrialFacts, organization: str) -> Text:
    plan = f'the plan "{one_line(facts.plan)}"' if facts.plan else "your plan"
    return Text(
        f"The trial of {organization} ends on {_day(facts.ends_at)}",
        f"the trial of {plan} ends on {_time(facts.ends_at)}. The plan is charged from\n"
        "then on, unless it is cancelled before.",
    )


def _limit_near(facts: AllowanceFacts | BudgetFacts, organization: str) -> Text:
    return _allowance(facts, organization) if isinstance(facts, AllowanceFacts) else _budget(facts, organization)


def _allowance(facts: AllowanceFacts, organization: str) -> Text:
    unit = _UNITS.get(facts.unit, facts.unit)
    then = (
        f"Further ones are refused until {_time(facts.renews_at)}, or until there is another plan."
        if facts.percent >= 100
        else f"The allowance is renewed on {_time(facts.renews_at)}. Once it is used up, requests are refused."
    )
    return Text(
        f"{organization} has used {facts.percent} % of its {unit}",
        f"{organization} has used {facts.used:,} of the {facts.limit:,} {unit} that its plan includes in a month.\n"
        f"{then}",
    )


def _budget(facts: BudgetFacts, organization: str) -> Text:
    period = _PERIODS.get(facts.period, facts.period)
    then = "Requests that no longer fit into it are refused." if facts.is_hard else "No request is refused for it."
    return Text(
        f"{organization} has spent {facts.percent} % of its {period} budget",
        f"{organization} has spent {facts.spent_usd} of the {facts.limit_usd} US dollars of its {period} budget.\n"
        f"{then}",
    )


def _webhook(facts: FailingFacts | DisabledFacts, organization: str) -> Text:
    name = f"{facts.endpoint_id} at {one_line(facts.host)}"
    name += f' ("{one_line(facts.description)}")' if facts.description else ""
    if isinstance(facts, FailingFacts):
        since, until = (_time(datetime.fromtimestamp(at, UTC)) for at in (facts.failing_since, facts.disabled_after))
        return Text(
            f"A webhook endpoint of {organization} is failing",
            f"the webhook endpoint {name} has taken nothing since\n{since}: {one_line(facts.problem)}.\n"
            f"It is tried again and again. If it has taken nothing until {until}, it is disabled.",
        )
    why = "it answered that it is gone (410)" if facts.reason == "gone" else "it has taken nothing for five days"
    return Text(
        f"A webhook endpoint of {organization} was disabled",
        f"the webhook endpoint {name} was disabled, because\n{why}. Once it is well, enable it again;\n"
        "what it missed can be sent then, for 14 days.",
    )


_TEXTS: Final[dict[str, tuple[Any, Callable[[Any, str], Text]]]] = {
    "payment_failed": (InvoiceFacts, _payment_failed),
    "payment_recovered": (InvoiceFacts, _payment_recovered),
    "top_up_failed": (TopUpFacts, _top_up_failed),
    "trial_ending": (TrialFacts, _trial_ending),
    "limit_near": (AllowanceFacts | BudgetFacts, _limit_near),
    "webhook_failing": (FailingFacts | DisabledFacts, _webhook),
}


def _money(cents: int, currency: str) -> str:
    return f"{cents // 100:,}.{cents % 100:02d} {currency.upper()}"


def _link(url: str | None, title: str = "The invoice, and a way to pay it") -> str:
    """Return a line with the address, or nothing for what is no address of a page."""
    is_page = url is not None and url.startswith("https://") and url == one_line(url)
    return f"\n\n{title}: {url}" if is_page else ""


def _day(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%d %B %Y}".lstrip("0")


def _time(moment: datetime) -> str:
    return f"{_day(moment)} at {moment.astimezone(UTC):%H:%M} UTC"
