"""What other programs store, one file a format.

Formats of masks (``maskllm``, ``maskpro``) have a function ``stored_masks(source)`` that gives names and masks.
``learned_masks.read_masks`` chooses among them and checks what they give: a new one is a file here and an entry there.
A format of whole checkpoints (``compressed_tensors``) has a function ``write_plain(source, output)`` that writes a
plain one. The command `maskpro import` calls both.
"""
