"""This machine as the cluster's node: bridge, containerd, kubelet, kube-proxy, CoreDNS."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

from dpo_testing.kubeapi import Api
from dpo_testing.realcluster import daemons
from dpo_testing.realcluster.layout import BRIDGE, GATEWAY, NODE, PAUSE_IMAGE, POD_RANGE, Layout
from dpo_testing.s3server import tool

FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
_NODES = ("v1", "nodes")

CONTAINERD = """\
version = 2
root = "{cache}/containerd"
state = "{run}/containerd-state"
[grpc]
  address = "{run}/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{run}/containerd-opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{run}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
"""

BRIDGE_ADDRESS = "02:00:0a:f4:00:01"
"""Fixed: else the bridge takes the lowest one of its ports, which changes as pods come and go, and for up to a minute a
pod sends to the old one what it has for the gateway, DNS questions first."""

COREFILE = """\
.:53 {{
    bind {gateway}
    errors
    health 127.0.0.1:8085
    ready 127.0.0.1:8181
    kubernetes cluster.local in-addr.arpa {{
        kubeconfig {kubeconfig}
        pods insecure
        ttl 1
    }}
}}
"""


def network(layout: Layout) -> None:
    """Make the bridge and the pods' network configuration."""
    if not Path(f"/sys/class/net/{BRIDGE}").exists():
        for command in (
            ["link", "add", BRIDGE, "address", BRIDGE_ADDRESS, "type", "bridge"],
            ["addr", "add", f"{GATEWAY}/24", "dev", BRIDGE],
            ["link", "set", BRIDGE, "up"],
        ):
            subprocess.run(["ip", *command], check=True, capture_output=True)
    before = layout.run / "ip_forward"
    if not before.exists():
        before.write_text(FORWARDING.read_text())
    FORWARDING.write_text("1")
    ipam = {
        "type": "host-local",
        "dataDir": str(layout.run / "cni-ipam"),
        "ranges": [[{"subnet": POD_RANGE, "rangeStart": "10.244.0.10", "gateway": GATEWAY}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "ipMasq": False, "hairpinMode": True, "ipam": ipam}
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    folder = layout.run / "cni"
    folder.mkdir(exist_ok=True)
    plugins = {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, ports]}
    (folder / "10-bridge.conflist").write_text(json.dumps(plugins))


def containers(layout: Layout) -> None:
    """Start containerd; the kubelet and BuildKit share its images."""
    config = layout.etc / "containerd.toml"
    config.write_text(CONTAINERD.format(cache=layout.cache, run=layout.run, pause=PAUSE_IMAGE))
    daemons.start(layout, "containerd", ["containerd", "--config", config, "--log-level=warn"])
    daemons.wait_until(layout, "containerd", lambda: ctr(layout, "version").returncode == 0)


def ctr(layout: Layout, *words: str) -> subprocess.CompletedProcess[str]:
    """Run containerd's own client in Kubernetes' namespace."""
    command = ["ctr", "-a", str(layout.containerd_socket), "-n", "k8s.io", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def start(layout: Layout, api: Api) -> None:
    """Start the node's programs; return once the node is ready and names resolve."""
    (layout.etc / "resolv.conf").write_text("")
    config = layout.etc / "kubelet.json"
    config.write_text(json.dumps(_kubelet(layout)))
    daemons.start(layout, "kubelet", [
        tool("kubelet"), f"--config={config}", f"--kubeconfig={layout.kubeconfig('kubelet')}",
        f"--hostname-override={NODE}", f"--node-ip={GATEWAY}", f"--root-dir={layout.run}/kubelet", "--v=1",
    ])  # fmt: skip
    corefile = layout.etc / "Corefile"
    corefile.write_text(COREFILE.format(gateway=GATEWAY, kubeconfig=layout.admin))
    daemons.start(layout, "coredns", [tool("coredns"), "-conf", corefile])
    proxy = layout.etc / "kube-proxy.json"
    proxy.write_text(json.dumps(_proxy(layout)))
    daemons.start(layout, "kube-proxy", [tool("kube-proxy"), f"--config={proxy}", f"--hostname-override={NODE}"])
    daemons.wait_until(layout, "kubelet", lambda: _ready(api))
    daemons.wait_until(layout, "coredns", lambda: _resolves("kubernetes.default.svc.cluster.local"))


def _ready(api: Api) -> bool:
    conditions = api.get(_NODES, None, NODE).get("status", {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _resolves(name: str) -> bool:
    """Ask the cluster's DNS for an address record."""
    question = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    query = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + question + b"\x00\x00\x01\x00\x01"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.settimeout(1.0)
        asker.sendto(query, (GATEWAY, 53))
        answer = asker.recv(512)
    return answer[3] & 0x0F == 0 and int.from_bytes(answer[6:8]) > 0


def _kubelet(layout: Layout) -> dict[str, object]:
    p = layout.pki
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "address": GATEWAY, "readOnlyPort": 0, "healthzBindAddress": "127.0.0.1",
        "authentication": {
            "anonymous": {"enabled": False}, "webhook": {"enabled": True}, "x509": {"clientCAFile": f"{p}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{p}/kubelet-serving.crt", "tlsPrivateKeyFile": f"{p}/kubelet-serving.key",
        "containerRuntimeEndpoint": f"unix://{layout.containerd_socket}",
        "cgroupDriver": "cgroupfs", "failSwapOn": False, "failCgroupV1": False,
        "clusterDomain": "cluster.local", "clusterDNS": [GATEWAY], "resolvConf": str(layout.etc / "resolv.conf"),
        "podLogsDir": f"{layout.run}/podlogs", "volumePluginDir": f"{layout.run}/kubelet-plugins",
        # A local image that is collected can't be pulled again.
        "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
        # A full disk of this machine must not cost the node its images either: 0 % means never.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "0%", "imagefs.available": "0%",
                         "nodefs.inodesFree": "0%", "imagefs.inodesFree": "0%"},
        "makeIPTablesUtilChains": False, "serializeImagePulls": False,
    }  # fmt: skip


def _proxy(layout: Layout) -> dict[str, object]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "mode": "iptables", "bindAddress": GATEWAY, "clusterCIDR": POD_RANGE,
        "healthzBindAddress": "127.0.0.1:10256", "metricsBindAddress": "127.0.0.1:10249",
        "conntrack": {"maxPerCore": 0, "min": 0},
        "clientConnection": {"kubeconfig": str(layout.kubeconfig("kube-proxy"))},
    }  # fmt: skip
