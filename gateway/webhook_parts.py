"""What an API process needs for managing webhooks: the keys, and connections and places of its own.

Recovering many deliveries takes seconds: it takes no connection from calls, and no organization takes all of them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Final

import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from core.database import DOWN, Database
from core.errors import Invalid, Unavailable
from core.ids import OrganizationId
from core.sealing import SealBroken, Sealer
from core.settings import Settings
from gateway.routes.places import Bounds, Places
from webhooks.errors import WebhooksNotConfigured
from webhooks.signing import PlatformKeys

_PLACES: Final = Bounds(of_one=1, in_all=3)
# Taking up a hundred thousand deliveries again takes about two seconds.
_STATEMENT_SECONDS_MAX: Final = 30.0
_log = structlog.get_logger(__name__)


class WebhooksUnavailable(Unavailable):
    """PostgreSQL is down, or takes too long. What is due is delivered later."""

    code = "webhooks_unavailable"

    def __init__(self) -> None:
        super().__init__("Webhooks cannot be reached just now. Please try again.", retry_after_seconds=1)


class SecretUnreadable(Unavailable):
    """What is kept sealed was sealed under a key that is not there."""

    code = "webhook_secret_unreadable"

    def __init__(self) -> None:
        super().__init__("The endpoint's secrets cannot be read: the operator has to restore a sealing key.")


class WebhookParts:
    """Made without a sealing key, too: then every act says that webhooks are not set up."""

    def __init__(self, settings: Settings) -> None:
        assert settings.database_url is not None
        self._sealer = Sealer(settings.sealing_keys) if settings.sealing_keys else None
        # Its connections are made when somebody acts: an idle process has none.
        self._database = Database(
            settings.database_url, connections_max=_PLACES.in_all, statement_seconds_max=_STATEMENT_SECONDS_MAX
        )
        self._places = Places(_PLACES)
        self._keys = PlatformKeys(settings.webhook_signing_keys)

    @property
    def sealer(self) -> Sealer:
        """Return what seals secrets. Errors: WebhooksNotConfigured."""
        if self._sealer is None:
            raise WebhooksNotConfigured
        return self._sealer

    def published_keys(self) -> list[dict[str, Any]]:
        """Return the public halves of the platform's keys."""
        return self._keys.published()

    @asynccontextmanager
    async def acting(self, organization_id: OrganizationId) -> AsyncGenerator[AsyncSession]:
        """Open a transaction in a place of the organization's.

        Errors: WebhooksNotConfigured, ShareTaken, PlacesTaken, WebhooksUnavailable, SecretUnreadable; Invalid for a
        text with the character NUL, which PostgreSQL knows none of.
        """
        if self._sealer is None:
            raise WebhooksNotConfigured
        async with self._places.taken(organization_id):
            try:
                async with self._database.transaction() as session:
                    yield session
            except DBAPIError as error:
                if "0x00" in str(error.orig):
                    raise Invalid("A text holds the character NUL.") from None
                _log.warning("webhooks.unavailable", exc_info=error)
                raise WebhooksUnavailable from error
            except DOWN as error:
                _log.warning("webhooks.unavailable", exc_info=error)
                raise WebhooksUnavailable from error
            except SealBroken as error:
                _log.error("webhooks.secret_unreadable", error=str(error))
                raise SecretUnreadable from error

    async def close(self) -> None:
        """Close the connections."""
        await self._database.close()
