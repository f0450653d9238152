"""The ops in Triton, one launch each where the maths allows; `cpu` holds their twins, `reference` their oracles.

Nothing here waits for the device. Tile sizes are module constants that the launchers read at every call.
"""
