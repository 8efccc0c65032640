"""The environment, read once: every problem at once, no secret in any of them."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import pytest

from core.settings import Pepper, Settings, SettingsInvalid, load
from tests.harness.gateway import ROOT

PEPPER = "p1:" + "ab" * 32
STORES = {"DATABASE_URL": "postgresql://u:hunter2@db/x", "REDIS_URL": "redis://:hunter2@r/0", "AAP_KEY_PEPPERS": PEPPER}


def problems(environ: dict[str, str]) -> list[str]:
    with pytest.raises(SettingsInvalid) as caught:
        load(environ)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def test_an_empty_environment_means_embedded_stores_on_this_machine() -> None:
    settings = load({})
    assert (settings.database_url, settings.redis_url, settings.peppers) == (None, None, ())
    assert (settings.edge.host, settings.edge.port) == ("127.0.0.1", 8080)
    assert (settings.log.format, settings.log.level, settings.log.requests) == ("json", "info", True)
    assert settings.edge.trusted_proxies == ()
    assert settings.data_dir == Path(".data").absolute()


def test_everything_can_be_set_and_blanks_count_as_unset() -> None:
    settings = load(
        {
            **STORES,
            "AAP_HOST": " :: ",
            "AAP_PORT": "1",
            "AAP_WORKERS": " ",
            "AAP_TRUSTED_PROXIES": "10.0.0.1/8, 2001:db8::/32,",
            "AAP_LOG_FORMAT": "Console",
            "AAP_LOG_REQUESTS": "no",
            "AAP_DRAIN_SECONDS": "0.5",
            "AAP_KEY_PEPPERS": f"{PEPPER}, p0:{'00' * 32}",
        }
    )
    assert (settings.edge.host, settings.edge.port, settings.edge.drain_seconds) == ("::", 1, 0.5)
    assert settings.edge.workers == load({}).edge.workers
    assert settings.edge.trusted_proxies == (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("2001:db8::/32"))
    assert (settings.log.format, settings.log.requests) == ("console", False)
    assert settings.peppers == (Pepper("p1", b"\xab" * 32), Pepper("p0", bytes(32)))


def test_every_problem_is_reported_at_once_by_its_variable() -> None:
    wrong = {
        "AAP_PORT": "65536",
        "AAP_WORKERS": "0",
        "AAP_BODY_BYTES_MAX": "10MB",
        "AAP_IN_FLIGHT_MAX": "-1",
        "AAP_QUEUED_MAX": "--1",
        "AAP_DRAIN_SECONDS": "soon",
        "AAP_QUEUE_SECONDS_MAX": "nan",
        "AAP_HEADER_SECONDS_MAX": "inf",
        "AAP_TRUSTED_PROXIES": "10.0.0.0/8, everyone",
        "AAP_LOG_FORMAT": "xml",
        "AAP_LOG_LEVEL": "loud",
        "AAP_LOG_REQUESTS": "maybe",
        "AAP_KEY_PEPPERS": "p1:tooshort",
        "DATABASE_URL": "mysql://x",
        "REDIS_URL": "127.0.0.1:6379",
    }
    named = [line.partition(":")[0] for line in problems(wrong)]
    assert sorted(named) == sorted(wrong)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"DATABASE_URL": STORES["DATABASE_URL"], "AAP_KEY_PEPPERS": PEPPER}, "REDIS_URL"),
        ({"REDIS_URL": STORES["REDIS_URL"]}, "DATABASE_URL"),
        ({**STORES, "AAP_KEY_PEPPERS": ""}, "AAP_KEY_PEPPERS"),
        ({**STORES, "AAP_KEY_PEPPERS": f"{PEPPER},p1:{'00' * 32}"}, "AAP_KEY_PEPPERS"),
        ({**STORES, "AAP_KEY_PEPPERS": PEPPER.upper()}, "AAP_KEY_PEPPERS"),
    ],
)
def test_half_a_configuration_is_refused(environ: dict[str, str], named: str) -> None:
    [problem] = problems(environ)
    assert named in problem


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "postgres:hunter2@db"),
        ("DATABASE_URL", "mysql://u:hunter2@db"),
        ("REDIS_URL", "http://:hunter2@r"),
        ("AAP_KEY_PEPPERS", "p1:hunter2"),
        ("AAP_KEY_PEPPERS", f"p1:{'ab' * 31}hunter2"),
    ],
)
def test_no_problem_shows_a_secret(name: str, value: str) -> None:
    for problem in problems({**STORES, "AAP_PORT": "x", name: value}):
        assert "hunter2" not in problem
        assert "abab" not in problem


def test_a_pepper_is_not_in_what_is_printed() -> None:
    shown = repr(load(STORES).peppers) + str(load(STORES))
    assert "ab" * 32 not in shown
    assert repr(b"\xab") not in shown
    assert "p1" in shown


def test_settings_do_not_change() -> None:
    settings: Settings = load({})
    with pytest.raises(AttributeError):
        settings.data_dir = Path()  # type: ignore[misc]


def test_every_variable_stands_in_the_example_file() -> None:
    """Guarantee: `.env.example` names each variable that is read, and nothing that is not."""
    example = ROOT / ".env.example"
    read = set(re.findall(r'read\("([A-Z_]+)"', (ROOT / "core" / "settings.py").read_text()))
    assert len(read) >= 15
    if example.exists():
        named = set(re.findall(r"^#?\s*([A-Z][A-Z0-9_]+)=", example.read_text(), re.MULTILINE))
        assert read - named == set()
        everywhere = "".join(
            path.read_text()
            for package in ("core", "keys", "inference", "gateway")
            for path in (ROOT / package).rglob("*.py")
        )
        assert {name for name in named if name not in everywhere} == set()
