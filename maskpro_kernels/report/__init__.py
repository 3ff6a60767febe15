"""What a run shows: a page, pictures, event files."""

# What a report tells of weights that are those of the dense model
FROZEN = "weights frozen"
