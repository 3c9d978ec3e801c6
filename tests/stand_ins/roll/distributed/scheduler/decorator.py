"""As roll/distributed/scheduler/decorator.py of alibaba/ROLL at 8eb27cc2: how `Cluster` finds a method."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum, auto
from functools import wraps
from typing import Any

BIND_WORKER_METHOD_FLAG = "BIND_WORKER_METHOD_FLAG"


class Dispatch(Enum):
    ONE_TO_ALL = auto()
    DP_MP_COMPUTE = auto()


def register(dispatch_mode: Dispatch, *, clear_cache: bool = True) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        if asyncio.iscoroutinefunction(function):

            @wraps(function)
            async def inner(*args: Any, **kwargs: Any) -> Any:
                return await function(*args, **kwargs)
        else:

            @wraps(function)
            def inner(*args: Any, **kwargs: Any) -> Any:
                return function(*args, **kwargs)

        setattr(inner, BIND_WORKER_METHOD_FLAG, {"dispatch_mode": dispatch_mode, "execute_mode": "ALL"})
        return inner

    return decorate
