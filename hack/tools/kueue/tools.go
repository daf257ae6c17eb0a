//go:build tools

// Package tools pins Kueue, which queues, admits and preempts our PyTorchJobs.
package tools

import _ "sigs.k8s.io/kueue/cmd/kueue"
