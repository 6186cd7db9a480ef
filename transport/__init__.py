"""What travels between node and coordinator: messages, sockets, keys, tickets, and the count of every byte.

And what both ends do alike: `base_files` reads a base without loading it. `session`, the node's side of the protocol
as a pure state machine, lives here, not in the node, so that the coordinator's simulation drives the very machine that
nodes run. Nothing here runs a model, or knows a ledger or a member.
"""
