//go:build tools

// Package tools pins CoreDNS, the cluster's DNS of the end-to-end tests.
package tools

import _ "github.com/coredns/coredns" // e2e
