"""tersor: make model checkpoints smaller, faster and easier to place on hardware."""

__version__ = "0.1.0"
