"""What failing nodes cost: Branch-Train-MiX against one synchronous run, by simulation.

A cluster loses nodes at a rate that grows with its size. A synchronous job stops with the first of them; of
experts that train apart only one stops. This room puts that in figures, for the jobs of a recipe:

    assumptions    what is assumed of the cluster, each with its source or marked as a guess
    checkpointing  how often to save: Young (1974), Daly (2006), and the expected time in closed form
    jobs           a recipe's stages as jobs of so many nodes and hours; the one synchronous run beside it
    attempt        one job's life from failure to failure
    cluster        all jobs on one cluster, in the order of events
    trials         many seeds: medians and spread
    table          what ``btx plan --simulate`` prints

Plain Python: a run has as many events as it has failures, some hundreds, so there is nothing to vectorise.
docs/simulation.md has the model, what it leaves out, and results.
"""
