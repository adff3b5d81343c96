"""`tuner diagnose`: seven steps from the machine to the encoding strategy, each measured on what is really there."""
