"""The user's model: what wraps it, and how a measurement leaves no trace on it."""
