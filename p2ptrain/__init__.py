"""p2ptrain: one model, trained on many people's machines, with no server."""

__version__ = "0.1.0"
