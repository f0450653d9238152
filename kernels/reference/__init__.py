"""The same maths in plain torch, slow and obvious, float64 where asked: the oracle of the tests and of nothing else."""
