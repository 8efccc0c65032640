"""`aap webhooks`."""

from __future__ import annotations

from datetime import datetime

import click

from gateway.cli.common import json_option, org_option, print_json, show

_ENDPOINT_COLUMNS = ("id", "status", "url", "event_types", "last_success_at", "last_problem")
_DELIVERY_COLUMNS = ("id", "event_type", "state", "attempts", "last_status", "last_problem", "created_at")
_ATTEMPT_COLUMNS = ("started_at", "status", "problem", "duration_ms", "response_body")
_TROUBLED_COLUMNS = ("id", "organization_id", "url", "failing_since", "disabled_reason", "last_problem")
_MOMENTS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"]
_since = click.option("--since", required=True, type=click.DateTime(_MOMENTS), help="In UTC; 14 days ago at most.")
_dry_run = click.option("--dry-run", is_flag=True, help="Only count.")
_types = click.option("--event", "event_types", multiple=True, help="A type of event; again for more.")
_secret = click.option("--secret", help="One that you have: whsec_ and base64. By default a fresh one is made.")
_state = click.option("--state", type=click.Choice(["pending", "succeeded", "failed"]))


@click.group()
def webhooks_command() -> None:
    """Manage webhook endpoints, look at deliveries, send again."""


@webhooks_command.command("status")
@json_option
def status(as_json: bool) -> None:
    """Show how delivering goes, and which endpoints are in trouble."""
    from gateway.cli import webhook_acts

    found = webhook_acts.status()
    if as_json:
        print_json(found)
        return
    now = found.status
    click.echo(f"workers: {now.workers}")
    click.echo(f"endpoints: {now.enabled} enabled, {now.failing} of them failing; {now.disabled} disabled")
    oldest = f", the oldest since {now.oldest_due_at:%Y-%m-%d %H:%M:%S} UTC" if now.oldest_due_at else ""
    click.echo(f"deliveries: {now.pending} pending, {now.due} due{oldest}; {now.events_waiting} events waiting")
    if found.troubled:
        show(found.troubled, _TROUBLED_COLUMNS, as_json=False, empty="")


@webhooks_command.command("list")
@org_option
@json_option
def list_endpoints(org: str | None, as_json: bool) -> None:
    """List an organization's endpoints."""
    from gateway.cli import webhook_acts

    show(webhook_acts.list_endpoints(org), _ENDPOINT_COLUMNS, as_json=as_json, empty="There is no endpoint.")


@webhooks_command.command("create")
@click.argument("url")
@_types
@click.option("--filter", "expression", help="JMESPath on an event's data.")
@click.option("--header", "headers", multiple=True, help="'Name: value', sent with every webhook; again for more.")
@click.option("--rate", type=click.IntRange(1, 1_000), help="Deliveries a second at most.")
@click.option("--description", default="", help="What it is for.")
@click.option("--no-reveal", is_flag=True, help="The secret is shown now, and never again.")
@_secret
@org_option
@json_option
def create(as_json: bool, url: str, org: str | None, **options: object) -> None:
    """Have events sent to URL, and show the signing secret. Without --event: all but chat.completed."""
    from gateway.cli import webhook_acts
    from gateway.cli.webhook_options import new_endpoint

    secret = options.pop("secret")
    made = webhook_acts.create(org, new_endpoint(url, options), str(secret) if secret is not None else None)
    if as_json:
        print_json(made)
    else:
        click.echo(f"{made.endpoint.id} is made. Its signing secret:\n{made.secret}")


@webhooks_command.command("show")
@click.argument("endpoint")
@json_option
def show_endpoint(endpoint: str, as_json: bool) -> None:
    """Show an endpoint."""
    from gateway.cli import webhook_acts

    _show_endpoint(webhook_acts.show(endpoint), as_json=as_json)


@webhooks_command.command("update")
@click.argument("endpoint")
@click.option("--url")
@_types
@click.option("--filter", "expression", help="JMESPath on an event's data; empty for none.")
@click.option("--header", "headers", multiple=True, help="'Name: value': all that it has from now on.")
@click.option("--rate", type=click.IntRange(0, 1_000), help="Deliveries a second at most; 0 for no limit.")
@click.option("--description", help="What it is for.")
@json_option
def update(as_json: bool, endpoint: str, **options: object) -> None:
    """Change an endpoint; what is not given stays."""
    from gateway.cli import webhook_acts
    from gateway.cli.webhook_options import endpoint_change

    _show_endpoint(webhook_acts.update(endpoint, endpoint_change(options)), as_json=as_json)


@webhooks_command.command("delete")
@click.argument("endpoint")
@json_option
def delete(endpoint: str, as_json: bool) -> None:
    """Delete an endpoint with everything that was sent to it."""
    from gateway.cli import webhook_acts

    webhook_acts.delete(endpoint)
    _say({"id": endpoint, "deleted": True}, f"{endpoint} is deleted.", as_json=as_json)


@webhooks_command.command("enable")
@click.argument("endpoint")
@json_option
def enable(endpoint: str, as_json: bool) -> None:
    """Send to an endpoint again, from now on."""
    from gateway.cli import webhook_acts

    _show_endpoint(webhook_acts.enable(endpoint), as_json=as_json)


@webhooks_command.command("disable")
@click.argument("endpoint")
@json_option
def disable(endpoint: str, as_json: bool) -> None:
    """Send nothing more to an endpoint."""
    from gateway.cli import webhook_acts

    _show_endpoint(webhook_acts.disable(endpoint), as_json=as_json)


@webhooks_command.command("test")
@click.argument("endpoint")
@json_option
def test(endpoint: str, as_json: bool) -> None:
    """Have a ping sent to an endpoint."""
    from gateway.cli import webhook_acts

    event_id = webhook_acts.send_test(endpoint)
    _say(
        {"event_id": event_id},
        f"{event_id} is on its way: `aap webhooks deliveries --endpoint {endpoint}`.",
        as_json=as_json,
    )


@webhooks_command.command("rotate")
@click.argument("endpoint")
@_secret
@json_option
def rotate(endpoint: str, secret: str | None, as_json: bool) -> None:
    """Give an endpoint another signing secret; for 24 hours the older one signs, too."""
    from gateway.cli import webhook_acts

    made = webhook_acts.rotate(endpoint, secret)
    _say(
        made,
        f"{made.secret}\nThe older one signs, too, until {made.older_secret_ends_at:%Y-%m-%d %H:%M} UTC.",
        as_json=as_json,
    )


@webhooks_command.command("end-overlap")
@click.argument("endpoint")
@json_option
def end_overlap(endpoint: str, as_json: bool) -> None:
    """End the older signing secret now."""
    from gateway.cli import webhook_acts

    ended = webhook_acts.end_overlap(endpoint)
    _say({"ended": ended}, "The older secret is ended." if ended else "There was no older secret.", as_json=as_json)


@webhooks_command.command("reveal")
@click.argument("endpoint")
@json_option
def reveal(endpoint: str, as_json: bool) -> None:
    """Show an endpoint's signing secret."""
    from gateway.cli import webhook_acts

    found = webhook_acts.reveal(endpoint)
    _say(found, found.secret, as_json=as_json)


@webhooks_command.command("recover")
@click.argument("endpoint")
@_since
@_dry_run
@json_option
def recover(endpoint: str, since: datetime, dry_run: bool, as_json: bool) -> None:
    """Send what an endpoint has not taken since a moment, or missed while it was disabled."""
    from gateway.cli import webhook_acts
    from gateway.cli.webhook_options import in_utc

    counted = webhook_acts.recover(endpoint, in_utc(since), dry_run=dry_run)
    _say(counted, f"{counted.count} deliveries {'would be' if dry_run else 'are'} sent.", as_json=as_json)


@webhooks_command.command("replay")
@click.argument("endpoint")
@_since
@click.option("--until", type=click.DateTime(_MOMENTS), help="In UTC.")
@_types
@_state
@_dry_run
@json_option
def replay(as_json: bool, endpoint: str, dry_run: bool, **options: object) -> None:
    """Send again what an endpoint was sent, whatever came of it. Count first with --dry-run."""
    from gateway.cli import webhook_acts
    from gateway.cli.webhook_options import chosen_replay

    counted = webhook_acts.replay(endpoint, chosen_replay(options), dry_run=dry_run)
    _say(counted, f"{counted.count} deliveries {'would be' if dry_run else 'are'} sent again.", as_json=as_json)


@webhooks_command.command("deliveries")
@click.option("--endpoint", help="Of this endpoint alone.")
@click.option("--event", "event_type", help="Of this type of event alone.")
@_state
@click.option("--limit", type=click.IntRange(1, 1_000), default=20, show_default=True)
@org_option
@json_option
def list_deliveries(as_json: bool, org: str | None, limit: int, **options: str | None) -> None:
    """List deliveries, newest event first."""
    from gateway.cli import webhook_acts
    from gateway.cli.webhook_options import chosen_deliveries

    found = webhook_acts.list_deliveries(org, chosen_deliveries(options), limit)
    show(found, _DELIVERY_COLUMNS, as_json=as_json, empty="Nothing was sent.")


@webhooks_command.command("delivery")
@click.argument("delivery")
@json_option
def show_delivery(delivery: str, as_json: bool) -> None:
    """Show a delivery: its event, and every attempt."""
    from gateway.cli import webhook_acts

    found = webhook_acts.show_delivery(delivery)
    if as_json:
        print_json({"delivery": found.delivery, "event": found.event, "attempts": found.attempts})
        return
    show([found.delivery], _DELIVERY_COLUMNS, as_json=False, empty="")
    show(found.attempts, _ATTEMPT_COLUMNS, as_json=False, empty="It was not tried yet.")


@webhooks_command.command("resend")
@click.argument("delivery")
@json_option
def resend(delivery: str, as_json: bool) -> None:
    """Send a delivery again."""
    from gateway.cli import webhook_acts

    webhook_acts.resend_one(delivery)
    _say({"id": delivery, "state": "pending"}, f"{delivery} is sent again.", as_json=as_json)


@webhooks_command.command("events")
@json_option
def list_events(as_json: bool) -> None:
    """List the types of events."""
    from webhooks.events import catalogue

    show(catalogue(), ("name", "description"), as_json=as_json, empty="")


@webhooks_command.command("reseal")
@json_option
def reseal(as_json: bool) -> None:
    """Seal every secret under the newest of AAP_SEALING_KEYS, so that older ones can be taken away."""
    from gateway.cli import webhook_acts

    done = webhook_acts.reseal()
    _say(done, f"{done.secrets} secrets and the headers of {done.headers} endpoints are sealed anew.", as_json=as_json)


def _show_endpoint(found: object, *, as_json: bool) -> None:
    from webhooks.endpoints import EndpointView

    assert isinstance(found, EndpointView)
    if as_json:
        print_json(found)
    else:
        show([found], _ENDPOINT_COLUMNS, as_json=False, empty="")


def _say(value: object, words: str, *, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        click.echo(words)
