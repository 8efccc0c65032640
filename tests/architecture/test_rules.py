"""Rules that no tool checks: one door per secret thing, tenancy in every query, no side door in the route table."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from core import settings as settings_module
from inference.endpoints import ENDPOINTS
from keys.scopes import ALL_SCOPES

ROOT = Path(__file__).parents[2]
PACKAGES = ("core", "keys", "webhooks", "metering", "inference", "gateway")
# Routes that anybody may ask: they tell nothing of a tenant.
OPEN_ROUTES = {"/livez", "/readyz", "/metrics", "/openapi.json", "/.well-known/webhook-keys.json"}
# Who calls is said by a signature over the body, and without a secret for it there is no route.
SIGNED_ROUTES = {"/v1/stripe/webhook"}
# Who may open connections by themselves: the guard, and what is given a guarded client.
HTTPX_IMPORTERS = {"core/http.py", "metering/billing/stripe_api.py"}
# Queries that are not a tenant's: who holds this fingerprint, who owns this key, what is done or shown for everybody.
UNSCOPED_QUERIES = {
    ("keys/authenticate.py", "_query"): "finds out whose key it is",
    ("keys/lifecycle.py", "find_key_owner"): "an operator names only the key",
    ("keys/revocation.py", "_poll"): "gateways follow every organization's changes",
    ("keys/revocation.py", "_newest"): "gateways follow every organization's changes",
    ("webhooks/key_acts.py", "_ending_keys"): "a worker tells of every organization's",
    ("metering/adjustments.py", "_usage"): "an operator names only the call",
    ("metering/allowances.py", "used_of"): "a worker puts right every organization's",
    ("metering/allowances.py", "ended"): "a worker puts right every organization's",
    ("metering/allowances.py", "standing_of"): "the allowance names its organization",
    ("metering/budgets.py", "standing_of"): "the budget names its organization",
    ("metering/budgets.py", "_count_past"): "the budget names its organization",
    ("metering/billing/limit_mails.py", "_note_allowances"): "a worker writes every organization's mails",
    ("metering/billing/limit_mails.py", "_note_budgets"): "a worker writes every organization's mails",
    ("metering/billing/metric_queries.py", "activity_on"): "the operator's business is all organizations",
    ("metering/billing/webhook_mails.py", "_note"): "a worker writes every organization's mails",
    ("metering/caps.py", "budget_pages"): "a worker puts right every organization's",
    ("metering/reconcile.py", "_read_known"): "a worker puts right every organization's",
    ("metering/prices.py", "missing_prices"): "the operator is shown every organization's models",
    ("metering/verify_redis.py", "compare"): "the operator is shown every organization's budgets",
    ("metering/verify_redis.py", "_running"): "the operator is shown every organization's budgets",
    ("metering/billing/apply.py", "look_at_customers"): "a worker looks at everybody's subscriptions",
    ("metering/billing/apply.py", "look_at_overdue"): "a worker looks at everybody's subscriptions",
    ("metering/billing/moving.py", "reported_for_invoice"): "the invoice is whose it is",
    ("metering/billing/moving.py", "short_invoices"): "a worker looks at everybody's invoices",
    ("metering/billing/planning.py", "_paid_of"): "the cursor names its organization",
    ("metering/billing/projection.py", "forget_draft"): "the invoice is whose it is",
    ("metering/billing/projection.py", "drafts_of"): "the customer is whose it is",
    ("metering/billing/customers.py", "set_automatic_top_up"): "takes the organization as its first argument",
    ("metering/billing/outbox.py", "claim"): "a worker leases whoever is due",
    ("metering/billing/outbox.py", "count_due"): "a worker counts whoever is due",
    ("metering/billing/outbox.py", "record"): "the batch names its organization",
    ("metering/billing/outbox.py", "_take_back"): "the report names its organization",
    ("metering/billing/outbox.py", "_put_back"): "the batch names its organization",
    ("metering/billing/outbox.py", "_refuse"): "the batch names its organization",
    ("metering/billing/outbox.py", "bring_forward"): "the operator's: everybody, or one",
    ("metering/billing/mailing.py", "claim"): "a worker sends whatever is due",
    ("metering/billing/mailing.py", "_note_sent"): "the mail is the one that was claimed",
    ("metering/billing/mailing.py", "_note_failure"): "the mail is the one that was claimed",
    ("metering/billing/metric_queries.py", "_changes"): "the operator's figures are of everybody",
    ("metering/billing/metrics.py", "first_due"): "the operator's figures are of everybody",
    ("metering/billing/ownership.py", "owner_of_customer"): "finds out whose customer it is",
    ("metering/billing/ownership.py", "keep_address"): "the customer is whose it is",
    ("metering/billing/projection.py", "keep_subscription"): "finds out whose it is, and checks the row's",
    ("metering/billing/projection.py", "keep_invoice"): "finds out whose it is",
    ("metering/billing/reconcile.py", "_customers"): "a worker compares everybody",
    ("metering/billing/reconcile.py", "_first_in_doubt"): "what is asked names its organization",
    ("metering/billing/reconcile.py", "_hours"): "what is asked names its organization",
    ("metering/billing/reconcile.py", "_judge"): "what is asked names its organization",
    ("metering/billing/reconcile.py", "_repair"): "what is asked names its organization",
    ("metering/billing/reconcile.py", "_settle_unknown"): "what is asked names its organization",
    ("metering/billing/reconcile.py", "mark_suspect"): "Stripe does not say whose reports it could not count",
    ("metering/billing/account_status.py", "overdue_organizations"): "a worker looks at everybody's subscriptions",
    ("metering/billing/top_up.py", "round"): "a worker sees everybody's top-ups through",
    ("metering/billing/top_up.py", "_see_through"): "the top-up names its organization",
    ("metering/billing/top_up.py", "_fail"): "the top-up names its organization",
    ("metering/billing/top_up.py", "_keep_method"): "the top-up names its organization",
    ("metering/billing/agreement.py", "uninvoiced_of_period"): "the period is whose it is",
    ("metering/billing/agreement.py", "reconciliation"): "the operator is shown every organization's",
}
NOT_OURS = {".git", ".venv", ".data", ".peers", ".hypothesis", ".ruff_cache", "node_modules"}
TENANT_ROWS = {
    *("ProjectRow", "KeyRow", "KeySecretRow", "RateLimitRow", "KeyChangeRow"),
    *("BudgetRow", "UsageIntentRow", "LedgerEntryRow", "SpendWindowRow", "AllowanceEventRow"),
    *("BillingCustomerRow", "SubscriptionRow", "BillingPeriodRow", "InvoiceRow", "MeterCursorRow", "MeterWindowRow"),
    *("MeterReportRow", "MeterCheckRow", "WalletTransferRow", "WalletPostingRow", "TopUpRow", "EmailRow"),
    *("SubscriptionChangeRow", "UncollectedUsageRow"),
    *("WebhookEndpointRow", "WebhookSecretRow", "WebhookEventRow", "WebhookDeliveryRow", "WebhookAttemptRow"),
}


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def importers(name: str) -> set[str]:
    pattern = re.compile(rf"^\s*(?:import|from) {name}\b|import_module\(\"{name}\"\)", re.MULTILINE)
    return {str(path.relative_to(ROOT)) for path in modules() if pattern.search(path.read_text())}


def test_litellm_has_one_door() -> None:
    assert importers("litellm") == {"inference/upstreams/via_litellm.py"}


def test_no_other_http_client_is_used() -> None:
    for client in ("requests", "aiohttp", "urllib.request", "urllib3", "http.client"):
        assert importers(client) == set(), client


def test_requests_go_out_through_the_egress_guard() -> None:
    assert importers("httpx") == HTTPX_IMPORTERS
    made = {
        name for name in HTTPX_IMPORTERS if re.search(r"\bAsyncClient\(|\bhttpx\.Client\(", (ROOT / name).read_text())
    }
    assert made == {"core/http.py"}


def test_what_is_done_to_keys_is_told() -> None:
    """Guarantee: above `webhooks`, keys are made, rotated and revoked by way of what tells the organization's webhooks.

    The first start makes a key before there is anybody to tell.
    """
    acts = re.compile(r"lifecycle\.(create|rotate|revoke)_key|import.*\b(create|rotate|revoke)_key\b")
    doers = {str(path.relative_to(ROOT)) for path in modules() if acts.search(path.read_text())}
    assert doers == {"webhooks/key_acts.py", "gateway/first_run.py"}


def test_stripe_has_one_door() -> None:
    assert importers("stripe") == {"metering/billing/stripe_api.py"}


def test_starting_imports_no_litellm_and_no_alembic() -> None:
    """Guarantee: the API process serves without the heavy parts, and without litellm being importable."""
    code = (
        "import sys; sys.modules['litellm'] = None; import gateway.server; "
        "print([name for name in ('alembic', 'openai', 'pydantic', 'rich_click') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_secrets_are_handled_whole_in_one_file_of_their_kind() -> None:
    holders = {str(path.relative_to(ROOT)) for path in modules() if "hmac.digest(" in path.read_text()}
    assert holders == {"keys/secrets.py", "webhooks/signing.py"}


def test_no_sql_is_built_from_strings() -> None:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "text":
                assert all(isinstance(argument, ast.Constant) for argument in node.args[:1]), f"{path}:{node.lineno}"


def test_every_query_on_a_tenants_rows_is_scoped() -> None:
    """Guarantee: a function that selects a tenant's rows takes the organization as a required keyword."""
    for path in modules():
        name = str(path.relative_to(ROOT))
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if (name, function.name) in UNSCOPED_QUERIES or not _queries_tenant_rows(function):
                continue
            required = {argument.arg for argument in function.args.kwonlyargs}
            assert required & {"organization_id", "project_id"}, f"{name}: {function.name}"


def test_unscoped_queries_are_still_there() -> None:
    known = {
        (str(path.relative_to(ROOT)), function.name)
        for path in modules()
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and _queries_tenant_rows(function)
    }
    assert known >= UNSCOPED_QUERIES.keys()


def _queries_tenant_rows(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it makes a query and names a tenant's rows, be it by way of a shorter name for them."""
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return bool(names & TENANT_ROWS) and any(_is_query(node) for node in ast.walk(function))


def _is_query(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    # session.get takes a row by its key.
    gets_row = getattr(node.func, "attr", "") == "get" and any(
        isinstance(argument, ast.Name) and argument.id in TENANT_ROWS for argument in node.args
    )
    return gets_row or getattr(node.func, "id", "") in {"select", "update", "delete"}


def test_every_hot_route_declares_a_scope_and_what_it_carries() -> None:
    assert len({endpoint.path for endpoint in ENDPOINTS}) == len(ENDPOINTS)
    assert all(endpoint.scope in ALL_SCOPES for endpoint in ENDPOINTS)


def test_every_other_route_knows_its_caller_or_is_listed_as_open() -> None:
    """Guarantee: no unauthenticated side door: a handler asks for the principal, or its path is in OPEN_ROUTES."""
    for path in sorted((ROOT / "gateway" / "routes").glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for route in _routes(function):
                    arguments = {argument.arg for argument in function.args.args}
                    assert route in OPEN_ROUTES | SIGNED_ROUTES or "principal" in arguments, f"{path.name}: {route}"


def _routes(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    return [
        str(decorator.args[0].value)
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call) and decorator.args and isinstance(decorator.args[0], ast.Constant)
    ]


def test_env_example_lists_every_variable_and_no_other() -> None:
    source = Path(settings_module.__file__).read_text() + (ROOT / "inference" / "catalog.py").read_text()
    read = set(re.findall(r'"((?:AAP|OPENAI|STRIPE)_[A-Z_]+|DATABASE_URL|REDIS_URL)"', source))
    listed = set(re.findall(r"^#?\s?([A-Z][A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert read - {"AAP_READY_FD"} <= listed
    assert listed <= read | {"HTTPS_PROXY", "NO_PROXY"}


def test_nothing_committed_names_an_index_or_this_machine() -> None:
    index = re.compile(r"--(?:extra-)?index-url\s+\S|--find-links\s+\S|(?:pypi|registry)\.[a-z.]+/(?:simple|npm)")
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        if NOT_OURS & set(parts) or not path.is_file() or path.suffix in {".whl", ".png", ".pyc"}:
            continue
        if path != Path(__file__):
            assert not index.search(path.read_text(errors="replace")), path


def test_dependencies_bring_no_startup_hooks() -> None:
    """Guarantee: no `.pth` file of a dependency runs code at every start (the theft of March 2026 did)."""
    for path in Path(sys.prefix).rglob("*.pth"):
        if path.name in {"distutils-precedence.pth", "aap_gateway.pth", "a1_coverage.pth"}:
            continue
        assert not re.search(r"^\s*(import|exec)\b", path.read_text(), re.MULTILINE), path
