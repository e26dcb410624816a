"""The commands people type: training a language model with the sharded optimizer, or with a peer of it.

Nothing here is installed with the package, and only public names of `sharded_dadamw` are used.
Read in this order: `options` (what may be asked), `cluster` (how ranks find each other and are stopped), `data`,
`model`, `contenders` (one way to train per optimizer), `train` (the loop), `report`, `picture` and `run_folder` (what
is shown, drawn and written). `recipes` start it on several hosts, and `stacks` are examples within other projects.
"""
