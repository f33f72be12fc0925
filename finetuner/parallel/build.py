"""A loss module and a layout over ranks -> the engine that carries it out."""

from collections.abc import Callable
from importlib import import_module

from finetuner.parallel.engine import Engine, EngineRequest


def build_engine(request: EngineRequest) -> Engine:
    """Lay the loss module over the ranks, in place, and read its lazy weights, by `build` of parallel/<engine>.py.

    Raises ModelError for a model that the engine cannot take. Each engine asserts that it is the one asked for.
    """
    build: Callable[[EngineRequest], Engine] = import_module(f"finetuner.parallel.{request.plan.engine}").build
    return build(request)
