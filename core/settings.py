"""Environment variables, parsed once into frozen Structs. Every problem is reported at once, by variable.

There is no default for a secret: embedded mode makes its own under the data directory (`core/embedded.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeVar, cast

import msgspec

from core.setting_values import (
    Network,
    address,
    boolean,
    integer,
    lease,
    networks,
    one_of,
    optional,
    rate,
    ring,
    seconds,
    signing_seed,
    stripe_key,
    url_of,
    webhook_secrets,
)

_T = TypeVar("_T")


class SettingsInvalid(Exception):
    """One line per wrong variable."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Pepper(msgspec.Struct, frozen=True):
    """A server-side key under which API keys are fingerprinted. The first of the ring makes new fingerprints."""

    id: str
    key: bytes

    def __repr__(self) -> str:
        """Keep the key out of logs and tracebacks."""
        return f"Pepper(id={self.id!r})"


class SealingKey(msgspec.Struct, frozen=True):
    """A key of 32 bytes under which secrets are kept (`core/sealing.py`). The first of the ring seals."""

    id: str
    key: bytes

    def __repr__(self) -> str:
        """Keep the key out of logs and tracebacks."""
        return f"SealingKey(id={self.id!r})"


class SigningSeed(msgspec.Struct, frozen=True):
    """An ed25519 private key of 32 bytes, by which webhooks are signed beside each endpoint's own secret."""

    seed: bytes

    def __repr__(self) -> str:
        """Keep the key out of logs and tracebacks."""
        return "SigningSeed()"


class EdgeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP edge: where it listens, what it accepts, when it stops."""

    host: str
    port: int
    workers: int
    body_bytes_max: int
    in_flight_max: int
    queued_max: int
    queue_seconds_max: float
    connections_max: int
    bodies_bytes_max: int
    drain_seconds: float
    drain_notice_seconds: float
    keepalive_seconds: float
    header_seconds_max: float
    trusted_proxies: tuple[Network, ...]
    metrics_token: str | None
    metrics_access: Literal["loopback", "token"]


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is logged and how."""

    format: Literal["json", "console"]
    level: str
    requests: bool


class LedgerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How usage is kept."""

    lease_seconds: float
    """A gateway that has not been heard of for so long is dead, and its calls are entered by estimate."""
    retention_months: int
    """Whole months of entries that are kept in PostgreSQL; older ones are archived. 0 keeps all."""
    archive_dir: Path


class IdempotencySettings(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how much is kept of answers to requests with an Idempotency-Key."""

    retention_seconds: float
    answer_bytes_max: int


class StripeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How Stripe is reached. No key: no billing through Stripe."""

    api_key: str | None
    webhook_secrets: tuple[str, ...]
    """One for each endpoint of ours at Stripe. None: the route that events come in by does not exist."""
    url: str | None
    """Another address than Stripe's own, such as the twin's. It may be a private one."""
    requests_per_second: float
    stream_above: int
    """From so many reports in a round on, they go by the meter event stream, a hundred in a request."""
    test_clock: str | None

    def __repr__(self) -> str:
        """Keep the secrets out of logs and tracebacks."""
        return f"StripeSettings(url={self.url!r})"


class MailSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How mail is sent. No host: what would be sent is written to the log."""

    host: str | None
    port: int
    user: str | None
    password: str | None
    sender: str
    encryption: Literal["starttls", "tls", "none"]

    def __repr__(self) -> str:
        """Keep the password out of logs and tracebacks."""
        return f"MailSettings(host={self.host!r})"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the environment says. None for a store means: embedded, under *data_dir*."""

    data_dir: Path
    config_path: Path
    database_url: str | None
    redis_url: str | None
    peppers: tuple[Pepper, ...]
    sealing_keys: tuple[SealingKey, ...]
    webhook_signing_keys: tuple[SigningSeed, ...]
    webhook_retention_days: int
    """Events, deliveries and attempts that are older are deleted. More than the week before a key's end, at least."""
    first_run: bool
    edge: EdgeSettings
    ledger: LedgerSettings
    idempotency: IdempotencySettings
    log: LogSettings
    stripe: StripeSettings
    mail: MailSettings


class _Reader:
    """Reads variables one by one and collects what is wrong with them."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self.problems: list[str] = []

    def read(self, name: str, default: _T, parse: Callable[[str], _T]) -> _T:
        text = self._environ.get(name, "").strip()
        if not text:
            return default
        try:
            return parse(text)
        except ValueError as error:
            self.problems.append(f"{name}: {error}")
            return default


def load(environ: Mapping[str, str]) -> Settings:
    """Return the settings that *environ* describes. Errors: SettingsInvalid with every problem."""
    reader = _Reader(environ)
    read = reader.read
    log = LogSettings(
        format=cast(
            "Literal['json', 'console']",
            read("AAP_LOG_FORMAT", "json", one_of("json", "console")),
        ),
        level=read("AAP_LOG_LEVEL", "info", one_of("debug", "info", "warning", "error")),
        requests=read("AAP_LOG_REQUESTS", default=True, parse=boolean),
    )
    data_dir = read("AAP_DATA_DIR", Path(".data"), Path).absolute()
    settings = Settings(
        data_dir=data_dir,
        config_path=read("AAP_CONFIG", Path("aap.toml"), Path).absolute(),
        database_url=read("DATABASE_URL", None, url_of("postgresql", "postgres", "postgresql+asyncpg")),
        redis_url=read("REDIS_URL", None, url_of("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")),
        peppers=read("AAP_KEY_PEPPERS", (), _peppers),
        sealing_keys=read("AAP_SEALING_KEYS", (), _sealing_keys),
        webhook_signing_keys=read("AAP_WEBHOOK_SIGNING_KEYS", (), _signing_seeds),
        # Longer than any delivery lasts: a receiver may ask, by Retry-After, for nine pauses of a day.
        webhook_retention_days=read("AAP_WEBHOOK_RETENTION_DAYS", 30, integer(10, 400)),
        first_run=read("AAP_FIRST_RUN", default=True, parse=boolean),
        edge=_edge(reader, environ),
        ledger=LedgerSettings(
            lease_seconds=read("AAP_GATEWAY_LEASE_SECONDS", 15.0, lease),
            retention_months=read("AAP_LEDGER_RETENTION_MONTHS", 0, integer(0, 1200)),
            archive_dir=read("AAP_LEDGER_ARCHIVE_DIR", data_dir / "archive", Path).absolute(),
        ),
        idempotency=IdempotencySettings(
            retention_seconds=read("AAP_IDEMPOTENCY_SECONDS", 86_400.0, seconds),
            answer_bytes_max=read("AAP_IDEMPOTENCY_BYTES_MAX", 1024 * 1024, integer(0, 1 << 26)),
        ),
        log=log,
        stripe=_stripe(reader),
        mail=_mail(reader),
    )
    problems = reader.problems
    if (settings.database_url is None) != (settings.redis_url is None):
        problems.append("DATABASE_URL, REDIS_URL: set both (your servers) or neither (embedded ones)")
    if settings.database_url is not None and not settings.peppers and "AAP_KEY_PEPPERS" not in " ".join(problems):
        problems.append("AAP_KEY_PEPPERS: required with DATABASE_URL; `aap doctor --new-pepper` prints a fresh one")
    if problems:
        raise SettingsInvalid(problems)
    return settings


def _edge(reader: _Reader, environ: Mapping[str, str]) -> EdgeSettings:
    read = reader.read
    return EdgeSettings(
        host=read("AAP_HOST", "127.0.0.1", address),
        port=read("AAP_PORT", 8080, integer(1, 65535)),
        workers=read("AAP_WORKERS", min(os.cpu_count() or 1, 4), integer(1, 256)),
        body_bytes_max=read("AAP_BODY_BYTES_MAX", 10 * 1024 * 1024, integer(1024, 1 << 30)),
        in_flight_max=read("AAP_IN_FLIGHT_MAX", 2048, integer(1, 1 << 20)),
        queued_max=read("AAP_QUEUED_MAX", 512, integer(0, 1 << 20)),
        queue_seconds_max=read("AAP_QUEUE_SECONDS_MAX", 5.0, seconds),
        connections_max=read("AAP_CONNECTIONS_MAX", 16_384, integer(1, 1 << 20)),
        bodies_bytes_max=read("AAP_BODIES_BYTES_MAX", 256 * 1024 * 1024, integer(1 << 20, 1 << 40)),
        drain_seconds=read("AAP_DRAIN_SECONDS", 30.0, seconds),
        drain_notice_seconds=read("AAP_DRAIN_NOTICE_SECONDS", 0.0, seconds),
        keepalive_seconds=read("AAP_SSE_KEEPALIVE_SECONDS", 15.0, seconds),
        header_seconds_max=read("AAP_HEADER_SECONDS_MAX", 10.0, seconds),
        trusted_proxies=read("AAP_TRUSTED_PROXIES", (), networks),
        metrics_token=read("AAP_METRICS_TOKEN", None, optional),
        # A proxy on the same machine makes everybody a local caller: fine for trying out, not where it is for real.
        metrics_access=cast(
            "Literal['loopback', 'token']",
            read(
                "AAP_METRICS_ACCESS",
                "token" if environ.get("DATABASE_URL") else "loopback",
                one_of("loopback", "token"),
            ),
        ),
    )


def _stripe(reader: _Reader) -> StripeSettings:
    read = reader.read
    api_key = read("STRIPE_API_KEY", None, stripe_key)
    # Sandboxes take 25 requests a second, and live accounts a hundred, beside 1,000 of meter events.
    is_live = api_key is not None and "_live_" in api_key
    settings = StripeSettings(
        api_key=api_key,
        webhook_secrets=read("STRIPE_WEBHOOK_SECRET", (), webhook_secrets),
        url=read("AAP_STRIPE_URL", None, url_of("http", "https")),
        requests_per_second=read("AAP_STRIPE_REQUESTS_PER_SECOND", 80.0 if is_live else 20.0, rate),
        stream_above=read("AAP_STRIPE_STREAM_ABOVE", 5_000, integer(0, 1 << 31)),
        test_clock=read("AAP_STRIPE_TEST_CLOCK", None, optional),
    )
    if settings.test_clock is not None and is_live:
        reader.problems.append("AAP_STRIPE_TEST_CLOCK: only with a test key: live customers have no clock of their own")
    return settings


def _mail(reader: _Reader) -> MailSettings:
    read = reader.read
    host = read("AAP_SMTP_HOST", None, optional)
    settings = MailSettings(
        host=host,
        port=read("AAP_SMTP_PORT", 587, integer(1, 65535)),
        user=read("AAP_SMTP_USER", None, optional),
        password=read("AAP_SMTP_PASSWORD", None, optional),
        sender=read("AAP_MAIL_FROM", "", str),
        encryption=cast(
            "Literal['starttls', 'tls', 'none']",
            read("AAP_SMTP_ENCRYPTION", "starttls", one_of("starttls", "tls", "none")),
        ),
    )
    if host is not None and "@" not in settings.sender:
        reader.problems.append("AAP_MAIL_FROM: required with AAP_SMTP_HOST, such as billing@example.com")
    return settings


def _peppers(text: str) -> tuple[Pepper, ...]:
    return tuple(Pepper(id=name, key=key) for name, key in ring(text))


def _sealing_keys(text: str) -> tuple[SealingKey, ...]:
    return tuple(SealingKey(id=name, key=key) for name, key in ring(text))


def _signing_seeds(text: str) -> tuple[SigningSeed, ...]:
    return tuple(SigningSeed(signing_seed(part.strip())) for part in text.split(",") if part.strip())
