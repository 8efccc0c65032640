"""The plans that the operator sells: the tables `[plans.NAME]` and `[billing]` of aap.toml.

An organization has a plan by its name, or none: then only rate limits and budgets hold. A name that the file no longer
has limits nothing either, and `aap doctor` says so: what an operator deletes must not lock customers out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

import msgspec

from core.configuration import ConfigurationInvalid, Tables, unknown_names
from keys.plans import PLAN_LIMIT_MAX, PLAN_LIMITS, PlanLimits
from metering.billing.plan_terms import read_terms
from metering.rating import PriceTerms

_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,39}", re.ASCII)
# `aap orgs set-plan ORG none` takes the plan away.
_RESERVED: Final = "none"
# Stripe: an amount in cents has eight digits at most.
_PRICE: Final = re.compile(r"\d{1,6}(?:\.\d{1,2})?", re.ASCII)
# Stripe: `trial_period_days`.
_TRIAL_DAYS_MAX: Final = 730
_GRACE_DAYS_MAX: Final = 90
_PLAN_KEYS: Final = ("title", "price_usd_per_month", "trial_days", "bills_usage", "limits", "prices")

EXAMPLE: Final = """\
# Three plans. A limit that is left out is none; months are calendar months in UTC.

[billing]
default_plan = "free"        # of new organizations; without it they have no plan, and no limit
grace_days = 7               # how long an organization is served after a payment has failed

[plans.free]
title = "Free"
price_usd_per_month = 0
[plans.free.limits]
chat_requests_per_month = 1000
workflow_executions_per_month = 100
storage_gigabytes = 1

[plans.pro]
title = "Pro"
price_usd_per_month = "99.00"
bills_usage = true           # what models take is invoiced besides; without it, it is included
[plans.pro.limits]
chat_requests_per_month = 100000
workflow_executions_per_month = 10000
storage_gigabytes = 100

[plans.enterprise]
title = "Enterprise"
price_usd_per_month = 0
bills_usage = true           # billed by use alone
"""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is sold under one name."""

    name: str
    title: str
    price_cents_per_month: int
    trial_days: int
    bills_usage: bool
    """Whether what is used is invoiced beside the price. Else it is included, up to the limits."""
    limits: PlanLimits
    prices: dict[str, PriceTerms] = {}
    """What its organizations pay for a model of the catalog, by its name; for all others what everybody does."""

    @property
    def is_sold(self) -> bool:
        """Whether it is bought at a checkout."""
        return self.price_cents_per_month > 0 or self.bills_usage


class BillingSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[billing]` table."""

    default_plan: str | None = None
    """Of new organizations. None: they have no plan."""
    token_meters: bool = False
    """Whether tokens are metered at Stripe too, for customers to see; they cost nothing there."""
    grace_days: int = 7
    """How long an organization is served after a payment has failed."""


class Plans(msgspec.Struct, frozen=True, kw_only=True):
    """Every plan by its name, in the order of the file, and what holds for all of them."""

    by_name: dict[str, Plan] = {}
    billing: BillingSettings = BillingSettings()

    @property
    def default(self) -> Plan | None:
        """The plan of new organizations."""
        return self.find(self.billing.default_plan)

    def find(self, name: str | None) -> Plan | None:
        """Return the plan of that name, if there is one."""
        return None if name is None else self.by_name.get(name)

    def limits_of(self, name: str) -> PlanLimits | None:
        """Return what the plan of that name includes; None where there is no such plan."""
        plan = self.by_name.get(name)
        return None if plan is None else plan.limits

    def __iter__(self) -> Iterator[Plan]:
        """Yield the plans in the order of the file."""
        return iter(self.by_name.values())


def build_plans(tables: Tables) -> Plans:
    """Return the plans that *tables* describe. Errors: ConfigurationInvalid with every problem."""
    problems: list[str] = []
    described = _table(tables.get("plans", {}), "plans", problems)
    plans = {name: _plan(name, value, problems) for name, value in described.items()}
    billing = _billing(tables.get("billing", {}), plans, problems)
    if problems:
        raise ConfigurationInvalid(problems)
    return Plans(by_name=plans, billing=billing)


def _billing(value: object, plans: Mapping[str, Plan], problems: list[str]) -> BillingSettings:
    table = _table(value, "billing", problems)
    problems += unknown_names(table, BillingSettings.__struct_fields__, "billing.")
    default_plan = table.get("default_plan")
    if isinstance(default_plan, str):
        problems += unknown_names([default_plan], plans, "billing.default_plan: ")
    elif default_plan is not None:
        problems.append("billing.default_plan: expected the name of a plan")
    grace_days = _whole(table.get("grace_days", 7), "billing.grace_days", _GRACE_DAYS_MAX, problems)
    token_meters = table.get("token_meters", False)
    if not isinstance(token_meters, bool):
        problems.append("billing.token_meters: expected true or false")
    return BillingSettings(default_plan=default_plan, grace_days=grace_days, token_meters=token_meters is True)


def _plan(name: str, value: object, problems: list[str]) -> Plan:
    where = f"plans.{name}"
    if not _NAME.fullmatch(name) or name == _RESERVED:
        problems.append(f"{where}: a plan's name is lower-case letters, digits, - and _, and not {_RESERVED}")
    table = _table(value, where, problems)
    problems += unknown_names(table, _PLAN_KEYS, f"{where}.")
    title = table.get("title", name)
    if not isinstance(title, str) or not title.strip():
        problems.append(f"{where}.title: expected a text")
        title = name
    bills_usage = table.get("bills_usage", False)
    if not isinstance(bills_usage, bool):
        problems.append(f"{where}.bills_usage: expected true or false")
    return Plan(
        name=name,
        title=title,
        bills_usage=bills_usage is True,
        price_cents_per_month=_cents(table.get("price_usd_per_month", 0), f"{where}.price_usd_per_month", problems),
        trial_days=_whole(table.get("trial_days", 0), f"{where}.trial_days", _TRIAL_DAYS_MAX, problems),
        limits=_limits(table.get("limits", {}), f"{where}.limits", problems),
        prices=read_terms(table.get("prices", {}), f"{where}.prices", problems),
    )


def _limits(value: object, where: str, problems: list[str]) -> PlanLimits:
    table = _table(value, where, problems)
    problems += unknown_names(table, PLAN_LIMITS, f"{where}.")
    given = {name: table[name] for name in PLAN_LIMITS if name in table}
    return PlanLimits(**{name: _whole(v, f"{where}.{name}", PLAN_LIMIT_MAX, problems) for name, v in given.items()})


def _cents(value: object, where: str, problems: list[str]) -> int:
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if not _PRICE.fullmatch(text):
        problems.append(f'{where}: expected US dollars as a whole number or as a text, such as 99 or "9.50"')
        return 0
    dollars, _, cents = text.partition(".")
    return int(dollars) * 100 + int(f"{cents:0<2}")


def _whole(value: object, where: str, most: int, problems: list[str]) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most:
        return value
    problems.append(f"{where}: expected a whole number from 0 to {most}, got {value}")
    return 0


def _table(value: object, where: str, problems: list[str]) -> dict[str, Any]:
    if isinstance(value, dict):
        return cast("dict[str, Any]", value)
    problems.append(f"{where}: expected a table")
    return {}
