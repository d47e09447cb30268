//go:build tools

// Package tools requires Prometheus and promtool. Built with the tags of programs.py: of all its service discoveries, Kubernetes' alone.
package tools

import (
	_ "github.com/prometheus/prometheus/cmd/prometheus"
	_ "github.com/prometheus/prometheus/cmd/promtool"
)
