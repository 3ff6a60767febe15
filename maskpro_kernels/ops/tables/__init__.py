"""The functions that run operations, one file a kind of device; each has the names and arguments of the definitions."""
