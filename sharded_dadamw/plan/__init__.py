"""What training will need, before anything is rented: bytes of each rank and phase, bytes on each link, and time.

It asks the layout where every element will lie, and touches no device and no process group. It must not know how an
optimizer does its work, only what it holds and sends.
"""

from sharded_dadamw.plan.report import Plan, plan

__all__ = ["Plan", "plan"]
