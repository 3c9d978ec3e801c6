"""How the gateway leaves: what is in flight is answered or refused, and nothing is left without an answer."""

from __future__ import annotations

import asyncio

import pytest

from rayrm.errors import RewardUnavailableError
from rayrm.serve.gateway import InFlight
from rayrm.serve.request import ScoreRequest, ScoreResult

REQUEST = ScoreRequest(inputs=[[1, 2]])


class Service:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()

    async def ask(self, request: ScoreRequest) -> ScoreResult:
        await self.may_answer.wait()
        return ScoreResult(scores=[0.5], version="one")


@pytest.mark.parametrize("is_answered", [True, False])
def test_what_is_in_flight_is_answered_or_refused_and_what_comes_is_refused(is_answered: bool) -> None:
    async def told() -> None:
        service = Service()
        in_flight = InFlight(service.ask)
        asked = asyncio.create_task(in_flight.ask(REQUEST))
        await asyncio.sleep(0)
        checks = 0

        def has_replicas() -> bool:
            nonlocal checks
            checks += 1
            return is_answered or checks < 3

        leaving = asyncio.create_task(asyncio.to_thread(in_flight.leave, 60.0, has_replicas))
        while not checks:
            await asyncio.sleep(0.01)
        with pytest.raises(RewardUnavailableError, match="is being stopped"):
            await in_flight.ask(REQUEST)
        if is_answered:
            service.may_answer.set()
            assert (await asked).scores == [0.5]
        else:
            with pytest.raises(RewardUnavailableError, match="is being stopped"):
                await asked
        await leaving

    asyncio.run(told())


def test_requests_that_wait_too_long_are_cut() -> None:
    async def told() -> None:
        in_flight = InFlight(Service().ask)
        asked = [asyncio.create_task(in_flight.ask(REQUEST)) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.to_thread(in_flight.leave, 0.2, lambda: True)
        for failure in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(failure, RewardUnavailableError)

    asyncio.run(told())


def test_a_caller_that_leaves_is_no_refusal() -> None:
    async def told() -> None:
        asked = asyncio.create_task(InFlight(Service().ask).ask(REQUEST))
        await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked

    asyncio.run(told())
