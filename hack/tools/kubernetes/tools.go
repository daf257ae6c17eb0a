//go:build tools

// Package tools pins the Kubernetes of the tests: the control plane, and what makes this machine a node of it.
package tools

import _ "k8s.io/kubernetes/cmd/kube-apiserver"
import _ "k8s.io/kubernetes/cmd/kube-controller-manager"
import _ "k8s.io/kubernetes/cmd/kubectl"
import _ "k8s.io/kubernetes/cmd/kube-proxy"     // e2e
import _ "k8s.io/kubernetes/cmd/kube-scheduler" // e2e
import _ "k8s.io/kubernetes/cmd/kubelet"        // e2e
