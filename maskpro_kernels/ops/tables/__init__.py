"""The functions that run operations, one file a kind of device, with the names and arguments of the definitions.

Besides, each has ``draw_layers_`` and ``update_layers_`` of a ``LayerGroup``, ``weight_gradient`` and ``mask_slope``.
"""
