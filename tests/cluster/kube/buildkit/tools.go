//go:build tools

// Package tools requires BuildKit, which builds the images from the Dockerfile where there is no Docker.
package tools

import (
	_ "github.com/moby/buildkit/cmd/buildctl"
	_ "github.com/moby/buildkit/cmd/buildkitd"
)
