"""The update rule, and the numbers that it is computed in.

``adamw`` holds the rule as one pure function, ``hyperparameters`` the scalars that it needs, as parameter groups have
them, ``precision`` the arithmetic of narrow dtypes (exact remainders, stochastic rounding), and ``storage`` the dtypes
in which state is kept.

The rule sees tensors of one size and nothing around them: no ranks, no buckets; ``storage`` says what these keep.
"""
