//go:build tools

// Package tools requires kwok, whose fake nodes say of every pod that it runs.
package tools

import _ "sigs.k8s.io/kwok/cmd/kwok"
