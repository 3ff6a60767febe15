"""What a run shows: a page, pictures, event files."""
