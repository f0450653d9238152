"""The same maths in plain torch, slow and obvious, in float64 where asked: the oracle of the tests, called by nothing else."""
