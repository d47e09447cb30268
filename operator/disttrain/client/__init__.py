"""The jobs of a cluster as their users see them. What the command line does on a cluster, it does through this."""
