"""The reference as machine code for the CPU."""
