//go:build tools

// Package tools pins versitygw, the S3 server of the tests, as a Go module:
// `go install` cannot pin the versions of its dependencies by a committed go.sum.
package tools

import _ "github.com/versity/versitygw/cmd/versitygw"
