"""The parts that every training loop has."""
