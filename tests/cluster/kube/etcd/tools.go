//go:build tools

// Package tools requires etcd, so that `go build` takes it from the module proxy and checks it against go.sum.
package tools

import _ "go.etcd.io/etcd/server/v3"
