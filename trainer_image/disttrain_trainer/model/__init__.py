"""What is trained: the user's factories, the task that they make, and the model as flat vectors with its optimizers."""
