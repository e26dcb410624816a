"""What happens when: gradients on their way in, parameters on their way out.

``reducer`` takes gradients from backward into buckets and through their reduction; ``plan`` is what ranks compare
before a step; ``gatherer`` publishes updated parameters and may leave their all-gathers in flight behind the next
forward; ``guard`` has whoever reads one of those parameters wait; ``cost`` adds up what a step costs.

Code here orders buckets and collectives. It does no arithmetic on elements.
"""
