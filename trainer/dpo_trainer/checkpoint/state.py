"""What a checkpoint holds of the engine, in Megatron-Core's sharded form."""

from collections.abc import Callable
from typing import Any

from dpo_trainer import bridge, torch_adam
from dpo_trainer.engine import Engine

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
"""A layout that any number of processes can read."""

Sharded = dict[str, Any]


def _sharded(engine: Engine, *, loading: bool) -> Sharded:
    """``model`` (only what is trained) and ``optimizer``."""
    trained = {name for name, parameter in engine.model.named_parameters() if parameter.requires_grad}
    with bridge.construction():
        model = engine.model.sharded_state_dict(metadata=_METADATA)
        model = {name: value for name, value in model.items() if name in trained}
        optimizer = engine.optimizer.sharded_state_dict(model, is_loading=loading, metadata=_METADATA)
    return {"model": model, "optimizer": optimizer}


def collect(engine: Engine) -> Sharded:
    """The engine's state for saving. A collective: with the distributed optimizer its shards are gathered."""
    return _sharded(engine, loading=False)


def restore(engine: Engine, load: Callable[[Sharded], Sharded]) -> None:
    """Put a saved state into the engine; ``load`` reads it in the shape that it is given. A collective."""
    torch_adam.allocate(engine.optimizer)
    with bridge.construction():
        loaded = load(_sharded(engine, loading=True))
        _, unexpected = engine.model.load_state_dict(loaded["model"], strict=False)
        assert not unexpected  # noqa: S101 - the names came from this very model
        torch_adam.load(engine.optimizer, loaded["optimizer"])
