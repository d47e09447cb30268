module disttrain/tests/cluster/kube/pause

go 1.24.0
