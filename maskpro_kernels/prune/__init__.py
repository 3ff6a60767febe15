"""Initial masks, ``convert`` and ``finalize``."""
