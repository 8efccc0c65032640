"""`/v1/models`: what the caller may use."""

from __future__ import annotations

import msgspec
from litestar import get

from gateway.runtime import Runtime
from inference.catalog import Model
from inference.errors import ModelNotFound
from keys.principal import Principal


class ModelObject(msgspec.Struct, frozen=True):
    """A model in OpenAI's form."""

    id: str
    created: int
    owned_by: str
    object: str = "model"


class ModelList(msgspec.Struct, frozen=True):
    """All models in OpenAI's form."""

    data: list[ModelObject]
    object: str = "list"


@get("/v1/models", summary="List models", operation_id="listModels")
async def list_models(principal: Principal, runtime: Runtime) -> ModelList:
    """Return the models that the key may use."""
    principal.require_scope("models:read")
    catalog = runtime.catalog_file.catalog
    return ModelList([_object(model) for model in catalog if principal.may_use_model(model.name)])


@get("/v1/models/{model:path}", summary="Get a model", operation_id="retrieveModel")
async def get_model(model: str, principal: Principal, runtime: Runtime) -> ModelObject:
    """Return one model; its id may hold slashes. One that the key may not use is not there."""
    principal.require_scope("models:read")
    name = model.removeprefix("/")
    found = runtime.catalog_file.catalog.find(name)
    if found is None or not principal.may_use_model(found.name):
        raise ModelNotFound(name)
    return _object(found)


def _object(model: Model) -> ModelObject:
    return ModelObject(model.name, model.created, model.owned_by)


ROUTES = (list_models, get_model)
