"""The worker's side of each strategy: our loop with collectives, our loop with parameter servers, and a user's script."""
