//go:build tools

// Package tools pins the Kubernetes control plane of the tests.
package tools

import _ "k8s.io/kubernetes/cmd/kube-apiserver"
import _ "k8s.io/kubernetes/cmd/kube-controller-manager"
import _ "k8s.io/kubernetes/cmd/kubectl"
