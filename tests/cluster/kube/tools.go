//go:build tools

// Package kubetools requires the Kubernetes programs of one version, so that `go build` takes them from the module proxy and
// checks them against go.sum. `go install k8s.io/kubernetes/cmd/...@version` refuses: that module has replace directives.
package kubetools

import (
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kube-controller-manager"
	_ "k8s.io/kubernetes/cmd/kube-proxy"
	_ "k8s.io/kubernetes/cmd/kube-scheduler"
	_ "k8s.io/kubernetes/cmd/kubectl"
	_ "k8s.io/kubernetes/cmd/kubelet"
)
