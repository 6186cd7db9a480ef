"""The mathematics of the swarm: arrays and integers in, arrays and integers out.

This package decides which bits a run consists of: how directions follow from their names, how a loss
difference becomes one byte, how bytes move the integer weights, and how all of it is digested. It leaves to
others where bytes come from and go to, when a round begins and ends, and how a loss is computed: no file,
network, clock or torch here.

`reference` says in plain NumPy what `kernels` computes fast; the tests hold them equal bit for bit.
"""
