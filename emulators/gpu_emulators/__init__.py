"""Emulators of PTX and AMDGCN, which execute what Triton compiles for a GPU on a CPU and report its faults.

``ptx`` executes the assembly text for NVIDIA's GPUs, ``amdgcn`` that for AMD's CDNA3. ``driver.install(target)`` has
Triton compile for a GPU and launch on its emulator, and the plugin does so for ``pytest --compiled``: these two import
torch and Triton, all else numpy alone.
"""
