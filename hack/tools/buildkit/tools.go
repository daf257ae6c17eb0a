//go:build tools

// Package tools pins BuildKit, which builds the images of the end-to-end tests on the cluster's own containerd.
package tools

import _ "github.com/moby/buildkit/cmd/buildctl"  // e2e
import _ "github.com/moby/buildkit/cmd/buildkitd" // e2e
