"""An authenticated caller, with everything that the hot path needs to know about it."""

from __future__ import annotations

import ipaddress

from core.ids import KeyId, OrganizationId, ProjectId, SecretId
from core.settings import Network
from keys.allowances import CHAT_OPERATIONS, Allowance
from keys.budgets import Budget
from keys.caps import Cap
from keys.errors import AddressNotAllowed, ModelNotAllowed, OrganizationSuspended, ScopeMissing
from keys.limits import QuotaPlan, RateLimits

_PLANS_PER_PRINCIPAL_MAX = 256


class Grants:
    """What a key may do, as the database had it."""

    __slots__ = ("ip_networks", "models", "scopes")

    def __init__(
        self, *, scopes: frozenset[str], models: frozenset[str] | None, ip_networks: tuple[Network, ...] | None
    ) -> None:
        self.scopes = scopes
        self.models = models
        self.ip_networks = ip_networks


class Limits:
    """The limits of a caller's key, project and organization, of models in that organization; budgets, allowances."""

    __slots__ = ("allowances", "budgets", "key", "model", "organization", "project")

    def __init__(
        self,
        *,
        key: RateLimits,
        project: RateLimits,
        organization: RateLimits,
        model: dict[str, RateLimits],
        budgets: tuple[Budget, ...] = (),
        allowances: tuple[Allowance, ...] = (),
    ) -> None:
        self.key = key
        self.project = project
        self.organization = organization
        self.model = model
        self.budgets = budgets
        self.allowances = allowances


class Account:
    """What holds for everything that a caller's organization does."""

    __slots__ = ("disconnect_policy", "plan_name", "suspended_for")

    def __init__(
        self, *, disconnect_policy: str, suspended_for: str | None = None, plan_name: str | None = None
    ) -> None:
        self.disconnect_policy = disconnect_policy
        self.suspended_for = suspended_for
        self.plan_name = plan_name


class Principal:
    """One secret of one key. Immutable but for the plans that it builds on demand.

    *usable_until_seconds* is an epoch time: the earlier of the key's expiry and the end of the secret's grace period.
    It is checked on every call, so a deadline is exact on every gateway, cached or not.
    """

    __slots__ = (
        "disconnect_policy",
        "grants",
        "key_id",
        "limits",
        "organization_id",
        "other_plans",
        "plan_name",
        "plans",
        "project_id",
        "secret_id",
        "suspended_for",
        "usable_until_seconds",
    )

    def __init__(
        self,
        *,
        ids: tuple[OrganizationId, ProjectId, KeyId, SecretId],
        grants: Grants,
        limits: Limits,
        usable_until_seconds: float,
        account: Account,
    ) -> None:
        self.organization_id, self.project_id, self.key_id, self.secret_id = ids
        self.grants = grants
        self.limits = limits
        self.usable_until_seconds = usable_until_seconds
        # Flat: the hot path reads these on every call.
        self.disconnect_policy = account.disconnect_policy
        self.suspended_for = account.suspended_for
        """Why the organization is suspended; None while it is not."""
        self.plan_name = account.plan_name
        """The organization's plan, by its name in aap.toml; None without one."""
        self.plans: dict[str, QuotaPlan] = {}
        # Of operations that are no chat: the same ones, unless chat requests are limited.
        counts_chat = any(allowance.unit == "chat_requests" for allowance in limits.allowances)
        self.other_plans: dict[str, QuotaPlan] = {} if counts_chat else self.plans

    def plan_for(self, model: str, operation: str = "chat") -> QuotaPlan:
        """Return what holds for this caller's *operation* on *model*, a name of the catalog."""
        plans = self.plans if operation in CHAT_OPERATIONS else self.other_plans
        plan = plans.get(model)
        if plan is None:
            if len(plans) >= _PLANS_PER_PRINCIPAL_MAX:
                plans.clear()
            limits = self.limits
            plan = plans[model] = QuotaPlan.for_call(
                organization=(self.organization_id, limits.organization),
                project=(self.project_id, limits.project),
                key=(self.key_id, limits.key),
                model=(model, limits.model.get(model, RateLimits())),
                caps=self._caps(operation),
            )
        return plan

    def _caps(self, operation: str) -> list[Cap]:
        units = {"tokens", "chat_requests"} if operation in CHAT_OPERATIONS else {"tokens"}
        allowances = [allowance for allowance in self.limits.allowances if allowance.unit in units]
        return [*self.limits.budgets, *allowances]

    def require_scope(self, scope: str) -> None:
        """Return if the key has *scope*. Errors: ScopeMissing."""
        if scope not in self.grants.scopes:
            raise ScopeMissing(scope)

    def require_active(self) -> None:
        """Return if the organization may begin something new. Errors: OrganizationSuspended."""
        if self.suspended_for is not None:
            raise OrganizationSuspended(self.suspended_for)

    def may_use_model(self, model: str) -> bool:
        """Tell whether the key's allow-list (if it has one) names *model*, after aliases were resolved."""
        return self.grants.models is None or model in self.grants.models

    def require_model(self, model: str) -> None:
        """Return if the key may use *model*. Errors: ModelNotAllowed."""
        if not self.may_use_model(model):
            raise ModelNotAllowed(model)

    def require_address(self, address: str) -> None:
        """Return if the key works from *address*. Errors: AddressNotAllowed, also for an address that is none."""
        networks = self.grants.ip_networks
        if networks is None:
            return
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            raise AddressNotAllowed from None
        mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
        if not any((mapped or parsed) in network for network in networks):
            raise AddressNotAllowed
