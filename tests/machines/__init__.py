"""What the machines that execute compiled kernels share: findings, global memory, rounding; and Triton's way to them.

``ptx_machine`` executes PTX, ``gcn_machine`` the assembly language of AMD's CDNA3. The driver has Triton compile for
a GPU and launch on its machine; the plugin does so for ``pytest``. Those two alone import torch and Triton.
"""
