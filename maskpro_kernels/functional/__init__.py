"""The public functions: arguments are checked here, once, before anything happens."""
