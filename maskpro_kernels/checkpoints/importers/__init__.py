"""What other programs store, one file a format."""
