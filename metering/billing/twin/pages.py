"""The twin's pages in place of Stripe's: paying, the portal, an invoice. Plain HTML, nothing loaded from elsewhere."""

from __future__ import annotations

from html import escape
from urllib.parse import parse_qs

from metering.billing.twin.engine.lines import is_metered
from metering.billing.twin.errors import Object, StripeError
from metering.billing.twin.fields import Fields
from metering.billing.twin.resources import checkout, subscriptions
from metering.billing.twin.resources.invoices import retrieve_invoice
from metering.billing.twin.routing import Call
from metering.billing.twin.wire import Reply, Request, html_reply, see_other
from metering.billing.twin.world import World

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body{{font:16px/1.5 system-ui;max-width:34rem;margin:4rem auto;padding:0 1rem}}
button{{font:inherit;padding:.5rem 1rem;margin:.25rem .25rem .25rem 0}}small{{color:#555}}</style>
<h1>{title}</h1>{body}
<p><small>This is the Stripe twin. No card is charged, and Stripe is not contacted.</small></html>"""
DECLINING_TOKEN = "pm_card_chargeCustomerFail"  # noqa: S105 - a test card's name


def answer_page(world: World, request: Request) -> Reply | None:
    """The page of a path, or what its button does; None if the path is no page's."""
    kind, _, identity = request.path.strip("/").partition("/")
    pages = {"pay": _pay, "portal": _portal, "invoice": _invoice}
    if kind not in pages or not identity:
        return None
    try:
        return pages[kind](world, identity, _form(request))
    except StripeError as error:
        return html_reply(_page("That did not work", f"<p>{escape(error.message)}"), error.status)


def _form(request: Request) -> dict[str, str]:
    if request.method != "POST":
        return {}
    return {name: values[0] for name, values in parse_qs(request.body.decode(errors="replace")).items()}


def _page(title: str, body: str) -> str:
    return _PAGE.format(title=escape(title), body=body)


def _button(act: str, label: str, value: str = "") -> str:
    hidden = f'<input type="hidden" name="price" value="{escape(value)}">' if value else ""
    return f'<form method="post">{hidden}<button name="act" value="{act}">{escape(label)}</button></form>'


def _money(amount: int | None, currency: str | None) -> str:
    return f"{(amount or 0) / 100:,.2f} {(currency or 'usd').upper()}"


def _pay(world: World, identity: str, form: dict[str, str]) -> Reply:
    session = world.find("checkout.session", identity)
    match form.get("act"):
        case "pay" if checkout.complete(world, session):
            return see_other((session["success_url"] or "/").replace("{CHECKOUT_SESSION_ID}", identity))
        case "decline":
            checkout.complete(world, session, DECLINING_TOKEN)
            return _pay_page(session, "Your card was declined.", status=402)
        case _:
            return _pay_page(session, "")


def _pay_page(session: Object, notice: str, status: int = 200) -> Reply:
    if session["status"] != "open":
        return html_reply(_page("Checkout", f"<p>This session is {escape(session['status'])}."))
    rows = "".join(
        f"<li>{escape(str(item['description']))}: {_money(item['amount_total'], item['currency'])}"
        for item in session["_items"]
    )
    cancel = f'<a href="{escape(session["cancel_url"])}">Back</a>' if session["cancel_url"] else ""
    body = f"<p><b>{escape(notice)}</b><ul>{rows}</ul>{_button('pay', 'Pay')}"
    return html_reply(_page("Checkout", body + _button("decline", "Pay with a card that declines") + cancel), status)


def _portal(world: World, identity: str, form: dict[str, str]) -> Reply:
    session = world.find("billing_portal.session", identity)
    held = [
        one
        for one in world.tables["subscription"].values()
        if one["customer"] == session["customer"] and one["status"] not in {"canceled", "incomplete_expired"}
    ]
    if held and form:
        _act_on(world, held[0], form)
    back = f'<p><a href="{escape(session["return_url"])}">Back</a>' if session["return_url"] else ""
    body = "".join(_subscription_part(world, one) for one in held) or "<p>There is no subscription."
    return html_reply(_page("Your subscription", body + back))


def _act_on(world: World, subscription: Object, form: dict[str, str]) -> None:
    values: Object = {}
    match form.get("act"):
        case "cancel":
            values = {"cancel_at_period_end": "true"}
        case "resume":
            values = {"cancel_at_period_end": "false"}
        case "switch":
            licensed = next(one for one in subscription["items"]["data"] if not is_metered(one["price"]))
            values = {"items": [{"id": licensed["id"], "price": form.get("price", "")}]}
        case _:
            return
    call = Call(names={"id": subscription["id"]}, fields=Fields(values), url="")
    subscriptions.update_subscription(world, call)


def _subscription_part(world: World, subscription: Object) -> str:
    items: list[Object] = subscription["items"]["data"]
    names = ", ".join(str(world.tables["product"][item["price"]["product"]]["name"]) for item in items)
    ends = " It ends with the period." if subscription["cancel_at_period_end"] else ""
    acts = _button("resume", "Keep it") if ends else _button("cancel", "Cancel at the period's end")
    held = {item["price"]["id"] for item in items}
    switches = "".join(
        _button("switch", f"Switch to {world.tables['product'][price['product']]['name']}", price["id"])
        for price in world.tables["price"].values()
        if _can_be_switched_to(price, subscription) and price["id"] not in held
    )
    return f"<p>{escape(names)}: {subscription['status']}.{ends}{acts}{switches}"


def _can_be_switched_to(price: Object, subscription: Object) -> bool:
    is_plan = price["active"] and price["recurring"] is not None and not is_metered(price)
    has_plan = any(not is_metered(item["price"]) for item in subscription["items"]["data"])
    return bool(is_plan and has_plan and price["currency"] == subscription["currency"])


def _invoice(world: World, identity: str, _: dict[str, str]) -> Reply:
    invoice = retrieve_invoice(world, Call(names={"id": identity}, fields=Fields({}), url=""))
    rows = "".join(
        f"<li>{escape(str(line['description']))}: {_money(line['amount'], line['currency'])}"
        for line in invoice["lines"]["data"]
    )
    total = _money(invoice["amount_due"], invoice["currency"])
    title = f"Invoice {invoice['number'] or '(draft)'}"
    return html_reply(_page(title, f"<p>{escape(invoice['status'])}<ul>{rows}</ul><p>Due: {total}"))
