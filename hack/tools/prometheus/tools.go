//go:build tools

// Package tools pins Prometheus, which the tests let scrape our series, and promtool, which tests the alerts.
package tools

import _ "github.com/prometheus/prometheus/cmd/prometheus"
import _ "github.com/prometheus/prometheus/cmd/promtool"
