"""Models and data that need no download: mlp, digits, charlm. Each is a module of factories, and a pattern for one's own."""
