"""What the commands of `maskpro` do."""
