"""The verdict on the kernels of this machine's GPU: are they right, and as fast as ``cost_model`` says."""
