"""`disttrain run`: the operator's plan, carried out with processes of this machine instead of pods. No cluster, no container."""
