"""Where every element of every parameter lives, on every rank; and what parameters are called and grouped by.

``bucket_layout`` cuts a flat buffer into slots and equal shards, ``boxes`` turns a flat range into boxes of a tensor,
``indices`` says where the elements of a part are in the whole, ``placement`` which part of a parameter this rank holds
and who holds the others, ``parameters`` names parameters, ``param_groups`` puts them into groups by name.

Layout is integers. Nothing here allocates memory, talks to other ranks, or knows about optimizer state.
"""
