"""The optimizers in the training stacks that people use, one module a stack.

    accelerate    prepare(accelerator, model, optimizer)
    transformers  ShardedTrainer, and the mixin for a Trainer of your own
    lightning     ShardedStrategy for Lightning's Trainer
    fabric        ShardedStrategy for Fabric
    torchtitan    an optimizers container that knows our two names
    olmo_core     two optimizer configs

A module imports its stack, and nothing imports the module but who uses it. None knows more of the optimizers than a
user does. All say the same two things to their stack: who averages, and who clips.
"""
