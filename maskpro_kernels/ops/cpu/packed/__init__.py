"""Packed weights on a CPU: the code that puts their values at their places, and how a product takes it.

``products`` is what others call. Each of ``product``, ``octets``, ``tiles`` and ``unpack`` writes code of one kind, in
the terms of ``weight`` and ``build``, by the ``instructions`` that the CPU has.
"""
