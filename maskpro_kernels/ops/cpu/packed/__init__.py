"""Packed weights on a CPU: the code that puts their values at their places, and how a product takes it.

``products`` is what others call, and ``unpacking``. A product takes one of several ways, and each has a file that
writes its code: ``registers``, ``octets``, ``tiles``, ``blocks``. They do so in the terms of ``weight``,
``row_product`` and ``build``, by the ``instructions`` that the CPU has.
"""
