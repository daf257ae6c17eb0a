"""The credentials of the process, and the address of the API server."""

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
    """Use this kubeconfig from now on; empty: the one that ``connection`` finds."""
    if kubeconfig:
        os.environ["KUBECONFIG"] = kubeconfig  # kopf reads it from the environment alone


def in_cluster() -> bool:
    """Whether this process runs in a pod with a service-account token and no kubeconfig is set."""
    return "KUBECONFIG" not in os.environ and _TOKEN.exists()


def connection() -> kopf.ConnectionInfo:
    """Read the credentials again: $KUBECONFIG, else the pod's service account, else ~/.kube/config.

    Raises LoginError where there is none of them.
    """
    settings = kopf.OperatorSettings()
    # Outside the cluster, a proxy from the environment is used, as kubectl does.
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
            # Credential plugins (exec) need the kubernetes package; it takes 40 MB, so it is loaded only for them.
            found = kopf.login_via_client(logger=_log, settings=settings)
            if (
                found is None and find_spec("kubernetes") is None
            ):  # the operator's image does not have it: pods do not need it
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
