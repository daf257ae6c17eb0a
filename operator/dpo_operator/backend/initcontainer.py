"""The init container that training-operator adds to every worker, and a template that every cluster admits.

It waits until the master's name is in the cluster's DNS, which is once the master runs.
"""

from __future__ import annotations

NAME = "init-pytorch"

FIX = (
    "set training-operator's flag --pytorch-init-container-image to an image that the nodes can pull, and its template"
    " /etc/config/initContainer.yaml to one whose securityContext drops all capabilities, forbids privilege escalation"
    " and runs as non-root"
)

# The loop has no end: runPolicy.startTimeoutSeconds bounds it, and an attempt that gave up earlier would have failed
# only because a node pulls the master's image. training-operator gives the master's name without a domain, and the
# template knows neither the namespace nor the cluster's domain. The first of both is in the pod's resolv.conf, as the
# search domain NAMESPACE.svc.DOMAIN. One absolute name makes two DNS queries (A, AAAA); a bare one makes two for each
# search domain. Without such a search domain (a dnsPolicy of the job's own) the bare name is the best that there is.
# training-operator renders it as HTML (html/template): a "<" would begin a tag, and rendering would fail.
# The shell is process 1, which ignores SIGTERM unless it traps it: the pod would last for its whole grace period.
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
  - |
    trap 'exit 143' TERM
    name={{.MasterAddr}}
    for domain in $(sed -n 's/^search //p' /etc/resolv.conf); do
      case $domain in *.svc.*) name={{.MasterAddr}}.$domain.; break ;; esac
    done
    pause=1
    until nslookup "$name" | grep -q ^Name:; do
      echo "waiting for $name"
      sleep $pause & wait $!
      [ $pause -ge 10 ] || pause=$((pause + 1))
    done
"""
"""training-operator's /etc/config/initContainer.yaml, with a security context that restricted Pod Security admits."""
