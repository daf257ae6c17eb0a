"""The part of the engine's state that a checkpoint holds, in Megatron-Core's sharded form."""

from collections.abc import Callable
from typing import Any

from dpo_trainer import bridge, torch_adam
from dpo_trainer.engine import Engine

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
"""A layout that can be loaded with any number of processes."""

Sharded = dict[str, Any]


def _sharded(engine: Engine, *, loading: bool) -> Sharded:
    """Return ``model`` (trainable parameters only) and ``optimizer``."""
    trained = {name for name, parameter in engine.model.named_parameters() if parameter.requires_grad}
    with bridge.construction():
        model = engine.model.sharded_state_dict(metadata=_METADATA)
        model = {name: value for name, value in model.items() if name in trained}
        optimizer = engine.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_METADATA)
    return {"model": model, "optimizer": optimizer}


def collect(engine: Engine) -> Sharded:
    """Return the engine's state for saving. A collective: the distributed optimizer's shards are gathered."""
    return _sharded(engine, loading=False)


def restore(engine: Engine, load: Callable[[Sharded], Sharded]) -> None:
    """Load a saved state into the engine. A collective. ``load`` reads the state into the structure passed to it."""
    torch_adam.allocate(engine.optimizer)
    with bridge.construction():
        loaded = load(_sharded(engine, loading=True))
        _, unexpected = engine.model.load_state_dict(loaded["model"], strict=False)
        assert not unexpected  # noqa: S101 - the names are those of this model
        torch_adam.load(engine.optimizer, loaded["optimizer"])
