"""What travels between node and coordinator: messages, sockets, keys, tickets, and the count of every byte.

And `session`, the node's side of the protocol as a pure state machine: it lives here, not in the node, so that the
coordinator's simulation drives the very machine that nodes run. Nothing here knows a model, a ledger or a member.
"""
