// Package main waits for a signal and does nothing else: the first process of every pod, whose namespaces the pod's containers
// share, and the first process of the node itself. It needs no module but Go's own library.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	signal.Ignore(syscall.SIGCHLD) // the kernel then reaps the orphans that come to the first process
	done := make(chan os.Signal, 1)
	signal.Notify(done, syscall.SIGINT, syscall.SIGTERM)
	<-done
	os.Exit(0)
}
