"""Initial masks, masked layers into a model, and finished masks out of it."""
