// Package main is CoreDNS with the few plugins that a test node's DNS uses. The stock program brings some fifty more, and with
// them the client libraries of three clouds: several CPU minutes of every cold build.
package main

import (
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
)

func main() { coremain.Run() }
