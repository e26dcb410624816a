"""Optimizer state as torch sees it: state dicts of this rank's fragments, or of whole parameters.

``fragment_tensor`` is one rank's part of a state tensor in the shape of the whole, for torch.distributed.checkpoint;
``state_dict`` builds such dicts from buckets, and checks that a dict fits before anything is changed.

Files, and the state of other optimizers, are the business of ``checkpoint`` and ``interchange``.
"""
