"""The `disttrain` command. Also installed as kubectl-disttrain."""
