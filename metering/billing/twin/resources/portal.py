"""The customers' portal: sessions whose page lets a customer cancel, resume and switch plans."""

from __future__ import annotations

from metering.billing.twin.errors import Object
from metering.billing.twin.fields import Fields, merge_metadata
from metering.billing.twin.listing import only, page
from metering.billing.twin.routing import Call, get, post
from metering.billing.twin.shapes import blank
from metering.billing.twin.world import World

_CONFIGURATION = "billing_portal.configuration"


def create_session(world: World, call: Call) -> Object:
    """Create a session; its `url` is a page of this twin."""
    fields = call.fields
    customer = world.refer("customer", fields.must("customer"), "customer")
    chosen = fields.string("configuration")
    configuration = world.refer(_CONFIGURATION, chosen, "configuration") if chosen else default_configuration(world)
    identity = world.make_id("bps")
    made = blank(
        "billing_portal.session",
        id=identity,
        configuration=configuration["id"],
        created=world.now(customer["id"]),
        customer=customer["id"],
        return_url=fields.string("return_url") or configuration["default_return_url"],
        url=f"{world.base_url}/portal/{identity}",
    )
    world.add(made)
    world.emit("billing_portal.session.created", made)
    return made


def default_configuration(world: World) -> Object:
    """The configuration that is used when none is named: everything is allowed."""
    for one in world.tables[_CONFIGURATION].values():
        if one["is_default"]:
            return one
    everything = {
        "subscription_cancel": {"enabled": "true"},
        "subscription_update": {"enabled": "true", "default_allowed_updates": ["price"]},
        "payment_method_update": {"enabled": "true"},
        "invoice_history": {"enabled": "true"},
    }
    made = _made(world, Fields({"features": everything}))
    made["is_default"] = True
    return made


def _made(world: World, fields: Fields) -> Object:
    profile = fields.inner("business_profile")
    names = ("headline", "privacy_policy_url", "terms_of_service_url")
    made = blank(
        _CONFIGURATION,
        id=world.make_id("bpc"),
        business_profile={name: profile.string(name) for name in names},
        created=world.wall(),
        default_return_url=fields.string("default_return_url"),
        features=_features(fields.inner("features")),
        metadata=merge_metadata({}, fields),
        updated=world.wall(),
    )
    return world.add(made)


def _features(fields: Fields) -> Object:
    update, cancel, profile = (
        fields.inner(name) for name in ("subscription_update", "subscription_cancel", "customer_update")
    )
    methods = fields.inner("payment_method_update")
    return {
        "customer_update": {
            "allowed_updates": profile.strings("allowed_updates"),
            "enabled": profile.flag("enabled") or False,
        },
        "invoice_history": {"enabled": fields.inner("invoice_history").flag("enabled") or False},
        "payment_method_update": {
            "enabled": methods.flag("enabled") or False,
            "payment_method_configuration": None,
        },
        "subscription_cancel": {
            "cancellation_reason": {"enabled": False, "options": []},
            "enabled": cancel.flag("enabled") or False,
            "mode": cancel.string("mode") or "at_period_end",
            "proration_behavior": cancel.string("proration_behavior") or "none",
        },
        "subscription_pause": {"duration": {"interval_options": [], "type": "indefinite"}, "enabled": False},
        "subscription_update": {
            "billing_cycle_anchor": None,
            "default_allowed_updates": update.strings("default_allowed_updates"),
            "enabled": update.flag("enabled") or False,
            "products": [
                {"product": row.must("product"), "prices": row.strings("prices")} for row in update.rows("products")
            ],
            "proration_behavior": update.string("proration_behavior") or "none",
            "schedule_at_period_end": {"conditions": []},
            "trial_update_behavior": "end_trial",
        },
    }


def create_configuration(world: World, call: Call) -> Object:
    """Create a configuration. The features that the twin's page knows are kept."""
    return _made(world, call.fields)


def retrieve_configuration(world: World, call: Call) -> Object:
    """One configuration."""
    return world.find(_CONFIGURATION, call.id)


def list_configurations(world: World, call: Call) -> Object:
    """Configurations, by `active` and `is_default`."""
    found = only(world.tables[_CONFIGURATION].values(), call.fields, "active", "is_default")
    return page(found, call.fields, call.url)


ROUTES = [
    post("/v1/billing_portal/sessions", create_session),
    post("/v1/billing_portal/configurations", create_configuration),
    get("/v1/billing_portal/configurations", list_configurations),
    get("/v1/billing_portal/configurations/{id}", retrieve_configuration),
]
