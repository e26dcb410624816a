"""What happens when: gradients on their way in, parameters on their way out.

``reducer`` takes gradients from backward into buckets and through their reduction; ``gatherer`` publishes updated
parameters and may leave their all-gathers in flight behind the next forward; ``guard`` has whoever reads one of those
parameters wait; ``step_claims`` is what a rank says about
a step before it takes it.

Code here orders buckets and collectives. It does no arithmetic on elements.
"""
