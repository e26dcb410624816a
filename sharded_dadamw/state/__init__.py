"""Optimizer state as torch sees it: state dicts of this rank's fragments, or of whole parameters.

``piece`` says what a rank holds of a parameter's state; ``fragment_tensor`` shows that in the shape of the whole, for
torch.distributed.checkpoint; ``state_dict`` builds state dicts from buckets, and checks that one fits before anything
is changed. ``in_place`` makes the state of parameters that stay where they are. ``fingerprint`` makes a
number of all that.

Files, and the state of other optimizers, are the business of ``checkpoint`` and ``interchange``.
"""
