"""The init container that training-operator adds to every worker, and a template that every cluster admits."""

from __future__ import annotations

NAME = "init-pytorch"

FIX = (
    "set training-operator's flag --pytorch-init-container-image to an image that the nodes can pull, and its template"
    " /etc/config/initContainer.yaml to one whose securityContext drops all capabilities, forbids privilege escalation"
    " and runs as non-root"
)

TEMPLATE = """\
- name: init-pytorch
  image: {{.InitContainerImage}}
  imagePullPolicy: IfNotPresent
  resources: {limits: {cpu: 100m, memory: 20Mi}, requests: {cpu: 50m, memory: 10Mi}}
  securityContext:
    allowPrivilegeEscalation: false
    capabilities: {drop: [ALL]}
    runAsNonRoot: true
    runAsUser: 65534
    seccompProfile: {type: RuntimeDefault}
  command:
  - sh
  - -c
  - >-
    for i in $(seq {{.MaxTries}}); do nslookup {{.MasterAddr}} | grep -q ^Name: && exit 0; sleep 1; done; exit 1
"""
"""training-operator's /etc/config/initContainer.yaml, with a security context that restricted Pod Security admits."""
