"""From nothing to a paid invoice that bills exactly what the ledger has.

    make setup && .venv/bin/python examples/billing_journey.py

It starts a Stripe twin and a gateway of its own in a temporary directory, and leaves nothing behind. Every step is one
that an operator or a customer takes; where a customer would use a browser, it posts the page's form.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

WEBHOOK_SECRET = "whsec_of_the_billing_journey"
AAP = str(Path(sys.executable).parent / "aap")
FOREIGN = ("AAP_", "DATABASE_URL", "REDIS_URL", "STRIPE_", "OPENAI_")
USAGE_PRICE_USD = {"--input": "2.50", "--output": "10"}


def main() -> None:
    """Take the journey; exit with 1 and the reason if any step does not come out."""
    with tempfile.TemporaryDirectory(prefix="aap-journey-") as directory, journey(Path(directory)) as place:
        place.check_out()
        place.spend()
        place.pass_a_month()
        place.compare()


class Place:
    """A twin and a gateway that know each other, and one customer."""

    def __init__(self, environ: dict[str, str], gateway: httpx.Client, twin: httpx.Client, clock: str) -> None:
        self._environ = environ
        self._gateway = gateway
        self._twin = twin
        self._clock = clock
        self._aap("stripe", "sync", "--yes")
        self._aap("prices", "set", "demo", *(part for pair in USAGE_PRICE_USD.items() for part in pair))
        self.organization = self._aap("orgs", "create", "Acme")[0]["id"]
        self._aap("projects", "create", "Main", "--org", self.organization)
        owner = ("--org", self.organization)
        self._key = self._aap("keys", "create", "application", *owner)["secret"]
        self._admin = self._aap("keys", "create", "office", "--admin", *owner)["secret"]
        say(f"Acme signed up: {self.organization}, on the plan {self.billing('plan')['name']}")

    def check_out(self) -> None:
        """Buy the plan pro on Stripe's page, and wait for the webhook's effect."""
        pages = {"success_url": "https://acme.example/paid", "cancel_url": "https://acme.example/"}
        page = self.billing("checkout", plan="pro", email="office@acme.example", **pages)["url"]
        paid = self._twin.post(page, data={"act": "pay"})
        if paid.status_code not in {302, 303}:
            sys.exit(f"the checkout page answered {paid.status_code}")
        until("the subscription holds", lambda: self.billing("plan")["name"] == "pro")
        say("Acme checked out: the plan is pro")

    def spend(self) -> None:
        """Call the gateway as an application does."""
        for number in range(20):
            body = {"model": "demo", "messages": [{"role": "user", "content": f"Tell me about number {number}. " * 40}]}
            answer = self._gateway.post("/v1/chat/completions", json=body, headers=bearer(self._key))
            answer.raise_for_status()
        until("the calls are in the ledger", lambda: self.ledger()[1] == 20)
        say(f"20 calls, {self.ledger()[0]} nano-USD in the ledger")

    def pass_a_month(self) -> None:
        """Move Stripe's clock over the period's end, let late usage in, and over the invoice's hour as a draft."""
        ends_at = self.billing("subscription")["current_period_end"]
        self._advance(ends_at + 300)
        until("the draft's usage is reported", lambda: self._reported() == self.ledger()[0] // 1000)
        self._advance(ends_at + 2 * 3600)
        until("the invoice is paid", lambda: any(one["usage_micro_usd"] for one in self._paid()))
        say("A month went by: the invoice is paid")

    def compare(self) -> None:
        """Hold the invoice's lines against the ledger."""
        nano_usd, _ = self.ledger()
        invoice = next(one for one in self._paid() if one["usage_micro_usd"])
        at_stripe = self._twin.get(f"/v1/invoices/{invoice['id']}", headers=bearer(self._environ["STRIPE_API_KEY"]))
        for line in at_stripe.json()["lines"]["data"]:
            say(f"  {line['description']}: quantity {line['quantity']}, {line['amount']} cents")
        if invoice["usage_micro_usd"] != nano_usd // 1000:
            sys.exit(
                f"the invoice bills {invoice['usage_micro_usd']} micro-USD, and the ledger has {nano_usd} nano-USD"
            )
        say(f"Invoice {invoice['number']} bills {invoice['usage_micro_usd']} micro-USD: exactly the ledger")
        status = self._aap("stripe", "status")
        if not status["agrees"]:
            sys.exit(f"something stands between the ledger and Stripe: {status}")
        say(f"`aap stripe status` agrees; reports: {status['reports']}")

    def ledger(self) -> tuple[int, int]:
        """Return what the ledger has of Acme: nano-USD, and calls."""
        rows = self._aap("usage", "--org", self.organization)
        total = sum(round(float(row["charge_usd"]) * 1e9) for row in rows)
        return total, sum(row["requests"] for row in rows)

    def billing(self, act: str, **body: Any) -> Any:
        """Call one of billing's routes as Acme's administrator."""
        method = "POST" if body else "GET"
        answer = self._gateway.request(method, f"/v1/billing/{act}", json=body or None, headers=bearer(self._admin))
        if answer.is_error:
            sys.exit(f"/v1/billing/{act}: {answer.text}")
        return answer.json()

    def _paid(self) -> list[dict[str, Any]]:
        return [one for one in self.billing("invoices")["data"] if one["status"] == "paid"]

    def _reported(self) -> int:
        usage = self._twin.get("/_twin/journal").json()["data"]
        sent = [one for one in usage if one["path"] == "/v1/billing/meter_events" and one["status"] == 200]
        return sum(int(one["params"]["payload"]["value"]) for one in sent)

    def _advance(self, to: int) -> None:
        """Move the test clock, and wait until Stripe says that it got there."""
        headers = bearer(self._environ["STRIPE_API_KEY"])
        path = f"/v1/test_helpers/test_clocks/{self._clock}"
        self._twin.post(f"{path}/advance", data={"frozen_time": to}, headers=headers).raise_for_status()
        until("the clock is there", lambda: self._twin.get(path, headers=headers).json()["status"] == "ready")

    def _aap(self, *arguments: str) -> Any:
        done = subprocess.run(
            [AAP, *arguments, "--json"], env=self._environ, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"aap {' '.join(arguments)}: {done.stderr}")
        return json.loads(done.stdout)


@contextmanager
def journey(directory: Path) -> Iterator[Place]:
    """Start a twin and a gateway, and stop them at the end."""
    twin_port, port = free_port(), free_port()
    twin_url, url = f"http://127.0.0.1:{twin_port}", f"http://127.0.0.1:{port}"
    example = subprocess.run([AAP, "plans", "example"], capture_output=True, text=True, check=True).stdout
    (directory / "aap.toml").write_text(example)
    environ = {
        # Stores of its own, whatever the gateway on this machine uses.
        **{name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)},
        "AAP_DATA_DIR": str(directory / "data"),
        "AAP_CONFIG": str(directory / "aap.toml"),
        "AAP_PORT": str(port),
        "AAP_LOG_LEVEL": "warning",
        "AAP_LOG_REQUESTS": "false",
        "AAP_STRIPE_URL": twin_url,
        "STRIPE_API_KEY": "sk_test_twin",
        "STRIPE_WEBHOOK_SECRET": WEBHOOK_SECRET,
    }
    hook = ("--webhook", f"{url}/v1/stripe/webhook", "--webhook-secret", WEBHOOK_SECRET)
    with running([AAP, "stripe", "twin", "--port", str(twin_port), *hook], environ), httpx.Client() as client:
        until("the twin answers", lambda: answers(client, f"{twin_url}/_twin/journal"))
        twin = httpx.Client(base_url=twin_url)
        made = twin.post(
            "/v1/test_helpers/test_clocks",
            data={"frozen_time": int(time.time())},
            headers=bearer(environ["STRIPE_API_KEY"]),
        )
        environ["AAP_STRIPE_TEST_CLOCK"] = made.json()["id"]
        with running([AAP, "serve"], environ):
            until("the gateway is ready", lambda: answers(client, f"{url}/readyz"))
            yield Place(environ, httpx.Client(base_url=url, timeout=30), twin, environ["AAP_STRIPE_TEST_CLOCK"])


@contextmanager
def running(command: list[str], environ: dict[str, str]) -> Iterator[None]:
    """Run a program for a block."""
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


def until(what: str, is_so: Callable[[], bool], seconds_max: float = 60) -> None:
    """Wait until something is so; exit where it is not in time."""
    ends_at = time.monotonic() + seconds_max
    while not is_so():
        if time.monotonic() > ends_at:
            sys.exit(f"not in time: {what}")
        time.sleep(0.2)


def answers(client: httpx.Client, url: str) -> bool:
    """Tell whether *url* answers with success."""
    try:
        return client.get(url).is_success
    except httpx.TransportError:
        return False


def bearer(key: str) -> dict[str, str]:
    """Return the header that *key* goes into."""
    return {"authorization": f"Bearer {key}"}


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def say(text: str) -> None:
    """Tell how far the journey is."""
    print(text, flush=True)


if __name__ == "__main__":
    main()
