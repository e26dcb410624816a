"""What happens when: gradients on their way in, parameters on their way out.

``reducer`` takes gradients from backward into buckets and through their reduction. ``step_agreement`` says what a
step is about to do, and has ranks compare it in a ``handshake``. ``gatherer`` publishes updated parameters, and hooks
the modules of an attached model, behind whose next forward all-gathers may stay ``in_flight``: there whoever reads one
of these parameters is made to wait. ``launches`` are those of all optimizers on a process group, in one order.
``joining`` is for ranks that run out of data, and ``clock`` times a step.

Code here orders buckets and collectives. It does no arithmetic on elements.
"""
