"""A real Kubernetes cluster of one node on this machine: kubelet, containerd, network, DNS; and down again.

``python -m dpo_testing.realcluster up`` brings it up as far as it is not up yet, ``down`` leaves nothing but the cache.
docs/e2e.md says what it is for and what it needs.
"""
