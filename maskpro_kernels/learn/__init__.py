"""Learning the masks of a converted model."""
