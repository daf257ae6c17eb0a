"""Weights & Biases, online or offline. The API key comes from the environment or `wandb login`, never from a spec."""

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from dpo_api.errors import AccessDeniedError, InvalidSpecError
from dpo_trainer.metrics.writer import run_id

_PUBLIC = "https://api.wandb.ai"


class WandbSettings(Protocol):
    """The fields of a spec's ``logging.wandb`` that are used here; see dpo_api.spec."""

    @property
    def project(self) -> str: ...  # noqa: D102
    @property
    def entity(self) -> str | None: ...  # noqa: D102
    @property
    def name(self) -> str | None: ...  # noqa: D102
    @property
    def tags(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def mode(self) -> str: ...  # noqa: D102
    @property
    def base_url(self) -> str | None: ...  # noqa: D102


def check(settings: WandbSettings) -> None:
    """Raise InvalidSpecError when the package is missing, AccessDeniedError when ``online`` has no API key."""
    try:
        import wandb  # noqa: F401
    except ImportError:
        raise InvalidSpecError(
            "spec.logging.wandb: the wandb package is not installed here; install it or remove the section"
        ) from None
    if settings.mode == "online" and not _has_key(_server_of(settings)):
        raise AccessDeniedError(
            "spec.logging.wandb: no API key; set $WANDB_API_KEY (on a cluster: apiKeySecretRef) or mode: offline"
        )


class WandbWriter:
    """One W&B run per run directory. Every attempt continues it, and steps that it has already are not repeated."""

    def __init__(
        self, settings: WandbSettings, *, job: str, run_dir: str, folder: Path, config: Mapping[str, Any]
    ) -> None:
        """Start or continue the run; may raise anything that the library raises.

        folder: W&B's files go into its ``wandb/``. config: shown beside the curves.
        """
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        # The library would upload the program's arguments, the git remote and the user's name, which no one asked for.
        options = wandb.Settings(
            base_url=_server_of(settings),
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_save_requirements=False,
            init_timeout=30,
            finish_timeout=60,
        )
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=settings.name or job,
            tags=list(settings.tags),
            mode="offline" if settings.mode == "offline" else "online",
            dir=str(folder),
            id=run_id(run_dir),
            resume="allow",
            config=dict(config),
            settings=options,
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See MetricsWriter."""
        self._run.log(dict(metrics), step=step)

    def flush(self) -> None:
        """Do nothing: W&B uploads from its own process."""

    def close(self) -> None:
        """Upload the rest, for at most a minute."""
        self._run.finish()


def _server_of(settings: WandbSettings) -> str:
    return settings.base_url or os.environ.get("WANDB_BASE_URL") or _PUBLIC


def _has_key(base_url: str) -> bool:
    """Return whether the library finds a key without a prompt, at which a training process would wait for ever."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return known.authenticators(urlsplit(base_url).hostname or "") is not None
