//go:build tools

// Package tools pins prometheus-operator: its definitions, for dry runs of the chart's monitors and rules, and its
// generator, by which cmd/scrape-config turns those monitors into a configuration of Prometheus.
package tools

import _ "github.com/dpo-operator/dpo-operator/hack/tools/prometheus-operator/cmd/scrape-config"
