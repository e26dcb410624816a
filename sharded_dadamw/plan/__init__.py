"""What training will need, before anything is rented: bytes of each rank and phase, bytes on each link, and time.

``parameters`` lists what a model has, ``model`` cuts it into buckets and says what a step does with these in order,
``memory`` counts bytes and ``time`` milliseconds, ``report`` puts both together, ``text`` and ``picture`` show it.

It asks ``layout`` and ``buckets`` where every element will lie, and follows the order in which ``schedule`` holds and
sends buckets. It touches no device and no process group.
"""

from sharded_dadamw.plan.report import Plan, plan

__all__ = ["Plan", "plan"]
