"""Which deployment serves a call: weights, the breaker, and what a provider's Retry-After does."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest

from inference.catalog import Deployment, Model, build
from inference.errors import NoDeploymentAvailable
from inference.routing import Router


def model_of(*weights: int) -> Model:
    deployments = [{"provider": "p", "model": f"m{at}", "weight": weight} for at, weight in enumerate(weights)]
    tables = {
        "providers": {"p": {"kind": "openai", "base_url": "http://127.0.0.1:1/v1"}},
        "models": {"m": {"deployments": deployments}},
    }
    return build(tables, {}).models["m"]


class Passing:
    """Time that passes when told to, for the router."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = time.monotonic()
        monkeypatch.setattr("inference.routing.time.monotonic", lambda: self.now)


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Passing:
    return Passing(monkeypatch)


@pytest.fixture
def router() -> Router:
    made = Router()
    made._random = random.Random(1)
    return made


def fail(router: Router, deployment: Deployment, times: int = 5) -> None:
    for _ in range(times):
        router.failed(deployment)


class TestWeights:
    def test_calls_are_spread_by_weight(self, router: Router) -> None:
        model = model_of(1, 2, 7)
        counts = Counter(router.choose(model, ()).model for _ in range(10_000))
        assert [round(counts[f"m{at}"] / 1_000) for at in range(3)] == [1, 2, 7]

    def test_weight_nothing_serves_only_when_all_others_cannot(self, router: Router, passing: Passing) -> None:
        model = model_of(0, 1, 1)
        spare, *others = model.deployments
        assert {router.choose(model, ()) for _ in range(500)} == set(others)
        assert {router.choose(model, [others[0]]) for _ in range(100)} == {others[1]}
        assert router.choose(model, others) is spare
        for deployment in others:
            fail(router, deployment)
        assert {router.choose(model, ()) for _ in range(100)} == {spare}

    def test_only_weights_of_nothing_still_serve(self, router: Router) -> None:
        assert router.choose(model_of(0, 0), ()).model == "m0"

    def test_a_failed_one_is_tried_again_only_without_another(self, router: Router) -> None:
        model = model_of(1, 1)
        first, second = model.deployments
        assert router.has_other(model, [first])
        assert not router.has_other(model, [first, second])
        assert {router.choose(model, [first]) for _ in range(50)} == {second}
        assert {router.choose(model, [first, second]) for _ in range(50)} == {first, second}


class TestBreaker:
    def test_five_failures_in_a_row_open_it_for_ten_seconds(self, router: Router, passing: Passing) -> None:
        model = model_of(1)
        [deployment] = model.deployments
        fail(router, deployment, 4)
        assert router.state_of(deployment) == "closed"
        assert router.choose(model, ()) is deployment
        fail(router, deployment, 1)
        assert router.state_of(deployment) == "open"
        passing.now += 4
        with pytest.raises(NoDeploymentAvailable) as caught:
            router.choose(model, ())
        assert caught.value.retry_after_seconds == pytest.approx(6)
        passing.now += 6
        assert router.state_of(deployment) == "half_open"

    def test_a_success_in_between_starts_the_count_anew(self, router: Router) -> None:
        [deployment] = model_of(1).deployments
        for _ in range(5):
            fail(router, deployment, 4)
            router.succeeded(deployment)
        assert router.state_of(deployment) == "closed"

    @pytest.mark.parametrize("outcome", ["succeeded", "failed", "released"])
    def test_half_open_lets_one_call_try(self, router: Router, passing: Passing, outcome: str) -> None:
        model = model_of(1)
        [deployment] = model.deployments
        fail(router, deployment)
        passing.now += 10
        assert router.choose(model, ()) is deployment
        for _ in range(3):
            with pytest.raises(NoDeploymentAvailable) as caught:
                router.choose(model, ())
            assert caught.value.retry_after_seconds is not None
            assert caught.value.retry_after_seconds > 0
        getattr(router, outcome)(deployment)
        if outcome == "failed":
            assert router.state_of(deployment) == "open"
            with pytest.raises(NoDeploymentAvailable):
                router.choose(model, ())
            passing.now += 10
        assert router.choose(model, ()) is deployment
        assert router.state_of(deployment) == ("closed" if outcome == "succeeded" else "half_open")

    def test_a_try_that_nothing_is_heard_of_bars_nobody_for_longer_than_a_rest(
        self, router: Router, passing: Passing
    ) -> None:
        """Guarantee: a caller who hangs up while trying a deployment does not take it from everybody else."""
        model = model_of(1)
        fail(router, model.deployments[0])
        passing.now += 10
        router.choose(model, ())
        with pytest.raises(NoDeploymentAvailable):
            router.choose(model, ())
        passing.now += 10
        assert router.choose(model, ()) is model.deployments[0]

    def test_a_rested_one_gets_no_calls_while_another_serves(self, router: Router, passing: Passing) -> None:
        model = model_of(100, 1)
        fail(router, model.deployments[0])
        assert {router.choose(model, ()) for _ in range(100)} == {model.deployments[1]}
        assert not router.has_other(model, [model.deployments[1]])

    def test_health_is_known_by_id_also_after_a_reload(self, router: Router, passing: Passing) -> None:
        fail(router, model_of(1).deployments[0])
        with pytest.raises(NoDeploymentAvailable):
            router.choose(model_of(1), ())


class TestRetryAfter:
    @pytest.mark.parametrize(("asked", "rests"), [(3.0, 3.0), (0.0, 0.0), (3_600.0, 60.0)])
    def test_it_is_obeyed_at_once_and_up_to_a_minute(
        self, router: Router, passing: Passing, asked: float, rests: float
    ) -> None:
        model = model_of(1)
        [deployment] = model.deployments
        router.failed(deployment, rest_seconds=asked)
        if rests:
            passing.now += rests - 0.01
            with pytest.raises(NoDeploymentAvailable):
                router.choose(model, ())
        passing.now += 0.01
        assert router.choose(model, ()) is deployment

    def test_the_shortest_rest_is_what_the_caller_is_told(self, router: Router, passing: Passing) -> None:
        model = model_of(1, 1)
        for deployment, seconds in zip(model.deployments, (30.0, 5.0), strict=True):
            router.failed(deployment, rest_seconds=seconds)
        with pytest.raises(NoDeploymentAvailable) as caught:
            router.choose(model, ())
        assert caught.value.retry_after_seconds == pytest.approx(5)
