"""A real Kubernetes cluster of one node on this machine: kubelet, containerd, network and DNS, and it can be taken down.

``python -m dpo_testing.realcluster up`` brings it up as far as it is not up yet, ``down`` leaves nothing but the cache.
docs/e2e.md says what it is for and what it needs.
"""
