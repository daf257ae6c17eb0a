//go:build tools

// Package tools pins training-operator v1, whose PyTorchJob runs our pods.
package tools

import _ "github.com/kubeflow/training-operator/cmd/training-operator.v1" // training-operator
