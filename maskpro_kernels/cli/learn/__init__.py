"""`maskpro learn`: learn a mask of a language model, or continue a run; begin to read in ``command.py``.

The folder of a run has:

- ``settings.json``: the given options, for ``--resume`` and exports in int4;
- ``progress/``: snapshots, metrics and journal of the trainer (``learn/run.py``); ``start.json``, results before the
  first step; ``validation.json``; and if the run uses them, samples of the dense model and a cache of its predictions;
- at the end ``learned/logits.safetensors``, the checkpoint with its model card, ``report.json`` and
  ``perplexity.png``.
"""
