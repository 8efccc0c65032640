"""Between calls and the ledger: what a call may cost, the intent as it begins, and the entry when it has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Final

import msgspec

from core.money import usd_text
from inference.asks import ask_of
from inference.catalog import Deployment, Model
from inference.exchange import Exchange
from inference.wire import ParsedRequest
from keys.allowances import Counted
from keys.limits import QuotaPlan
from keys.quota import NOTHING, Spend
from metering.entries import Attribution, Entry, Intent, Quality, Result
from metering.errors import LedgerUnavailable, PriceUnknown
from metering.ledger import Ledger
from metering.normalise import OpenAIUsage, reported_cost, units_of
from metering.prices import CallPrices, Price, PriceBook
from metering.rating import PriceTerms, fitting, rate, worst_case
from metering.usage import NO_MEDIA, NO_UNITS, Units, units_of_media

_COUNT_MAX: Final = 2**31 - 1
_UNPRICED: Final = CallPrices(cost=None, charge=None)


class CallMeter:
    """Prices calls and writes them down. One per process."""

    def __init__(self, ledger: Ledger, prices: PriceBook) -> None:
        self._ledger = ledger
        self._prices = prices

    def spend_of(self, exchange: Exchange, model: Model, request: ParsedRequest, plan: QuotaPlan) -> Spend:
        """Return the most that a call under hard budgets can cost, at whichever of the model's deployments.

        Errors: PriceUnknown when that cannot be said; LedgerUnavailable before the prices are known.
        """
        if not plan.caps:
            return NOTHING
        if not plan.budgets:
            return Spend(0, exchange.started_ms)
        ask = ask_of(exchange.endpoint, request, model)
        dearest = 0
        for deployment in model.deployments:
            prices = self._find(exchange, deployment)
            if ask is None or prices.cost is None or prices.charge is None:
                raise PriceUnknown(model.name)
            most = worst_case(prices.charge.terms, ask)
            if most is None:
                raise PriceUnknown(model.name)
            dearest = max(dearest, most)
        return Spend(dearest, exchange.started_ms)

    def begin(self, exchange: Exchange, deployment: Deployment, request: ParsedRequest) -> asyncio.Future[None]:
        """Write down that the call is about to reach *deployment*; return what is done once that is durable.

        Errors: LedgerUnavailable, also from the future.
        """
        exchange.prices = self._find(exchange, deployment)
        reservation = exchange.reservation
        intent = Intent(
            exchange.request_id,
            _attribution(exchange, deployment),
            min(request.prompt_tokens, _COUNT_MAX),
            0 if reservation is None else reservation.nano_usd_max,
            exchange.started_ms,
            request.media,
        )
        exchange.intent = self._ledger.intend(intent)
        return exchange.intent

    def rate(self, exchange: Exchange) -> None:
        """Work out what the call used and costs, as far as that is known by now."""
        usage = exchange.usage
        if usage is not None and usage is exchange.usage_rated:
            return
        exchange.usage_rated = usage
        prices = exchange.prices or _UNPRICED
        tier = exchange.service_tier
        if exchange.media_estimated is not NO_MEDIA:
            units = _media_units(exchange, prices)
        else:
            units = _text_units(exchange) if usage is None else units_of(usage)
        exchange.units = units
        cost = rate(units, _terms(prices.cost), tier)
        charge = cost if prices.charge is prices.cost else rate(units, _terms(prices.charge), tier)
        exchange.cost_nano_usd = cost
        exchange.charge_nano_usd = charge

    def charged(self, exchange: Exchange) -> str:
        """Return what the call is charged, in US dollars; "" if that is not known."""
        self.rate(exchange)
        charge = exchange.charge_nano_usd
        return "" if charge is None else usd_text(charge)

    def end(self, exchange: Exchange, on_entered: Callable[[int, Counted], None] | None = None) -> None:
        """Enter a call that has ended and that a provider may have seen.

        *on_entered* is told what it is charged, in nano-USD, and what it counts for, once that is durable.
        """
        self.rate(exchange)
        deployment, intent, units = exchange.deployment, exchange.intent, exchange.units
        assert deployment is not None
        assert units is not None
        cost, charge = exchange.cost_nano_usd, exchange.charge_nano_usd
        result = _result(
            exchange.service_tier,
            "estimated" if exchange.is_estimated else "exact",
            cost is None or charge is None,
            exchange.upstream_status,
            exchange.status,
            exchange.outcome,
        )
        usage = exchange.usage
        reported = reported_cost(usage) if isinstance(usage, OpenAIUsage) else exchange.reported_cost_nano_usd
        if reported is not None:
            result = result._replace(reported_cost_nano_usd=reported)
        duration_ms = (time.perf_counter() - exchange.started_at) * 1000
        entry = Entry(
            exchange.request_id,
            _attribution(exchange, deployment),
            result,
            units,
            cost or 0,
            charge or 0,
            exchange.started_ms,
            min(int(duration_ms), _COUNT_MAX),
            int((exchange.first_byte_at - exchange.started_at) * 1000) if exchange.first_byte_at else None,
        )
        if on_entered is None:
            self._ledger.settle(entry, intent)
        else:
            counted = Counted(result.requests, units.all_tokens)
            self._ledger.settle(entry, intent, partial(on_entered, charge or 0, counted))

    def _find(self, exchange: Exchange, deployment: Deployment) -> CallPrices:
        prices, principal = self._prices, exchange.principal
        if not prices.is_loaded:
            raise LedgerUnavailable
        assert principal is not None
        found = prices.find(principal.organization_id, exchange.model, deployment.price_names, principal.plan_name)
        return found or _UNPRICED


class _Payer(msgspec.Struct, frozen=True):
    """Who pays for calls of a plan at a deployment, as long as its prices are these."""

    prices: CallPrices
    attribution: Attribution


def _attribution(exchange: Exchange, deployment: Deployment) -> Attribution:
    """Return the same object for the same caller, deployment and prices: batches of the ledger say it once."""
    prices, reservation = exchange.prices, exchange.reservation
    assert prices is not None
    assert reservation is not None
    memo = reservation.plan.memo
    operation = exchange.endpoint.operation
    key = (deployment.id, operation)
    known = memo.get(key)
    if isinstance(known, _Payer) and known.prices is prices:
        return known.attribution
    principal = exchange.principal
    assert principal is not None
    attribution = Attribution(
        principal.organization_id,
        principal.project_id,
        principal.key_id,
        principal.secret_id,
        exchange.model,
        deployment.id,
        operation,
        prices.cost.id if prices.cost else None,
        prices.charge.id if prices.charge else None,
    )
    memo[key] = _Payer(prices, attribution)
    return attribution


@lru_cache(maxsize=1024)
def _result(
    service_tier: str,
    quality: Quality,
    is_unpriced: bool,  # noqa: FBT001 - a cache knows arguments by place
    upstream_status: int,
    status: int,
    outcome: str,
) -> Result:
    """Return the same object for calls that went alike."""
    requests = 1 if 200 <= upstream_status < 300 else 0
    return Result("usage", 0, service_tier, quality, is_unpriced, requests, status, outcome)


def _text_units(exchange: Exchange) -> Units:
    """Return the text of a call whose usage nobody reports, as far as it can be seen."""
    prompt_tokens, output_tokens = exchange.tokens_estimated
    if not prompt_tokens and not output_tokens:
        return NO_UNITS
    return Units(input_tokens=min(prompt_tokens, _COUNT_MAX), output_tokens=min(output_tokens, _COUNT_MAX))


def _media_units(exchange: Exchange, prices: CallPrices) -> Units:
    """Return what a call for pictures, or of a recording, used, in units that its price has rates for.

    Where these are what was asked for, the call becomes an estimated one.

    Some models are priced by the piece and report tokens; others are priced by tokens, and may be cut off unreported.
    """
    asked, text = units_of_media(exchange.media_estimated), _text_units(exchange)
    usage, counted = exchange.usage, exchange.counted
    reported = NO_UNITS if usage is None else _as_pictures(units_of(usage), exchange)
    candidates = [asked if counted is None else units_of(counted)]
    if usage is not None and usage is not counted:
        # Tokens come first, but for pictures that came out of none.
        candidates.insert(0 if reported.all_output_tokens or not asked.images else 1, reported)
    if usage is None and text is not NO_UNITS:
        candidates.append(text)
    units = fitting(candidates, (_terms(prices.cost), _terms(prices.charge)), exchange.service_tier)
    exchange.is_estimated = exchange.is_estimated or units is asked
    return units


def _as_pictures(units: Units, exchange: Exchange) -> Units:
    """Return *units* with the output of an images endpoint as what it is, where its provider does not say."""
    if not exchange.media_estimated.images or units.output_image_tokens:
        return units
    return msgspec.structs.replace(units, output_tokens=0, output_image_tokens=units.output_tokens)


def _terms(price: Price | None) -> PriceTerms | None:
    return None if price is None else price.terms
