"""The command `maskpro`."""
