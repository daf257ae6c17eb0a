// Package plugins takes the place of Prometheus' own package of this name, which registers all service discoveries. The
// tests use that for Kubernetes (and static targets, which need none). The other two dozen, with their clients of cloud
// services, would take longer to compile than the rest of Prometheus.
package plugins

import (
	_ "github.com/prometheus/prometheus/discovery/kubernetes" // Register kubernetes plugin.
)
