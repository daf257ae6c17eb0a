"""Whom the process is to the API server, and where that is."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from pathlib import Path

import kopf

_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")

_log = logging.getLogger(__name__)


class LoginError(Exception):
    """There is neither a kubeconfig nor a service account."""


def use(kubeconfig: str) -> None:
    """Take this kubeconfig from now on; empty: what ``connection`` finds by itself."""
    if kubeconfig:
        os.environ["KUBECONFIG"] = kubeconfig  # kopf reads it from the environment alone


def in_cluster() -> bool:
    """Tell whether this process is a pod with a service-account token, and nobody pointed it elsewhere."""
    return "KUBECONFIG" not in os.environ and _TOKEN.exists()


def connection() -> kopf.ConnectionInfo:
    """Read the credentials anew: $KUBECONFIG, else the pod's service account, else ~/.kube/config.

    Raises LoginError where there is none of them.
    """
    settings = kopf.OperatorSettings()
    # A proxy of the environment is the user's wish out of the cluster, as it is for kubectl.
    settings.networking.trust_env = True
    if in_cluster():
        found = kopf.login_with_service_account(settings=settings)
    else:
        try:
            found = kopf.login_with_kubeconfig(settings=settings)
        except (OSError, KeyError, ValueError, kopf.LoginError) as error:
            raise LoginError(
                f"the kubeconfig {os.environ.get('KUBECONFIG', '~/.kube/config')} cannot be used: {error}"
            ) from error
        if found is not None and not _can_prove_itself(found):
            # Plugins (exec) are the client library's business; it costs 40 MB, so it is loaded for them alone.
            found = kopf.login_via_client(logger=_log, settings=settings)
            if found is None and find_spec("kubernetes") is None:  # the image is for pods and goes without
                raise LoginError(
                    "the kubeconfig uses a credential plugin (exec), which needs the Python package kubernetes; it is "
                    "not installed: use a kubeconfig with a token or a certificate, or install '.[operator]'"
                )
    if found is None:
        raise LoginError("no cluster credentials found: set KUBECONFIG, or run in a pod with a service account")
    if not isinstance(found, kopf.ConnectionInfo):
        raise LoginError(f"unsupported credentials of type {type(found).__name__}")
    return found


def _can_prove_itself(info: kopf.ConnectionInfo) -> bool:
    plain = info.server is not None and info.server.startswith("http://")
    return plain or bool(info.token or info.certificate_path or info.certificate_data or info.username)
