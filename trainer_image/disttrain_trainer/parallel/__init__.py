"""Training with collectives: every worker has the model, and gradients are reduced between them."""
