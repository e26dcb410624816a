"""The optimizers in the training stacks that people use, one module a stack.

    accelerate    prepare(accelerator, model, optimizer)
    transformers  ShardedTrainer, and the mixin for a Trainer of your own
    lightning     ShardedStrategy for Lightning's Trainer
    fabric        ShardedStrategy for Fabric
    averaging     what the two strategies without DDP have in common
    torchtitan    an optimizers container that knows our two names
    olmo_core     two optimizer configs
    composer      ShardedDecoupledAdamW under its DDP, and in LLM Foundry's registry

A module imports its stack, and nothing outside of this room imports the module but who uses it. Only ``composer``
knows more of the optimizers than a user does. Where a stack averages or clips by itself, it is told who does.
"""
